"""The one exception type for what the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoramError(Exception):
    """A mistake the user can mend, told in one line: the key, the rule, the value, the remedy.

    The command prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its type where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


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
