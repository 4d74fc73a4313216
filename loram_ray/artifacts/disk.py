"""Telling a full disk from other errors."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""
_SPACE = 2**20
"""Bytes of a disk that has space left after a write has failed."""


def full_disk(stage: str, where: Path, step: int) -> str:
    """The line that says so of a stage's training."""
    return (
        f"{stage}: the disk of {where} is full at step {step}; free some space and run the same "
        "command again"
    )


def is_full(error: Exception, folder: Path) -> bool:
    """Whether an error came of the disk that a folder is on, or would be on, being full.

    Libraries that write in C++ or Rust say neither errno nor the reason, so the disk is asked.
    """
    number = getattr(error, "errno", None)
    if number is not None:
        return number in FULL
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free < _SPACE
