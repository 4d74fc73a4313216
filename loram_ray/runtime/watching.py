"""A thread that ends the command when what its Ray cannot do without is gone."""

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

    Without this Ray waits for a minute and ends the process by itself. Where nobody handles
    interruptions, Ray has its way.

    Args:
        lost: says what is lost, or None; called again and again in a thread.
        processes: to end as soon as something is lost, as psutil's.
        every: seconds between two calls.
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
