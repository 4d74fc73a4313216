"""Temporary directories: private, with a random name, and removed even after a kill.

The owner of a directory holds a lock on a file in it, which the kernel releases when the owner
dies. Creating the next directory removes those left behind by killed processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loram_ray.errors import LoramError

_LOCK = "lock"


def temporary_directory() -> Path:
    """Return the system's directory for temporary files.

    Raises:
        LoramError: No such directory is writable.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise LoramError(
            "TMPDIR must name a writable directory, as none of the usual ones is writable; set it "
            "to one"
        ) from error


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a temporary directory with mode 0700 for the block.

    The directory is kept after the block if its lock file has been removed, see `keep`.

    Args:
        prefix: Prefix of the directory's name. Directories of dead processes with the same prefix
            are removed first.
        parent: Parent directory. Default: the system's directory for temporary files.
    """
    parent = parent or temporary_directory()
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(prefix, parent)
    folder, descriptor = _locked(prefix, parent)
    try:
        yield folder
    finally:
        if (folder / _LOCK).exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def keep(folder: Path) -> None:
    """Keep a `scratch` directory after its block."""
    (folder / _LOCK).unlink(missing_ok=True)


def remove_abandoned(prefix: str, parent: Path) -> list[Path]:
    """Remove directories whose owners are dead; return those that are still owned.

    Args:
        prefix: Prefix of the directories' names.
        parent: Parent directory.
    """
    owned = []
    for folder in parent.glob(f"{prefix}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # kept on purpose, being created, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            owned.append(folder)
        finally:
            os.close(descriptor)
    return owned


def _locked(prefix: str, parent: Path) -> tuple[Path, int]:
    """Create a directory and lock it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return folder, descriptor
        except OSError:  # another process has just removed it as abandoned
            pass
        os.close(descriptor)
