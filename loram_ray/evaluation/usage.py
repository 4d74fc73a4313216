"""Measure the resource usage of a running program: named and unnamed files, and threads."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGESIZE")
_NO_FILES = ("/dev/zero", "/memfd:", "/SYSV", "/[aio]", "[")  # memory mappings that look like files


@dataclass(frozen=True)
class Space:
    """Limits on a program's files.

    Attributes:
        data_bytes: Total size of its files.
        source_bytes: Size of the program's own source, which lies in its directory.
        files: Number of files and directories.
    """

    data_bytes: int
    source_bytes: int
    files: int = 200

    @property
    def max_bytes(self) -> int:
        """Total size including the source."""
        return self.data_bytes + self.source_bytes

    @property
    def max_files(self) -> int:
        """Number of files including the source."""
        return self.files + 1

    @property
    def scratch_bytes(self) -> int:
        """Size of a file system that allocates whole pages to each file."""
        return self.max_bytes + self.max_files * _PAGE


class UsageError(Exception):
    """A program exceeds its limits or hides its usage."""


def check_files(folder: int, processes: Iterable[int], space: Space) -> None:
    """Refuse too many or too large files.

    A file counts once regardless of its number of names, and for as long as a name, an open file
    descriptor or a mapping keeps it alive.

    Args:
        folder: File descriptor of the directory.
        processes: Process ids that may hold unnamed files.
        space: Limits on the files.

    Raises:
        UsageError: If a limit is exceeded, or a directory cannot be read.
    """
    sizes: dict[tuple[int, int], int] = {}
    for entries, status in enumerate(_named_files(folder), start=1):
        sizes[status.st_dev, status.st_ino] = status.st_size
        if entries > space.max_files or sum(sizes.values()) > space.max_bytes:
            raise UsageError
    for process in processes:
        for status in _open_files(process):
            sizes[status.st_dev, status.st_ino] = status.st_size
        known = {inode for _, inode in sizes}
        for inode in _mapped_files(process) - known:  # of unknown size
            sizes[-1, inode] = space.max_bytes + 1
    if sum(sizes.values()) > space.max_bytes:
        raise UsageError


def threads(process: int) -> int:
    """Return the number of threads of a process, or 0 if it is gone."""
    try:
        return os.stat(f"/proc/{process}/task").st_nlink - 2
    except OSError:
        return 0


def _named_files(folder: int) -> Iterator[os.stat_result]:
    """Walk a directory by file descriptors, since its paths may exceed the maximum length."""

    def unreadable(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise UsageError from error

    for _, directories, files, inside in os.fwalk(".", dir_fd=folder, onerror=unreadable):
        for name in (*directories, *files):
            with contextlib.suppress(FileNotFoundError):
                yield os.stat(name, dir_fd=inside, follow_symlinks=False)


def _open_files(process: int) -> Iterator[os.stat_result]:
    """Yield the unnamed files that a process has open."""
    place = f"/proc/{process}/fd"
    with contextlib.suppress(OSError):  # the process is gone
        for name in os.listdir(place):
            with contextlib.suppress(OSError):
                status = os.stat(f"{place}/{name}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    yield status


def _mapped_files(process: int) -> set[int]:
    """Return the inodes of unnamed files that a process has mapped."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{process}/maps", errors="replace") as lines:
        for line in lines:
            parts = line.rstrip("\n").split(maxsplit=5)
            is_file = len(parts) == 6 and not parts[5].startswith(_NO_FILES)
            if is_file and parts[5].endswith("(deleted)"):
                found.add(int(parts[4]))
    return found
