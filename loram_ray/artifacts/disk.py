"""Detection of full disks."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers that indicate a full disk."""
_SPACE = 2**20
"""Free bytes after a failed write from which a disk does not count as full."""


def full_disk(stage: str, where: Path, step: int) -> str:
    """Return the error message for training that stopped because the disk is full."""
    return (
        f"{stage}: the disk of {where} is full at step {step}; free some space and run the same "
        "command again"
    )


def is_full(error: Exception, folder: Path) -> bool:
    """Return whether an error was caused by a full disk under a folder, which need not exist yet.

    Libraries written in C++ or Rust report neither an errno nor the reason, so the free space of
    the disk is checked.
    """
    number = getattr(error, "errno", None)
    if number is not None:
        return number in FULL
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free < _SPACE
