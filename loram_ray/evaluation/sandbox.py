"""Running programs that nobody has read: each in a process of its own that can harm nothing.

What a program may do is limited by the kernel, from inside its process (see `confined`); here it is
started with an empty environment in an empty directory, watched, and ended. No privilege, container
or other program is needed; Linux 5.13 or newer is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loram_ray.errors import LoramError

_CONFINED = Path(__file__).with_name("confined.py")
_LOOK_EVERY_SECONDS = 0.05
_MOST_OUTPUT, _TAIL = 2**20, 2000
_MOST_FILES = 200
_OPEN_FILES, _THREADS = 64, 64
_READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero",
    "/dev/random", "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a program has.

    Attributes:
        seconds: of the wall clock.
        memory_mb: of address space, the interpreter's own (about 20) included.
        files_mb: that it may keep in its directory.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    files_mb: int = 16


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: it came to its end.
        reason: why not: what it raised, or which limit it met.
        seconds: of the wall clock.
    """

    passed: bool
    reason: str
    seconds: float


def run_program(source: str, limits: Limits = Limits()) -> Verdict:
    """Run a Python program in a sandbox.

    It passes if it comes to the end of its source without an exception; leaving early, even with
    exit code 0, is not enough.

    Args:
        source: of the program; the standard library is there, and nothing is on standard input.
        limits: what it has.

    Raises:
        LoramError: this machine cannot confine a program.
    """
    mark = secrets.token_hex(16)
    ending = f"\nimport os as _os\n_os.write(1, b'{mark}')\n"
    started = time.monotonic()
    with _new_folder() as folder:
        process = subprocess.Popen(
            _command(limits),
            cwd=folder,
            env={"HOME": folder, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            try:
                process.stdin.write((source + ending).encode("utf-8", "surrogateescape"))
                process.stdin.close()
            except BrokenPipeError:
                pass
            met, said = _watch(process, Path(folder), started + limits.seconds, limits)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    seconds = time.monotonic() - started
    text = said.decode("utf-8", "replace")
    if met is None and process.returncode == 0 and mark in text:
        return Verdict(True, "", seconds)
    return Verdict(False, met or _reason(process.returncode, text.replace(mark, "")), seconds)


@functools.cache
def require_sandbox() -> None:
    """Refuse a machine that cannot confine a program.

    Raises:
        LoramError: it is no Linux of 5.13 or newer on x86-64 or AArch64, or Landlock is off.
    """
    verdict = run_program("pass", Limits(seconds=60.0))
    if not verdict.passed:
        raise LoramError(
            "programs of a benchmark of kind code are run only where the kernel can confine them: "
            f"Linux 5.13 or newer with Landlock and seccomp, got {platform.system()} "
            f"{platform.release()} ({verdict.reason:.200}); run it on such a machine or leave the "
            "benchmark out"
        )


@contextlib.contextmanager
def _new_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # what may be left harms no evaluation
            _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder however deep it is, where walks that recurse or join paths would not end.

    What is in a folder inside is moved up into ``folder`` until there is none inside.
    """
    os.chmod(folder, 0o700)
    mark, moved = secrets.token_hex(8), 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # moving a folder writes to it
                os.rename(inner.path, os.path.join(folder, f"{mark}-{moved}"))
                moved += 1
            os.rmdir(entry.path)
    os.rmdir(folder)


def _command(limits: Limits) -> list[str]:
    told = {
        "memory": limits.memory_mb * 10**6,
        "seconds": math.ceil(limits.seconds) + 1,
        "file": limits.files_mb * 10**6,
        "files": _OPEN_FILES,
        "threads": _THREADS,
    }
    readable = [sys.base_prefix, sys.prefix, *_READABLE]
    return [sys.executable, "-I", "-B", str(_CONFINED), json.dumps(told), json.dumps(readable)]


def _watch(
    process: subprocess.Popen[bytes], folder: Path, until: float, limits: Limits
) -> tuple[str | None, bytes]:
    """Wait for the end; which limit was met, if any, and the end of what was said."""
    assert process.stdout is not None
    said, amount = b"", 0
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(_LOOK_EVERY_SECONDS):
                piece = process.stdout.read(_MOST_OUTPUT)
                if piece == b"" and process.poll() is not None:
                    return None, said
                if piece == b"":  # it closed its output, and goes on
                    time.sleep(_LOOK_EVERY_SECONDS)
                amount += len(piece or b"")
                said = (said + (piece or b""))[-_TAIL:]
            if amount > _MOST_OUTPUT:
                return f"it said more than {_MOST_OUTPUT:,} bytes", said
            if time.monotonic() > until:
                return f"it took longer than {limits.seconds:g} s", said
            if _is_too_much(folder, limits.files_mb * 10**6):
                return f"its files were more than {limits.files_mb} MB or {_MOST_FILES}", said


def _is_too_much(folder: Path, most: int) -> bool:
    """Whether there are too many files below a folder, or too large ones; looks at few."""
    count = size = 0
    for inside, directories, files in os.walk(folder):
        for name in (*directories, *files):
            count += 1
            try:
                size += os.lstat(os.path.join(inside, name)).st_size
            except OSError:
                continue
            if count > _MOST_FILES or size > most:
                return True
    return False


def _reason(code: int, said: str) -> str:
    if code < 0:
        return f"it was ended by signal {-code}"
    lines = [line for line in said.strip().splitlines() if line.strip()]
    if code == 0:
        return "it left before its end"
    return lines[-1][:200] if lines else f"it ended with exit code {code}"
