"""The exception for mistakes the user can fix, and helpers that format error messages."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

from loram_ray.addresses import without_credentials

_OF_A_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO, errno.ENOTEMPTY,
)  # fmt: skip
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DEPTH = 10  # of nested errors
_LONGEST = 600


class LoramError(Exception):
    """Raised for a mistake the user can fix.

    Each line names the key, the rule, the value and the remedy. The command prints the lines
    without a traceback and exits with code 2.

    Args:
        lines: One line for each mistake. Credentials in addresses are hidden.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(without_credentials(str(line)) for line in lines)
        super().__init__(*self.lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))


def root_cause(error: BaseException) -> BaseException:
    """Return the error that a worker raised, without Ray's wrappers around it."""
    for _ in range(_DEPTH):
        inside = [getattr(error, name, None) for name in ("cause", "_base_exc")]
        inside += list((getattr(error, "worker_failures", None) or {}).values())
        inside.append(getattr(error, "controller_failure", None))
        inner = next((one for one in inside if isinstance(one, BaseException)), error)
        if inner is error:
            break
        error = inner
    return error


def one_line(error: BaseException) -> str:
    """Format an unexpected error in one line: its type and message, or a traceback's last line."""
    root = root_cause(error)
    if isinstance(root, LoramError):
        return " ".join(line.strip() for line in str(root).splitlines())
    lines = [line.strip() for line in _COLOUR.sub("", str(root)).splitlines() if line.strip()]
    if any(line.startswith(("Traceback (", 'File "')) for line in lines):
        lines = lines[-1:]
    ends = dict.fromkeys([*lines[:1], *lines[-1:]])
    return shortened(f"{type(root).__name__}: {' '.join(ends)}".rstrip(": "))


def shortened(text: str) -> str:
    """Put a text on one line and truncate it."""
    line = without_credentials(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    message = without_credentials(str(error)).strip()
    return message.splitlines()[0] if message else type(error).__name__


def describe_path_error(error: BaseException) -> str | None:
    """Format an error about an unusable file or directory; return None for other errors."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _OF_A_PLACE:
        return None
    name = error.filename
    path = name.decode(errors="replace") if isinstance(name, bytes) else name
    return f"{path} cannot be used ({error.strerror}); check the path and its permissions"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the candidate closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def shown(value: object, limit: int = 60) -> str:
    """Format a value for a message: on one line, truncated to ``limit`` characters."""
    if isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of many digits"
    text = without_credentials(repr(value))
    return text if len(text) <= limit else f"{text[:limit]}…"
