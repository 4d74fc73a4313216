"""Folders for temporary files: private, with a name nobody can guess, and removed in the end.

A folder's owner holds a lock on a file in it, which the kernel releases when the owner dies. The
next owner of such a folder removes those that killed processes left behind.
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
    """The system's directory for temporary files.

    Raises:
        LoramError: there is none that can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise LoramError(
            "TMPDIR must name a directory that can be written, and none of the usual ones can; "
            "set it to one"
        ) from error


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Have a new folder, of mode 0700, inside the block.

    A folder without its lock file when the block ends is kept.

    Args:
        prefix: of the folder's name; folders of dead processes with it are removed first.
        parent: where; default: the system's directory for temporary files.
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
    """Have a `scratch` folder stay after its block."""
    (folder / _LOCK).unlink(missing_ok=True)


def remove_abandoned(prefix: str, parent: Path) -> list[Path]:
    """Remove folders whose owners are dead; return those that are still owned.

    Args:
        prefix: of their names.
        parent: where they are.
    """
    owned = []
    for folder in parent.glob(f"{prefix}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # kept on purpose, just begun, or another's
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
    """A new folder, and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return folder, descriptor
        except OSError:  # another process has just taken it for an abandoned one
            pass
        os.close(descriptor)
