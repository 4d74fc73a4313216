"""Open and write files without blocking and without following links.

Opening a FIFO blocks the caller, and writing to a symbolic link in place of a temporary file or
lock truncates its target. All files that this package opens by name therefore go through here.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from loram_ray.errors import LoramError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a symbolic link"),
)
_OF_MODELS = (".json", ".jsonl", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Suffixes of the files in a model's directory."""


def kind_of_file(mode: int) -> str:
    """Describe the file type of an ``st_mode``, e.g. ``a directory``."""
    return next((kind for test, kind in _KINDS if test(mode)), "a file")


def open_descriptor(path: Path | str) -> int:
    """Open a regular file for reading; never block on a FIFO.

    Returns:
        File descriptor, which the caller must close.

    Raises:
        FileNotFoundError: The file does not exist.
        NotADirectoryError: A parent is not a directory.
        LoramError: The file is not regular, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except ValueError as error:  # a null character
        raise LoramError(f"{path} must be the path of a file ({error}); correct it") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _not_regular(path, "a socket") from error
        raise LoramError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(path, kind_of_file(mode))
    return descriptor


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file for reading bytes; raise as `open_descriptor` does."""
    return io.open(open_descriptor(path), "rb")  # noqa: UP020 - a descriptor, not a path


def read_regular(path: Path | str) -> bytes:
    """Return the bytes of a regular file; raise as `open_descriptor` does."""
    with open_regular(path) as file:
        return file.read()


def require_regular_files(directory: Path | str) -> None:
    """Check that the files of a model's directory can be read without blocking.

    Libraries open a model's weights, configurations, tokenizers and templates by name.

    Raises:
        LoramError: A file is not regular, a broken link, or not readable.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if Path(entry.name).suffix in _OF_MODELS]
    except (FileNotFoundError, NotADirectoryError):  # reported when a file in it is opened
        return
    except OSError as error:
        raise LoramError(
            f"{directory} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    for name in sorted(names):
        path = Path(directory) / name
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise LoramError(
                f"{path} cannot be read ({error.strerror}); download or copy the model again"
            ) from error
        if not stat.S_ISREG(mode):
            raise _not_regular(path, kind_of_file(mode))
        if not os.access(path, os.R_OK, effective_ids=True):
            raise LoramError(
                f"{path} cannot be read ({os.strerror(errno.EACCES)}); check its permissions"
            )


def write_atomic(path: Path, content: bytes | str, durably: bool = False) -> None:
    """Write a file atomically, through a temporary file that is renamed.

    Args:
        path: Path of the file. A symbolic link or FIFO at this path is replaced, not followed.
        content: Bytes, or text to encode as UTF-8.
        durably: Whether to sync the content to disk before the rename.

    Raises:
        LoramError: The path is a directory.
        OSError: The parent directory is not writable.
    """
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    sibling.unlink(missing_ok=True)
    try:
        with open(sibling, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        sibling.replace(path)
    except IsADirectoryError as error:
        sibling.unlink(missing_ok=True)
        raise LoramError(f"{path} must be a file, got a directory; move it away") from error
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


def open_lock(path: Path) -> int:
    """Open a lock file and create it if needed; never follow links or truncate.

    Returns:
        File descriptor, which the caller must close.

    Raises:
        LoramError: The path is not a regular file.
        OSError: The parent directory is not writable.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        kinds = {
            errno.ELOOP: "a symbolic link",
            errno.EISDIR: "a directory",
            errno.ENXIO: "a socket",
        }
        if error.errno in kinds and os.path.lexists(path):
            raise _in_the_way(path, kinds[error.errno]) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _in_the_way(path, kind_of_file(mode))
    return descriptor


def require_directory(path: Path) -> None:
    """Check that a path is a directory or does not exist.

    Raises:
        LoramError: The path is a file or a symbolic link.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise _in_the_way(path, kind_of_file(mode))


def make_directory(path: Path, key: str) -> None:
    """Create an output directory and its parents, unless it exists.

    Args:
        path: Path of the directory.
        key: Configuration key or option of the path, for messages.

    Raises:
        LoramError: The directory cannot be created or is not writable.
    """
    reason = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise LoramError(f"{key} must be a writable directory, got {path} ({reason}); change it")


def _not_regular(path: Path | str, kind: str) -> LoramError:
    return LoramError(f"{path} must be a regular file, got {kind}; replace it")


def _in_the_way(path: Path, kind: str) -> LoramError:
    return LoramError(f"{path} must be free while the output is written, but is {kind}; remove it")
