"""Run untrusted programs, each in confined processes of its own.

The kernel restricts a program from inside its process (see `sandbox_child`). This module starts it
in an empty directory with an empty environment, monitors it and ends it. No privileges, containers
or other programs are needed, only Linux 5.13 or newer.

A program and its tests run in two processes (see `sandboxed`). The tests call the program like a
function: values are copied into its process, and answers are copied back as plain data. The tests'
process writes the verdict; the program's process shares no memory, file descriptor or secret with
it. A program therefore passes only by giving the right answers, not by exiting early and not by
manipulating the interpreter, ``check`` or ``==``.

Known limits: memorised answers; tests that accept anything (a bare ``except``, a comparison with an
argument that the program may change); and objects of classes that only the program defines, which
are compared with each other, though never with plain data, by their own methods. A program without
tests (``tests=None``) passes by reaching its end, which only its own process can report: a program
that tampers with the objects of `sandboxed` in its process can report it too early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loram_ray.errors import LoramError
from loram_ray.evaluation.trial import Limits as Limits
from loram_ray.evaluation.trial import Trial
from loram_ray.evaluation.trial import Verdict as Verdict
from loram_ray.evaluation.usage import Space

CHILD = Path(__file__).with_name("sandbox_child.py")
_OPEN_FILES = 64
_USUAL = Limits()
MAY_MOUNT = True
_PREFIX, _NEW_SECONDS = "loram-ray-sandbox-", 60.0
_READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero",
    "/dev/random", "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Tests:
    """Tests of a program.

    Attributes:
        prompt: Beginning of the program, as given by the benchmark. Its complete definitions
            (imports, helper functions, classes) are also defined for the tests, out of the
            program's reach.
        source: Source of the tests, including their call, such as ``def check(candidate): ...``.
        entry_point: Expression for the object under test; its names are taken from the program.
    """

    prompt: str
    source: str
    entry_point: str


def run_program(source: str, limits: Limits = _USUAL, tests: Tests | None = None) -> Verdict:
    """Run a Python program in a sandbox, and its tests in another process.

    A program passes if it reaches the end of its source without an exception, and its tests do as
    well; exiting early, even with exit code 0, does not pass. It is stopped with all its threads
    when its tests end.

    Args:
        source: Source of the program; it may import the standard library, and its standard input is
            empty.
        limits: Limits of each of the two processes.
        tests: Tests of the program; without tests, the program itself reports that it reached its
            end.
    """
    started = time.monotonic()
    job = {"program": source, "tests": tests and dataclasses.asdict(tests)}
    with _new_folder() as (path, folder), _pipe() as (verdicts, writing):
        space = Space(limits.files_mb * 10**6, len(source.encode("utf-8", "surrogatepass")))
        process = subprocess.Popen(
            _command(limits, space, writing.fileno()),
            cwd=path,
            env={"HOME": path, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[writing.fileno()],
        )
        writing.close()
        trial = Trial(process, verdicts, folder, limits, space)
        return trial.run(json.dumps(job).encode() + b"\n", started + limits.seconds)


@functools.cache
def require_sandbox() -> None:
    """Refuse a machine that cannot confine programs, and clean up after killed evaluations.

    Raises:
        LoramError: If the machine does not run Linux 5.13 or newer on x86-64 or AArch64, or
            Landlock is off.
    """
    _remove_abandoned()
    verdict = run_program("pass", Limits(seconds=60.0))
    if not verdict.passed:
        raise LoramError(
            "a benchmark of kind code needs a kernel that can sandbox programs: Linux 5.13 or "
            f"newer with Landlock and seccomp, got {platform.system()} {platform.release()} "
            f"({verdict.reason:.200}); run it on such a machine or remove the benchmark"
        )


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as read, open(writing, "wb", buffering=0) as write:
        yield read, write


@contextlib.contextmanager
def _new_folder() -> Iterator[tuple[str, int]]:
    """Yield the path and file descriptor of an empty directory, locked while in use."""
    path = tempfile.mkdtemp(prefix=_PREFIX)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path, folder
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):  # leftovers are harmless
            _remove(path)


def _remove_abandoned() -> None:
    """Remove the directories of this user's killed evaluations."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # belongs to another user, in use, or gone
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(folder)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _NEW_SECONDS:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(str(path))
            finally:
                os.close(folder)


def _remove(folder: str) -> None:
    """Remove a directory of any depth, for which recursion or joined paths would fail.

    The entries of subdirectories are moved up into ``folder`` until no subdirectory is left.
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
                    os.chmod(inner.path, 0o700)  # moving a directory writes to it
                os.rename(inner.path, os.path.join(folder, f"{mark}-{moved}"))
                moved += 1
            os.rmdir(entry.path)
    os.rmdir(folder)


def _command(limits: Limits, space: Space, verdict: int) -> list[str]:
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    settings = {
        "memory": limits.memory_mb * 10**6,
        "seconds": math.ceil(limits.seconds) + 1,
        "file": limits.files_mb * 10**6,
        "files": _OPEN_FILES,
        "readable": [sys.base_prefix, sys.prefix, *packages, *_READABLE],
        "packages": packages,
        "scratch": [space.scratch_bytes, space.max_files] if MAY_MOUNT else [],
        "inside": str(Path(__file__).parent),
        "parent": os.getpid(),
        "verdict": verdict,
    }
    return [sys.executable, "-I", "-S", "-B", str(CHILD), json.dumps(settings)]
