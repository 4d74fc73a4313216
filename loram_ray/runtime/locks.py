"""Waiting: for a worker that outlives its killed driver, and for what may answer again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loram_ray.utils.files import open_lock


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work directory's lock, waiting for a worker of an earlier attempt to let go.

    When a driver is killed, its worker lives on for a moment. The kernel releases the lock when
    that worker ends.
    """
    descriptor = open_lock(work / "worker.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def backing_off(most: float, first: float = 1.0, longest: float = 60.0) -> Iterator[float]:
    """Yield pauses in seconds, each twice the one before, until their sum is ``most``.

    Args:
        most: of all pauses.
        first: the first one.
        longest: of any.
    """
    waited, pause = 0.0, first
    while waited < most:
        yield pause
        waited += pause
        pause = min(2 * pause, longest)
