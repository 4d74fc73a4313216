"""Signals that end a command: one exception in the main thread, one line, one exit code.

The first signal raises `Interrupted` in the main thread, so that stages and Ray end in order. A
second one, or cleaning up that takes too long, ends the process and its children at once.
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
"""Seconds in which a second signal is the first: some send it to a process and to its group."""
_PATIENCE = 30.0
"""Seconds that cleaning up may take."""


class Interrupted(KeyboardInterrupt):
    """The command must end now.

    A `KeyboardInterrupt`, the only exception that Ray passes on out of ``ray.get``.
    """


@dataclass(frozen=True)
class Ending:
    """How an interrupted command ends.

    Attributes:
        line: printed on standard error.
        code: exit code.
    """

    line: str
    code: int


class _OfMainThread(io.TextIOBase):
    """A stream that only the main thread writes to."""

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
    """A copy of a file descriptor, or None if it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def _mute_others() -> None:
    """Leave standard error to the main thread.

    Others, Ray's and those of its C++ code above all, tell at length what an interruption does to
    them.
    """
    stream = sys.stderr
    if _descriptor_of(stream) == 2:
        stream = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    sys.stdout = _OfMainThread(sys.stdout)  # type: ignore[assignment]
    sys.stderr = _OfMainThread(stream)  # type: ignore[assignment]


def _descriptor_of(stream: TextIO) -> int | None:
    """The file descriptor that a stream writes to, if it writes to one."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


class Interruption:
    """Handles this process's signals inside its block.

    Signals that were ignored before stay ignored: ``nohup`` and shells ignore some on purpose.

    Attributes:
        ending: how the command ends, or None as long as nothing ends it.
        remedy: what to do after an interruption; part of the line.
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
        """End the command for another reason than a signal; may be called in any thread.

        Args:
            line: printed on standard error.
            code: exit code.
        """
        self._end(Ending(line, code))
        main = threading.main_thread().ident
        if self._handlers and main is not None:
            signal.pthread_kill(main, next(iter(self._handlers)))

    def handler(self, number: int) -> Any:
        """This object's handler of a signal, or None if it does not handle it."""
        return self._received if number in self._handlers else None

    def _end(self, ending: Ending) -> bool:
        """Decide how the command ends; False if that was decided before."""
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
        with contextlib.suppress(OSError, ValueError):  # they may be closed
            _mute_others()
        raise Interrupted(self.ending.line)

    def _not_raised(self, unraisable: Any) -> None:
        """Raise the exception again if Python could not raise it where the signal found it."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._unraisable(unraisable)
            return
        self._raised = False
        main = threading.main_thread().ident
        again = (main, next(iter(self._handlers)))
        threading.Timer(0.1, lambda: signal.pthread_kill(*again)).start()  # type: ignore[arg-type]

    def _watch(self, reading: socket.socket) -> None:
        """See each signal at once, even while the main thread is inside C code."""
        heard: float | None = None
        poll = select.poll()  # select() itself takes no descriptor beyond 1,023
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
                return  # the block has ended
            if any(number in self._handlers for number in numbers):
                self._end(_by(numbers[0], self.remedy))
                heard = heard or now
                if now - heard > _SETTLING:
                    self._exit()
            elif not ready and now - self._since >= _PATIENCE:
                self._exit()

    def _exit(self) -> None:
        """End the process and its children at once."""
        assert self.ending is not None
        with contextlib.suppress(Exception):
            if self._stderr is not None:
                os.write(self._stderr, f"loram: {self.ending.line}\n".encode())
        end_processes(descendants())
        os._exit(self.ending.code)


def end_early() -> None:
    """Until there is an `Interruption`, have signals end the process with their line."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"loram: {_by(number).line}\n".encode())
    os._exit(_by(number).code)


def _by(number: int, remedy: str = CONTINUE) -> Ending:
    """How a signal ends the command."""
    name = signal.Signals(number).name
    return Ending(f"interrupted by {name}; {remedy}", 128 + number)


_current: Interruption | None = None


def current() -> Interruption | None:
    """The `Interruption` whose block the process is in."""
    return _current


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Give back the signal handlers that code in the block replaces.

    A default action is left to the replacement, which at least cleans up.
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
    """All processes that this one started, and those that they started, as psutil's."""
    import psutil

    try:
        return psutil.Process().children(recursive=True)
    except psutil.Error:
        return []


def end_processes(processes: list[Any], seconds: float = 0.0) -> None:
    """Kill processes that do not end by themselves.

    Args:
        processes: psutil's; those that have ended are passed over.
        seconds: to wait for them first.
    """
    import psutil

    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)
