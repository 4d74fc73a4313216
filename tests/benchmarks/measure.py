"""What the benchmarks share: a command in a fresh process, its peak memory, and a plain copy."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def in_fresh_process(script: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark script; it prints one JSON object as its last line."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def reset_peak_memory() -> int:
    """Begin `peak_memory` anew, at what is resident now; that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def timed_copy(sources: list[Path], target: Path) -> float:
    """Seconds to copy files as a reader and a writer would, flushed to disk."""
    started = time.perf_counter()
    with open(target, "wb") as sink:
        for source in sources:
            with open(source, "rb") as stream:
                while piece := stream.read(2**24):
                    sink.write(piece)
        sink.flush()
        os.fsync(sink.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """The machine in words: processor, cores, memory, system."""
    model = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, no GPU"


def commit() -> str:
    """The commit that is checked out.

    Raises:
        SystemExit: tracked files differ from it, so it does not say what ran.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, check=True)
        return done.stdout.decode().strip()

    if git("status", "--porcelain", "--untracked-files=no", "--", ":!*.md", ":!*.json"):
        raise SystemExit("commit first: a record names the commit that it was made with")
    return git("rev-parse", "HEAD")
