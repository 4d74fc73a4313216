"""The one exception type for what the user can mend."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_OF_A_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO, errno.ENOTEMPTY,
)  # fmt: skip


class LoramError(Exception):
    """A mistake the user can fix, in one line: the key, the rule, the value, the remedy.

    The command prints it without a traceback and exits with code 2.

    Args:
        lines: one for each mistake.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its type where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def on_a_place(error: BaseException) -> str | None:
    """The line on a file or directory that cannot be used where it is, or None for other errors."""
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
    """A value as messages show it: on one line, of a bounded length."""
    if isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
