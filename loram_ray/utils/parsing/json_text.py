"""JSON from outside."""

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
        path: the file.
        key: configuration key or option it was given under, for messages.
        kind: type of the whole document: `dict`, `list`, or `object` for any.
        limit: most bytes that are read.
        remedy: what to do where it cannot be read, for messages.
        constants: also accept NaN and Infinity, which Python writes.

    Raises:
        LoramError: as of `read_text`, or it is no such JSON.
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
    """Parse JSON; see `read_json`.

    Args:
        text: the JSON.
        name: what it is, for messages.
        kind: type of the whole document.
        remedy: what to do where it is refused, for messages.
        constants: also accept NaN and Infinity.

    Raises:
        LoramError: it is not JSON, nested deeply, has a key twice, a number that is not finite, or
            text that is not Unicode.
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
            f"{name} must have each key once, got {shown(error.key)} in lines {lines}; remove one"
        ) from error
    except RecursionError as error:
        raise too_deep(name, remedy) from error
    except UnicodeEncodeError as error:
        raise LoramError(f"{name} must hold Unicode text, got half a pair; {remedy}") from error
    except ValueError as error:
        raise LoramError(f"{name} is not valid JSON ({shown_reason(error)}); {remedy}") from error
    if not isinstance(value, kind):
        what = "a JSON object" if issubclass(kind, dict) else "a JSON list"
        raise LoramError(f"{name} must hold {what}, got {shown(value)}; {remedy}")
    return value


class _Duplicate(ValueError):
    """A key twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


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
    raise ValueError(f"{constant} is no number of JSON")


def _require_shallow(value: Any, text: str) -> None:
    """Raise RecursionError where lists and objects are nested too deeply."""
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
    """Lines of the first two places at which an object of a JSON text has the same key."""
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
