"""Replace files atomically, for the files that Ray Train writes for a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


def atomic_local_filesystem() -> pyarrow.fs.FileSystem:
    """Return the local file system with atomic writes.

    A written file replaces the old one once it is complete. Ray Train rewrites its list of
    checkpoints in place: if the disk fills up or the process is killed in the middle, the list
    would be lost, and with it all checkpoints.
    """
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_AtomicFileSystem()))


class _AtomicFileSystem(LocalFileSystem):
    def _open(self, path: Any, mode: Any = "rb", *args: Any, **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, *args, **options)
        return _AtomicFile(path)


class _AtomicFile:
    """Partially written file, removed on closing if a write failed."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._file = self._partial.open("wb")
        self._failed = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError:
            self._failed = True
            raise

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._file.close()
        except OSError:
            self._failed = True
            raise
        finally:
            if self._failed:
                self._partial.unlink()
        if not self._failed:
            os.replace(self._partial, self._path)
