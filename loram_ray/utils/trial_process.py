"""Programs on untrusted input, run in a process of their own that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys

_WALL_SECONDS = 60.0


def run_apart(program: str, request: object) -> subprocess.CompletedProcess[bytes] | None:
    """Run a Python program in a new process, isolated from the environment and this directory.

    The program limits its own CPU time and memory with ``resource``; the kernel kills it if it
    exceeds them.

    Args:
        program: Source code; it imports the standard library and installed packages alone.
        request: Value that the program reads as JSON from its standard input.

    Returns:
        The finished process with its output, or None if it took more than a minute.
    """
    command = [sys.executable, "-I", "-c", program]
    try:
        return subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=_WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
