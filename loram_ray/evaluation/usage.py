"""What a running program uses: files below its directory, files that have no name, threads."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator

_NO_FILES = ("/dev/zero", "/memfd:", "/SYSV", "/[aio]", "[")  # mapped memory that looks like one


class UsageError(Exception):
    """It uses too much, or hides what it uses."""


def check_files(folder: int, processes: Iterable[int], most_bytes: int, most_files: int) -> None:
    """Refuse too many or too large files.

    A file counts once however many names it has, and as long as something keeps it: a name, an open
    file descriptor, or a mapping.

    Args:
        folder: file descriptor of the directory.
        processes: that may keep files without a name.
        most_bytes: of all files together.
        most_files: with directories.

    Raises:
        UsageError: there is more, or a directory cannot be read.
    """
    sizes: dict[tuple[int, int], int] = {}
    for entries, status in enumerate(_named_files(folder), start=1):
        sizes[status.st_dev, status.st_ino] = status.st_size
        if entries > most_files or sum(sizes.values()) > most_bytes:
            raise UsageError
    for process in processes:
        for status in _open_files(process):
            sizes[status.st_dev, status.st_ino] = status.st_size
        known = {inode for _, inode in sizes}
        for inode in _mapped_files(process) - known:  # of unknown size
            sizes[-1, inode] = most_bytes + 1
    if sum(sizes.values()) > most_bytes:
        raise UsageError


def threads(process: int) -> int:
    """How many threads a process has; 0 if it is gone."""
    try:
        return os.stat(f"/proc/{process}/task").st_nlink - 2
    except OSError:
        return 0


def _named_files(folder: int) -> Iterator[os.stat_result]:
    """Walk a directory by file descriptors, as its paths may be longer than a path can be."""

    def unreadable(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise UsageError from error

    for _, directories, files, inside in os.fwalk(".", dir_fd=folder, onerror=unreadable):
        for name in (*directories, *files):
            with contextlib.suppress(FileNotFoundError):
                yield os.stat(name, dir_fd=inside, follow_symlinks=False)


def _open_files(process: int) -> Iterator[os.stat_result]:
    """Files without a name that a process has open."""
    place = f"/proc/{process}/fd"
    with contextlib.suppress(OSError):  # it is gone
        for name in os.listdir(place):
            with contextlib.suppress(OSError):
                status = os.stat(f"{place}/{name}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    yield status


def _mapped_files(process: int) -> set[int]:
    """Inodes of files without a name that a process has mapped."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{process}/maps", errors="replace") as lines:
        for line in lines:
            parts = line.rstrip("\n").split(maxsplit=5)
            is_file = len(parts) == 6 and not parts[5].startswith(_NO_FILES)
            if is_file and parts[5].endswith("(deleted)"):
                found.add(int(parts[4]))
    return found
