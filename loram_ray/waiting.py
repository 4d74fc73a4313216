"""Waiting for a worker that outlives its killed driver."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work directory's lock, waiting for a worker of an earlier attempt to let go.

    When a driver is killed, its worker lives on for a moment. The kernel releases the lock when
    that worker ends.
    """
    with open(work / "worker.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
