"""Read untrusted JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing.text import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    decode,
    named,
    read_bytes,
    shown_reason,
    too_deep,
)

T = TypeVar("T")


def read_json(
    path: Path | str,
    key: str | None = None,
    *,
    kind: type[T] = dict,  # type: ignore[assignment]
    limit: int = MAX_BYTES,
    remedy: str = "restore the file",
    constants: bool = False,
) -> T:
    """Read a JSON file.

    Args:
        path: Path of the file.
        key: Configuration key or option of the path, for messages.
        kind: Type of the document: `dict`, `list`, or `object` for any.
        limit: Maximum size in bytes.
        remedy: Advice to the user if the file cannot be read, for messages.
        constants: Whether to accept NaN and Infinity, which Python writes.

    Raises:
        LoramError: The file cannot be read, see `read_text`, or parsed, see `parse_json`.
    """
    data = read_bytes(path, key, limit=limit, remedy=remedy)
    return parse_json(data, named(path, key), kind=kind, remedy=remedy, constants=constants)


def parse_json(
    text: str | bytes,
    name: str,
    *,
    kind: type[T] = dict,  # type: ignore[assignment]
    remedy: str = "restore the file",
    constants: bool = False,
) -> T:
    """Parse JSON, see `read_json`.

    Args:
        text: JSON text.
        name: Name of the document, for messages.
        kind: Type of the document.
        remedy: Advice to the user if the text is rejected, for messages.
        constants: Whether to accept NaN and Infinity.

    Raises:
        LoramError: The text is not JSON of this type, is nested too deeply, or contains a duplicate
            key, a non-finite number or invalid Unicode.
    """
    if isinstance(text, bytes):
        text = decode(text, name, remedy)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=float if constants else _no_constant,
        )
        _require_shallow(value, text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except _Duplicate as error:
        lines = " and ".join(str(line) for line in _json_lines(text, error.key))
        raise LoramError(
            f"{name} must not repeat keys, got {shown(error.key)} in lines {lines}; remove one"
        ) from error
    except RecursionError as error:
        raise too_deep(name, remedy) from error
    except UnicodeEncodeError as error:
        raise LoramError(
            f"{name} must contain valid Unicode, got a lone surrogate; {remedy}"
        ) from error
    except ValueError as error:
        raise LoramError(f"{name} is not valid JSON ({shown_reason(error)}); {remedy}") from error
    if not isinstance(value, kind):
        what = "a JSON object" if issubclass(kind, dict) else "a JSON list"
        raise LoramError(f"{name} must contain {what}, got {shown(value)}; {remedy}")
    return value


class _Duplicate(ValueError):
    """Raised for a duplicate key in an object."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    distinct = dict(pairs)
    if len(distinct) != len(pairs):
        raise _Duplicate(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return distinct


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"number {digits:.40} is too large")
    return number


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _require_shallow(value: Any, text: str) -> None:
    """Raise RecursionError if lists and objects are nested too deeply."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise RecursionError


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|\n')


def _json_lines(text: str, key: str) -> list[int]:
    """Return the lines of the first two occurrences of a duplicate key in one object."""
    stack: list[dict[str, int]] = []
    line, pending = 1, ("", 0)
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token == "\n":
            line += 1
        elif token[0] == '"':
            pending = (token, line)
        elif token in "{[":
            stack.append({})
        elif token in "}]":
            stack.pop()
        elif token == ":" and json.loads(pending[0]) == key:
            if key in stack[-1]:
                return [stack[-1][key], pending[1]]
            stack[-1][key] = pending[1]
    return []
