"""Limit the CPU time of a Python call, in any thread.

Signals reach a process's main thread only. Instead, a watcher thread checks the CPU time of the
threads that make such calls, and raises an exception in those that exceed their limit.
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
"""CPU clock and time limit on it, by thread."""
_watcher: threading.Thread | None = None


class TooLong(Exception):
    """Raised when a call exceeds its CPU time limit."""


class _Ended(BaseException):
    """Raised in a thread by the watcher; not an `Exception`, so the call does not handle it."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call a function and abort it if its thread uses too much CPU time.

    C code is aborted when it returns to Python.

    Args:
        seconds: Limit of the CPU time in seconds.
        call: Function without arguments, which must not call this function itself.

    Raises:
        TooLong: The call was aborted.
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
    """Wait for an exception that the watcher is about to raise."""
    while True:
        time.sleep(0.001)


def _watch() -> None:
    """Start the watcher unless it runs; a forked process does not inherit its parent's threads."""
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
            if (
                slow and _limits.pop(thread, None) is not None
            ):  # otherwise the call has just returned
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_Ended)
                )
