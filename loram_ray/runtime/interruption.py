"""Signal handling of commands: one exception in the main thread, one line, one exit code.

The first signal raises `Interrupted` in the main thread, so stages and Ray shut down in order. A
second signal, or a cleanup that takes too long, kills the process and its children immediately.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONTINUE = "run the same command again to continue"
_SETTLING = 1.0
"""Seconds in which repeated signals count as one: some tools signal a process and its group."""
_PATIENCE = 30.0
"""Time limit of the cleanup in seconds."""


class Interrupted(KeyboardInterrupt):
    """Raised when the command must end.

    A `KeyboardInterrupt`, as this is the only exception that ``ray.get`` lets through.
    """


@dataclass(frozen=True)
class Ending:
    """Last line and exit code of an interrupted command.

    Attributes:
        line: Message for standard error.
        code: Exit code.
    """

    line: str
    code: int


class _OfMainThread(io.TextIOBase):
    """Stream that discards output of threads other than the main thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread() is threading.main_thread():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _duplicate(descriptor: int) -> int | None:
    """Duplicate a file descriptor; return None if it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def _mute_others() -> None:
    """Discard standard output and error of all threads but the main thread.

    Other threads, mainly Ray's and those of its C++ code, log many lines about an interruption.
    """
    stream = sys.stderr
    if _descriptor_of(stream) == 2:
        stream = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    sys.stdout = _OfMainThread(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _OfMainThread(stream)  # type: ignore[assignment]


def _descriptor_of(stream: TextIO) -> int | None:
    """Return the file descriptor of a stream, or None if it has none."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


class Interruption:
    """Context manager that handles this process's signals.

    Ignored signals stay ignored, as ``nohup`` and shells ignore some on purpose.

    Attributes:
        ending: Ending of the command, or None while it runs normally.
        remedy: Advice to the user after an interruption; part of the line.
    """

    def __init__(self) -> None:
        self.ending: Ending | None = None
        self.remedy = CONTINUE
        self._since = 0.0
        self._raised = False
        self._handlers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Interruption:
        global _current
        _current = self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._received)
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._stderr = _duplicate(2)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._not_raised
        threading.Thread(target=self._watch, args=(self._reading,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _current
        _current = None
        self._raised = True
        sys.unraisablehook = self._unraisable
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writing.close()
        if self._stderr is not None:
            os.close(self._stderr)

    def fail(self, line: str, code: int = 1) -> None:
        """End the command for a reason other than a signal; can be called from any thread.

        Args:
            line: Message for standard error.
            code: Exit code.
        """
        self._end(Ending(line, code))
        main = threading.main_thread().ident
        if self._handlers and main is not None:
            signal.pthread_kill(main, next(iter(self._handlers)))

    def handler(self, number: int) -> Any:
        """Return this object's handler of a signal, or None if it does not handle it."""
        return self._received if number in self._handlers else None

    def _end(self, ending: Ending) -> bool:
        """Set the ending; return False if it was already set."""
        with self._lock:
            if self.ending is not None:
                return False
            self.ending, self._since = ending, time.monotonic()
            return True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            return
        self._raised = True
        if self.ending is None:
            self._end(_by(number, self.remedy))
        assert self.ending is not None
        with contextlib.suppress(OSError, ValueError):  # the streams may be closed
            _mute_others()
        raise Interrupted(self.ending.line)

    def _not_raised(self, unraisable: Any) -> None:
        """Raise `Interrupted` again if Python could not raise it where the signal arrived."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._unraisable(unraisable)
            return
        self._raised = False
        main = threading.main_thread().ident
        again = (main, next(iter(self._handlers)))
        threading.Timer(0.1, lambda: signal.pthread_kill(*again)).start()  # type: ignore[arg-type]

    def _watch(self, reading: socket.socket) -> None:
        """Receive signals immediately, even while the main thread is in C code."""
        heard: float | None = None
        poll = select.poll()  # select() is limited to descriptors up to 1,023
        poll.register(reading, select.POLLIN)
        while True:
            left = None
            if self.ending is not None:
                left = max(self._since + _PATIENCE - time.monotonic(), 0.0) * 1000
            ready = poll.poll(left)
            numbers = reading.recv(64) if ready else b""
            now = time.monotonic()
            if ready and not numbers:
                reading.close()
                return  # the block has already ended
            if any(number in self._handlers for number in numbers):
                self._end(_by(numbers[0], self.remedy))
                heard = heard or now
                if now - heard > _SETTLING:
                    self._exit()
            elif not ready and now - self._since >= _PATIENCE:
                self._exit()

    def _exit(self) -> None:
        """Kill the process and its children immediately."""
        assert self.ending is not None
        with contextlib.suppress(Exception):
            if self._stderr is not None:
                os.write(self._stderr, f"loram: {self.ending.line}\n".encode())
        end_processes(descendants())
        os._exit(self.ending.code)


def end_early() -> None:
    """Make signals end the process with one line, until an `Interruption` takes over."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"loram: {_by(number).line}\n".encode())
    os._exit(_by(number).code)


def _by(number: int, remedy: str = CONTINUE) -> Ending:
    """Return the ending for a signal."""
    name = signal.Signals(number).name
    return Ending(f"interrupted by {name}; {remedy}", 128 + number)


_current: Interruption | None = None


def current() -> Interruption | None:
    """Return the active `Interruption`, or None."""
    return _current


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore signal handlers that code in the block replaces.

    Default actions are not restored, as the replacement at least cleans up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (signal.SIG_DFL, None):
                signal.signal(number, handler)


def descendants() -> list[Any]:
    """Return all direct and indirect child processes as ``psutil.Process``."""
    import psutil

    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []


def end_processes(processes: list[Any], seconds: float = 0.0) -> None:
    """Wait for processes to exit, and kill those that do not.

    Args:
        processes: ``psutil.Process`` objects; those that have exited are ignored.
        seconds: Time to wait before killing, in seconds.
    """
    import psutil

    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)
