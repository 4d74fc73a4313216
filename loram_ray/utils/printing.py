"""Text made safe to show: no control characters on terminals, no markup, no HTML in Markdown."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

from loram_ray.utils.names import is_control

_SPECIAL_IN_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|~$!&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: object, keep: str = "") -> str:
    """Write out what is not to reach a terminal: control characters, lone surrogates.

    Args:
        text: a name, a path, an answer of a model, another library's error.
        keep: control characters that stay, e.g. line ends.
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(c if c in keep or not is_control(c) else _written_out(c) for c in shown)


def plain_lines(text: object) -> str:
    """As `plain`, but lines and tabs stay."""
    return plain(str(text).replace("\r\n", "\n"), keep="\n\t")


def without_colours(text: str) -> str:
    """Text without the escape sequences that set colours."""
    return _COLOURS.sub("", text)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as paths have them
        return f"\\x{code - 0xDC00:02x}"
    return repr(character)[1:-1]


class PlainConsole(Console):
    """A console that takes no text for markup or emoji, and shows no control characters of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text, also in cells and titles of tables."""
        return super().render_str(plain_lines(text), **options)


def markdown(text: object) -> str:
    """Text as one line of Markdown without tags, links, formulas and ends of cells."""
    return _SPECIAL_IN_MARKDOWN.sub(r"\\\1", " ".join(plain_lines(text).split()))


def show(text: object, end: str = "\n") -> None:
    """Print on standard output what may hold names, paths and texts of others."""
    print(plain_lines(text), end=end, flush=True)
