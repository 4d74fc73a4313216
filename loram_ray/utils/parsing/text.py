"""Files of text: regular ones, of a bounded size, in UTF-8."""

from __future__ import annotations

from pathlib import Path

from loram_ray.errors import LoramError
from loram_ray.utils.files import open_regular

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
"""Lists and dictionaries inside each other; pydantic and json recurse, Python's limit is 1000."""
MAX_DIGITS = 308
"""Digits of an integer: more are no float, and Python refuses to convert over 4300."""


def named(path: Path | str, key: str | None) -> str:
    """A file as messages name it: the key it was given under, and its path."""
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
        path: the file.
        key: configuration key or option it was given under, for messages.
        limit: most bytes that are read.
        remedy: what to do where it cannot be read, for messages.

    Raises:
        LoramError: it does not exist, cannot be read, is larger, or is no regular file.
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
        raise LoramError(f"{name} must have at most {limit:,} bytes, got more; {remedy}")
    return data


def read_text(
    path: Path | str,
    key: str | None = None,
    *,
    limit: int = MAX_BYTES,
    remedy: str = "check the file",
) -> str:
    """Read a file of UTF-8 text, without the byte order mark it may begin with.

    Raises:
        LoramError: as of `read_bytes`, or it is not UTF-8.
    """
    return decode(read_bytes(path, key, limit=limit, remedy=remedy), named(path, key), remedy)


def decode(data: bytes, name: str, remedy: str) -> str:
    """Decode UTF-8, without a byte order mark at the beginning.

    Raises:
        LoramError: it is not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoramError(
            f"{name} cannot be read (line {line} is not UTF-8: {error.reason}); {remedy}"
        ) from error


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: none of its characters is half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_reason(error: BaseException, limit: int = 160) -> str:
    """What a library's error says, on one line of a bounded length."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else f"{line[:limit]}…"


def too_deep(name: str, remedy: str) -> LoramError:
    """The error of a document that is nested too deeply."""
    return LoramError(f"{name} must be nested at most {MAX_DEPTH} deep, got more; {remedy}")
