"""Which names are plain: names of files and folders that stay where they are put."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

MOST_BYTES = 255
"""Bytes of a file's name at most, on every file system in use."""
MOST_BYTES_OF_OUTPUTS = 240
"""Of a folder that is written: what is put before and behind its name needs the rest."""
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_NOT_IN_SLUGS = re.compile(r"[^A-Za-z0-9._=+-]+")
_MOST_OF_A_SLUG = 80


def is_control(character: str) -> bool:
    """Whether a character moves the cursor, reorders text, or is no character at all."""
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL
    )


def fault_of_name(name: object) -> str | None:
    """Return what a plain file name must be and this one is not, or None.

    A plain name is one part of a path: not empty, not ``.`` or ``..``, without slashes, backslashes
    and control characters, and at most 255 bytes long.
    """
    if not isinstance(name, str):
        return "text"
    if not name.strip():
        return "not empty"
    if name in (".", ".."):
        return "the name of a file, not . or .."
    if "/" in name or "\\" in name:
        return "without / and \\"
    if any(map(is_control, name)):
        return "without control characters"
    if len(name.encode()) > MOST_BYTES:
        return f"at most {MOST_BYTES} bytes long"
    return None


def is_plain(name: object) -> bool:
    """Whether a name is plain, see `fault_of_name`."""
    return fault_of_name(name) is None


def is_inside(path: object) -> bool:
    """Whether a relative path is made of plain names, so that it stays in its directory."""
    return isinstance(path, str) and all(map(is_plain, path.split("/")))


def fault_of_output(name: object, taken: Iterable[str] = ()) -> str | None:
    """Return what the name of a folder that is written must be and this one is not, or None.

    Args:
        name: the folder's name; plain, and neither hidden nor like an option.
        taken: names of other files in the same place.
    """
    fault = fault_of_name(name)
    if fault is not None:
        return fault
    assert isinstance(name, str)
    if name[0] in ".-" or name != name.strip():
        return "without . or - in front and without spaces around it"
    if len(name.encode()) > MOST_BYTES_OF_OUTPUTS:
        return f"at most {MOST_BYTES_OF_OUTPUTS} bytes long"
    if folded(name) in map(folded, taken):
        return f"another than {', '.join(taken)}"
    return None


def folded(name: str) -> str:
    """The form in which names are equal that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def first_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that are equal, or differ only by case or Unicode normalisation."""
    seen: dict[str, str] = {}
    for name in names:
        key = folded(name)
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def slug(text: str) -> str:
    """A file name made of any text: readable, plain, and another for another text."""
    plain = _NOT_IN_SLUGS.sub("_", text).lstrip(".-")
    if plain == text and len(plain) <= _MOST_OF_A_SLUG and plain:
        return plain
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[:_MOST_OF_A_SLUG]}-{digest}".lstrip("-")
