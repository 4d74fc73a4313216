"""Lock of a work directory, and exponential backoff.

`filelock` is not used: it polls instead of waiting, and it locks whatever is at the path, while
`open_lock` accepts only a regular file and names anything else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loram_ray.utils.files import open_lock


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work directory's lock; wait for a worker of an earlier attempt to release it.

    A worker can outlive its killed driver for a moment. The kernel releases the lock when it exits.
    """
    descriptor = open_lock(work / "worker.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def backoff(most: float, first: float = 1.0, longest: float = 60.0) -> Iterator[float]:
    """Yield pauses in seconds, each twice as long as the last, until their sum reaches ``most``.

    Args:
        most: Total time of all pauses, in seconds.
        first: First pause, in seconds.
        longest: Upper bound of a pause, in seconds.
    """
    waited, pause = 0.0, first
    while waited < most:
        yield pause
        waited += pause
        pause = min(2 * pause, longest)
