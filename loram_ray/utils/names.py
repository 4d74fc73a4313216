"""Check names of files and directories, and derive safe ones from text."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

MAX_NAME_BYTES = 255
"""Maximum length of a file name in bytes on common file systems."""
MAX_OUTPUT_NAME_BYTES = 240
"""Maximum for output directories, which leaves room for prefixes and suffixes."""
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_NOT_IN_SLUGS = re.compile(r"[^A-Za-z0-9._=+-]+")
_MOST_OF_A_SLUG = 80


def is_control(character: str) -> bool:
    """Return whether a character is a control, bidirectional or surrogate character."""
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL
    )


def name_error(name: object) -> str | None:
    """Return the rule that a file name breaks, in the form ``must be …``, or None.

    A valid name is one component of a path: not empty, not ``.`` or ``..``, without slashes,
    backslashes and control characters, and at most 255 bytes long.
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
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"at most {MAX_NAME_BYTES} bytes long"
    return None


def is_plain(name: object) -> bool:
    """Return whether a file name is valid, see `name_error`."""
    return name_error(name) is None


def is_inside(path: object) -> bool:
    """Return whether all components of a relative path are valid, so it stays in its directory."""
    return isinstance(path, str) and all(map(is_plain, path.split("/")))


def output_name_error(name: object, taken: Iterable[str] = ()) -> str | None:
    """Return the rule that the name of an output directory breaks, or None.

    Args:
        name: Name of the directory. It must be valid, not hidden, and not look like an option.
        taken: Names of other files in the same directory.
    """
    fault = name_error(name)
    if fault is not None:
        return fault
    assert isinstance(name, str)
    if name[0] in ".-" or name != name.strip():
        return "without . or - in front and without spaces around it"
    if len(name.encode()) > MAX_OUTPUT_NAME_BYTES:
        return f"at most {MAX_OUTPUT_NAME_BYTES} bytes long"
    if folded(name) in map(folded, taken):
        return f"different from {', '.join(taken)}"
    return None


def folded(name: str) -> str:
    """Normalise a name, so names that some file systems do not distinguish become equal."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def first_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that differ at most by case or Unicode normalisation, or None."""
    seen: dict[str, str] = {}
    for name in names:
        key = folded(name)
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def slug(text: str) -> str:
    """Convert a text to a valid, readable file name that is unique to the text."""
    plain = _NOT_IN_SLUGS.sub("_", text).lstrip(".-")
    if plain == text and len(plain) <= _MOST_OF_A_SLUG and plain:
        return plain
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[:_MOST_OF_A_SLUG]}-{digest}".lstrip("-")
