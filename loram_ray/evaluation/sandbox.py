"""Running programs that nobody has read: each in processes of its own that can harm nothing.

What a program may do is limited by the kernel, from inside its process (see `sandbox_child`); here
it is started with an empty environment in an empty directory, watched, and ended. No privilege,
container or other program is needed; Linux 5.13 or newer is.

A program and its tests run in two processes (see `sandboxed`). The tests call the program as they
would call a function: values are copied into its process, and its answers are copied back as plain
data. The verdict is written by the tests' process, of which the program's process has no memory, no
file descriptor and no secret. A program therefore passes by giving the right answers, and by
nothing else: neither by an early exit, nor by what it does to the interpreter, to ``check`` or to
``==``.

What remains: answers learnt by heart; tests that accept anything (a bare ``except``, a comparison
with an argument that the program may change); and objects of a class that only the program defines,
which are compared with each other, though never with plain data, by its own methods. A program
without tests (``tests=None``) passes by coming to its end, which only its own process can say: a
program that finds the objects of `sandboxed` in its process can say so too early.
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

_CONFINED = Path(__file__).with_name("sandbox_child.py")
_OPEN_FILES = 64
_USUAL = Limits()
_MAY_MOUNT = True
_PREFIX, _NEW_SECONDS = "loram-ray-sandbox-", 60.0
_READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero",
    "/dev/random", "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Tests:
    """What a program is tested by.

    Attributes:
        prompt: how the program begins, as the benchmark gives it; what it defines in full (imports,
            helper functions, classes) is defined for the tests as well, out of the program's reach.
        source: of the tests, their call included, as in ``def check(candidate): ...``.
        entry_point: expression for what they call; its names are taken from the program.
    """

    prompt: str
    source: str
    entry_point: str


def run_program(source: str, limits: Limits = _USUAL, tests: Tests | None = None) -> Verdict:
    """Run a Python program in a sandbox, and its tests in another process.

    It passes if it comes to the end of its source without an exception, and its tests do as well;
    leaving early, even with exit code 0, is not enough. It ends when its tests do, with all of its
    threads.

    Args:
        source: of the program; the standard library is there, and nothing is on standard input.
        limits: what each of the two processes may use.
        tests: to test it by; without, its coming to its end is taken on its own word.
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
    """Refuse a machine that cannot confine a program; also clear up after killed evaluations.

    Raises:
        LoramError: it is no Linux of 5.13 or newer on x86-64 or AArch64, or Landlock is off.
    """
    _remove_abandoned()
    verdict = run_program("pass", Limits(seconds=60.0))
    if not verdict.passed:
        raise LoramError(
            "programs of a benchmark of kind code are run only where the kernel can confine them: "
            f"Linux 5.13 or newer with Landlock and seccomp, got {platform.system()} "
            f"{platform.release()} ({verdict.reason:.200}); run it on such a machine or leave the "
            "benchmark out"
        )


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as read, open(writing, "wb", buffering=0) as write:
        yield read, write


@contextlib.contextmanager
def _new_folder() -> Iterator[tuple[str, int]]:
    """An empty directory, locked as long as it is used: its path and a file descriptor of it."""
    path = tempfile.mkdtemp(prefix=_PREFIX)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path, folder
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):  # what may be left harms no evaluation
            _remove(path)


def _remove_abandoned() -> None:
    """Remove the directories of evaluations of this user that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another's, used, or gone
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(folder)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _NEW_SECONDS:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(str(path))
            finally:
                os.close(folder)


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


def _command(limits: Limits, space: Space, verdict: int) -> list[str]:
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    settings = {
        "memory": limits.memory_mb * 10**6,
        "seconds": math.ceil(limits.seconds) + 1,
        "file": limits.files_mb * 10**6,
        "files": _OPEN_FILES,
        "readable": [sys.base_prefix, sys.prefix, *packages, *_READABLE],
        "packages": packages,
        "scratch": [space.scratch_bytes, space.most_files] if _MAY_MOUNT else [],
        "inside": str(Path(__file__).parent),
        "parent": os.getpid(),
        "verdict": verdict,
    }
    return [sys.executable, "-I", "-S", "-B", str(_CONFINED), json.dumps(settings)]
