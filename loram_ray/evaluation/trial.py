"""A program that is being run, as seen from outside: its output, its verdict and its limits."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import IO, Any

from loram_ray.evaluation.usage import Space, UsageError, check_files, threads

LOOK_EVERY_SECONDS = 0.05
_END_SECONDS = 5.0
_MOST_OUTPUT, _TAIL = 2**20, 2000
_MOST_THREADS = 64
_FULL = "No space left on device"
_LONGEST_VERDICT = 2**16
_LEFT = "it left before its end"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of the wall clock.
        memory_mb: of address space, the interpreter's own (about 20) included.
        files_mb: of files that it may keep in its directory, with or without a name.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    files_mb: int = 16


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: it came to its end, and its tests to theirs.
        reason: why not: what was raised, or which limit was met.
        seconds: of the wall clock.
    """

    passed: bool
    reason: str
    seconds: float


class Trial:
    """Watches a program.

    Args:
        process: `sandbox_child`, which waits for the program and its tests; the job is its input.
        verdicts: lines of JSON: ``program`` and ``tests``, the ids of their processes; ``passed``
            and ``reason``; and ``signal``, if the program ended before its tests.
        folder: file descriptor of its directory.
        limits: what it may use.
        space: what its files may use.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        verdicts: IO[bytes],
        folder: int,
        limits: Limits,
        space: Space,
    ) -> None:
        self._process, self._verdicts = process, verdicts
        self._folder, self._limits, self._space = folder, limits, space
        self._output, self._amount = b"", 0
        self._line = b""
        self._status: dict[str, Any] = {}

    def run(self, job: bytes, until: float) -> Verdict:
        """Hand the job over and wait for the verdict.

        Args:
            job: what `sandboxed.roles.run_tests` reads.
            until: when the time is up, on the monotonic clock.
        """
        started = time.monotonic()
        met: str | None = None
        try:
            self._hand_over(job)
            self._watch(until)
        except UsageError as error:
            met = str(error)
        finally:
            self._stop()
        seconds = time.monotonic() - started
        if met is None and self._status.get("passed") is True:
            return Verdict(True, "", seconds)
        return Verdict(False, met or self._reason(), seconds)

    def _hand_over(self, job: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(job)
            self._process.stdin.flush()

    def _watch(self, until: float) -> None:
        """Wait for the end.

        Raises:
            UsageError: a limit is met.
        """
        output, inputs = self._process.stdout, self._process.stdin
        assert output is not None and inputs is not None
        look = 0.0
        with selectors.DefaultSelector() as selector:
            for stream in (output, self._verdicts):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            while self._verdicts in selector.get_map():
                for key, _ in selector.select(LOOK_EVERY_SECONDS):
                    if not self._take(key.fd, key.fd == output.fileno()):
                        selector.unregister(key.fd)
                if self._amount > _MOST_OUTPUT:
                    raise UsageError(f"it said more than {_MOST_OUTPUT:,} bytes")
                now = time.monotonic()
                if now > until:
                    raise UsageError(f"it took longer than {self._limits.seconds:g} s")
                ends = "passed" in self._status and not inputs.closed
                if now > look or ends:
                    self._look()
                    look = time.monotonic() + LOOK_EVERY_SECONDS
                if ends:  # it was kept until its files were measured
                    with contextlib.suppress(BrokenPipeError):
                        inputs.close()
                    until = now + _END_SECONDS

    def _take(self, descriptor: int, is_output: bool) -> bool:
        """Read what there is; whether there may be more."""
        try:
            piece = os.read(descriptor, _LONGEST_VERDICT)
        except BlockingIOError:
            return True
        if is_output:
            self._amount += len(piece)
            self._output = (self._output + piece)[-_TAIL:]
            return bool(piece)
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                told = json.loads(line)
                self._status = {**told, **self._status} if isinstance(told, dict) else self._status
        return bool(piece) and len(self._line) < _LONGEST_VERDICT

    def _look(self) -> None:
        limits = self._limits
        pids = [
            pid for key in ("program", "tests") if isinstance(pid := self._status.get(key), int)
        ]
        reason = str(self._status.get("reason", ""))
        try:
            if not self._status.get("mounted"):
                check_files(self._folder, pids, self._space)
            elif _FULL in reason:
                raise UsageError
        except UsageError as error:
            raise UsageError(
                f"its files were more than {limits.files_mb} MB or {self._space.files}"
            ) from error
        if any(threads(pid) > _MOST_THREADS for pid in pids):
            raise UsageError(f"it started more than {_MOST_THREADS} threads")

    def _stop(self) -> None:
        """End the program, its tests and the process that waits for them."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _reason(self) -> str:
        reason = str(self._status.get("reason", ""))
        signal_number = self._status.get("signal")
        if signal_number and reason in ("", _LEFT):
            return f"it was ended by signal {signal_number}"
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        if reason or self._status.get("program"):
            return reason or _LEFT
        return lines[-1][:200] if lines else f"exit code {self._process.returncode}"
