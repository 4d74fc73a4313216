"""A call in Python that is ended where it computes for too long, in any thread.

Signals reach a process's first thread only. Here another thread looks at the CPU time of those that
make such a call, and raises an exception in one that has used its share.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_INTERVAL = 0.1
_limits: dict[int, tuple[int, float]] = {}
"""By thread: its CPU clock, and the time on it at which it is ended."""
_watcher: threading.Thread | None = None


class TooLong(Exception):
    """A call used more CPU time than it may."""


class _Ended(BaseException):
    """Raised in a thread from outside; no handler of the call's own catches it."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call, and end the call where its thread computes for longer.

    Code in C is ended when it returns to Python.

    Args:
        seconds: of CPU time.
        call: without arguments; not one that calls this function.

    Raises:
        TooLong: it was ended.
    """
    thread = threading.get_ident()
    _watch()
    clock = time.pthread_getcpuclockid(thread)
    _limits[thread] = (clock, time.clock_gettime(clock) + seconds)
    try:
        try:
            return call()
        finally:
            if _limits.pop(thread, None) is None and not isinstance(sys.exception(), _Ended):
                _await_the_end()
    except _Ended:
        raise TooLong from None


def _await_the_end() -> None:
    """Wait for an exception that the watcher has decided to raise."""
    while True:
        time.sleep(0.001)


def _watch() -> None:
    """Have a watcher run in this process; a fork has none of its parent's threads."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_end_the_slow, name="bounded-calls", daemon=True)
        _watcher.start()


def _end_the_slow() -> None:
    while True:
        time.sleep(_INTERVAL)
        for thread, (clock, limit) in list(_limits.items()):
            try:
                slow = time.clock_gettime(clock) > limit
            except OSError:  # the thread has just ended
                continue
            if slow and _limits.pop(thread, None) is not None:  # else the call has just returned
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_Ended)
                )
