"""Watch the processes that Ray depends on, and end the command when one is lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from loram_ray.runtime import interruption

_EVERY = 0.25  # seconds


@contextlib.contextmanager
def watched(
    lost: Callable[[], str | None], processes: Callable[[], list[Any]], every: float = _EVERY
) -> Iterator[None]:
    """Interrupt the command if something is lost inside the block.

    Otherwise, Ray would wait for a minute and then exit the process. Without an active
    `Interruption`, nothing is watched.

    Args:
        lost: Function that describes what is lost, or returns None; called repeatedly in a thread.
        processes: Function that returns the processes to kill on a loss, as ``psutil.Process``.
        every: Seconds between two calls of ``lost``.
    """
    current = interruption.current()
    if current is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            what = lost()
            if what is not None and not ended.is_set() and current.ending is None:
                current.fail(f"failed: {what}; {interruption.CONTINUE}")
                interruption.end_processes(processes())
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
