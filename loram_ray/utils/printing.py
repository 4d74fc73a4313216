"""Make text safe to print: escape control characters, markup and HTML in Markdown."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

from loram_ray.utils.names import is_control

_SPECIAL_IN_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|~$!&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: object, keep: str = "") -> str:
    """Escape control characters and lone surrogates, which must not reach a terminal.

    Args:
        text: Untrusted text, such as a path, a model's answer or another library's error.
        keep: Control characters to keep, e.g. line breaks.
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(c if c in keep or not is_control(c) else _written_out(c) for c in shown)


def plain_lines(text: object) -> str:
    """Escape text as `plain` does, but keep line breaks and tabs."""
    return plain(str(text).replace("\r\n", "\n"), keep="\n\t")


def without_colours(text: str) -> str:
    """Remove the escape sequences that set colours."""
    return _COLOURS.sub("", text)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a non-UTF-8 byte of a path
        return f"\\x{code - 0xDC00:02x}"
    return repr(character)[1:-1]


class PlainConsole(Console):
    """Console without markup and emoji codes that escapes control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to text, also in cells and titles of tables."""
        return super().render_str(plain_lines(text), **options)


def markdown(text: object) -> str:
    """Format text as one line of Markdown, with tags, links, formulas and cell ends escaped."""
    return _SPECIAL_IN_MARKDOWN.sub(r"\\\1", " ".join(plain_lines(text).split()))


def show(text: object, end: str = "\n") -> None:
    """Print untrusted text, such as names and paths, on standard output."""
    print(plain_lines(text), end=end, flush=True)
