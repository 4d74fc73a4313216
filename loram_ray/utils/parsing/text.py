"""Read untrusted text files: regular, bounded and UTF-8."""

from __future__ import annotations

from pathlib import Path

from loram_ray.errors import LoramError
from loram_ray.utils.files import open_regular

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
"""Maximum nesting of lists and dictionaries; pydantic and json recurse up to Python's limit."""
MAX_DIGITS = 308
"""Maximum digits of an integer; larger ones overflow a float."""


def named(path: Path | str, key: str | None) -> str:
    """Name a file in messages: by its configuration key, if any, and its path."""
    return str(path) if key is None else f"{key} {path}"


def read_bytes(
    path: Path | str,
    key: str | None = None,
    *,
    limit: int = MAX_BYTES,
    remedy: str = "check the path",
) -> bytes:
    """Read a regular file of a bounded size.

    Args:
        path: Path of the file.
        key: Configuration key or option of the path, for messages.
        limit: Maximum size in bytes.
        remedy: Advice to the user if the file cannot be read, for messages.

    Raises:
        LoramError: The file does not exist, cannot be read, is too large, or is not regular.
    """
    name = named(path, key)
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise LoramError(f"{name} does not exist; {remedy}") from error
    except OSError as error:
        raise LoramError(f"{name} cannot be read ({error.strerror}); {remedy}") from error
    except LoramError as error:
        raise error if key is None else LoramError(f"{key} {error}") from error
    if len(data) > limit:
        raise LoramError(f"{name} must be at most {limit:,} bytes, got more; {remedy}")
    return data


def read_text(
    path: Path | str,
    key: str | None = None,
    *,
    limit: int = MAX_BYTES,
    remedy: str = "check the file",
) -> str:
    """Read a UTF-8 text file, without a byte order mark.

    Raises:
        LoramError: The file cannot be read, see `read_bytes`, or is not UTF-8.
    """
    return decode(read_bytes(path, key, limit=limit, remedy=remedy), named(path, key), remedy)


def decode(data: bytes, name: str, remedy: str) -> str:
    """Decode UTF-8, without a byte order mark.

    Raises:
        LoramError: The data is not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoramError(
            f"{name} cannot be read (line {line} is not UTF-8: {error.reason}); {remedy}"
        ) from error


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode, without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_reason(error: BaseException, limit: int = 160) -> str:
    """Format a library's error on one line, truncated to ``limit`` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else f"{line[:limit]}…"


def too_deep(name: str, remedy: str) -> LoramError:
    """Return the error for a document that is nested too deeply."""
    return LoramError(f"{name} must be nested at most {MAX_DEPTH} levels deep, got more; {remedy}")
