"""Monitor a running program from outside: its output, its verdict and its limits."""

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
_MAX_OUTPUT, _TAIL = 2**20, 2000
_MAX_THREADS = 64
_FULL = "No space left on device"
_MAX_VERDICT = 2**16
_LEFT = "it exited before its end"


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        seconds: Wall-clock time.
        memory_mb: Address space, including about 20 MB for the interpreter.
        files_mb: Files kept in its directory, named or not.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    files_mb: int = 16


@dataclass(frozen=True)
class Verdict:
    """Result of a program.

    Attributes:
        passed: Whether the program and its tests reached their ends.
        reason: Exception raised or limit exceeded, if it did not pass.
        seconds: Wall-clock time.
    """

    passed: bool
    reason: str
    seconds: float


class Trial:
    """Run and monitor a program.

    Args:
        process: `sandbox_child` process, which waits for the program and its tests and reads the
            job.
        verdicts: JSON lines with the process ids ``program`` and ``tests``, with ``passed`` and
            ``reason``, and with ``signal`` if the program ended before its tests.
        folder: File descriptor of its directory.
        limits: Resource limits.
        space: Limits on its files.
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
        """Send the job and wait for the verdict.

        Args:
            job: Job for `sandboxed.roles.run_tests`.
            until: Deadline on the monotonic clock.
        """
        started = time.monotonic()
        met: str | None = None
        try:
            self._send_job(job)
            self._watch(until)
        except UsageError as error:
            met = str(error)
        finally:
            self._stop()
        seconds = time.monotonic() - started
        if met is None and self._status.get("passed") is True:
            return Verdict(True, "", seconds)
        return Verdict(False, met or self._reason(), seconds)

    def _send_job(self, job: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(job)
            self._process.stdin.flush()

    def _watch(self, until: float) -> None:
        """Wait for the end.

        Raises:
            UsageError: If a limit is exceeded.
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
                if self._amount > _MAX_OUTPUT:
                    raise UsageError(f"it printed more than {_MAX_OUTPUT:,} bytes")
                now = time.monotonic()
                if now > until:
                    raise UsageError(f"it took longer than {self._limits.seconds:g} s")
                ends = "passed" in self._status and not inputs.closed
                if now > look or ends:
                    self._check_usage()
                    look = time.monotonic() + LOOK_EVERY_SECONDS
                if ends:  # kept alive until its files were measured
                    with contextlib.suppress(BrokenPipeError):
                        inputs.close()
                    until = now + _END_SECONDS

    def _take(self, descriptor: int, is_output: bool) -> bool:
        """Read the available data; return whether there may be more."""
        try:
            piece = os.read(descriptor, _MAX_VERDICT)
        except BlockingIOError:
            return True
        if is_output:
            self._amount += len(piece)
            self._output = (self._output + piece)[-_TAIL:]
            return bool(piece)
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                news = json.loads(line)
                self._status = {**news, **self._status} if isinstance(news, dict) else self._status
        return bool(piece) and len(self._line) < _MAX_VERDICT

    def _check_usage(self) -> None:
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
                f"its files exceeded {limits.files_mb} MB or {self._space.files} files"
            ) from error
        if any(threads(pid) > _MAX_THREADS for pid in pids):
            raise UsageError(f"it started more than {_MAX_THREADS} threads")

    def _stop(self) -> None:
        """Stop the program, its tests and the process that waits for them."""
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
            return f"it was killed by signal {signal_number}"
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        if reason or self._status.get("program"):
            return reason or _LEFT
        return lines[-1][:200] if lines else f"exit code {self._process.returncode}"
