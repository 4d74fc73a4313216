"""Read untrusted YAML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing.text import (
    MAX_DEPTH,
    is_unicode,
    named,
    read_text,
    shown_reason,
    too_deep,
)

MAX_YAML_BYTES = 2**20
MAX_ALIASED = 100_000
"""Maximum number of nodes that aliases may add to a document."""
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map", "merge")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
_FLOAT, _INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


class _Loader(_PARSER):  # type: ignore[misc]
    """Loader that reads 4:8 and 2024-01-01 as text.

    PyYAML follows YAML 1.1, which reads them as a base-60 number and a date.
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"(?!.*\d:)" + pattern.pattern, pattern.flags))
        if tag in (_INT, _FLOAT)
        else (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith(":timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path | str, key: str | None = None, *, remedy: str = "check the path") -> Any:
    """Read a YAML file.

    Args:
        path: Path of the file.
        key: Configuration key or option of the path, for messages.
        remedy: Advice to the user if the file cannot be read, for messages.

    Returns:
        Dictionaries with string keys, lists, strings, numbers, booleans and None. Dates are
        strings.

    Raises:
        LoramError: The file cannot be read, see `read_text`, or parsed, see `parse_yaml`.
    """
    text = read_text(path, key, limit=MAX_YAML_BYTES, remedy=remedy)
    return parse_yaml(text, named(path, key))


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML document, see `read_yaml`.

    Args:
        text: YAML text.
        name: Name of the document, for messages.

    Raises:
        LoramError: The text is not YAML, is nested too deeply, expands too much by aliases, or
            contains a duplicate key, a key that is not a string, a huge number, or a type that JSON
            lacks.
    """
    if len(text) > MAX_YAML_BYTES:
        raise LoramError(
            f"{name} must be at most {MAX_YAML_BYTES:,} characters, got more; shorten it"
        )
    try:
        _require_bounded(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_plain(node, name)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise LoramError(f"{name} is not valid YAML: {_yaml_reason(error)}; fix it") from error
    except (ValueError, KeyError) as error:  # from a tag such as !!int or !!bool
        reason = shown_reason(error)
        raise LoramError(
            f"{name} is not valid YAML: a tag does not match its value ({reason}); fix it"
        ) from error


def comment_in(text: str) -> str | None:
    """Return the comment that YAML would strip from a text, from its ``#`` on, or None."""
    outside, end = [], 0
    for event in _events(text):
        if isinstance(event, yaml.ScalarEvent):
            begin: Any = event.start_mark
            behind: Any = event.end_mark
            outside.append((end, begin.index))
            end = behind.index
    outside.append((end, len(text)))
    starts = (text.find("#", begin, stop) for begin, stop in outside)
    return next((text[start:] for start in starts if start >= 0), None)


def _events(text: str) -> Iterator[Any]:
    """Yield the parser's events of a text, without recursion."""
    yield from yaml.parse(text, Loader=_PARSER)


def _require_bounded(text: str, name: str) -> None:
    """Reject excessive nesting, cycles and alias expansion before composing nodes."""
    sizes: dict[Any, int] = {}
    open_: list[tuple[str | None, int]] = []  # open collections: anchor and count of nodes before
    count = aliased = 0
    for event in _events(text):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise LoramError(
                    f"{name} must not contain itself, got alias *{event.anchor:.40} in line "
                    f"{_line(event)}; write it out"
                )
            count += sizes.get(event.anchor, 0)
            aliased += sizes.get(event.anchor, 0)
            if aliased > MAX_ALIASED:
                raise LoramError(
                    f"{name} must have aliases that add at most {MAX_ALIASED:,} values, got more "
                    f"at alias *{event.anchor:.40} in line {_line(event)}; remove aliases"
                )
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value) // 64
            count += size
            if event.anchor:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            if len(open_) > MAX_DEPTH:
                raise too_deep(f"{name}, line {_line(event)},", "flatten it")
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before


def _require_plain(root: Any, name: str) -> None:
    """Reject duplicate and non-string keys, and types and numbers that JSON lacks."""
    for node in _nodes(root):
        where = f"{name}, line {_line(node)},"
        if node.tag not in _TAGS:
            raise LoramError(f"{where} must not have tag {node.tag:.60}; remove it")
        if isinstance(node, yaml.MappingNode):
            _require_distinct_keys(node, name)
            node.value = [(_as_text(key), value) for key, value in node.value]
        elif isinstance(node, yaml.ScalarNode):
            if "\0" in node.value or not is_unicode(node.value):
                raise LoramError(f"{where} must contain Unicode text without NUL; remove it")
            if node.tag in (_INT, _FLOAT):
                _require_number(node, where)


def _nodes(root: Any) -> Iterator[Any]:
    """Yield every node once."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            pending.extend(reversed(node.value))
        elif isinstance(node, yaml.MappingNode):
            pending.extend(part for pair in reversed(node.value) for part in reversed(pair))


def _require_distinct_keys(node: Any, name: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise LoramError(
                f"{name}, line {_line(key)}, must have text as keys, got a list or a mapping; "
                "quote it"
            )
        if key.tag == _MERGE:
            continue
        if key.value in lines:
            raise LoramError(
                f"{name} must not repeat keys, got {shown(key.value)} in lines {lines[key.value]} "
                f"and {_line(key)}; remove one"
            )
        lines[key.value] = _line(key)


def _as_text(key: Any) -> Any:
    """Convert a key to its literal text, so 7 and yes are valid keys."""
    if key.tag in (_MERGE, _TEXT):
        return key
    return yaml.ScalarNode(_TEXT, key.value, key.start_mark, key.end_mark)


def _require_number(node: Any, where: str) -> None:
    text = node.value.replace("_", "").lower()
    if node.tag == _FLOAT:
        absurd = "inf" not in text and _overflows(text)
    else:  # no key needs more than 64 bits
        absurd = len(text) > 66 or abs(_whole(text)) >= 2**64
    if absurd:
        raise LoramError(
            f"{where} must have numbers that fit into 64 bits, got {shown(node.value)}"
        )


def _whole(text: str) -> int:
    sign = "-" if text[0] == "-" else ""
    digits = text.lstrip("+-")
    octal = digits[0] == "0" and digits.isdecimal()
    return int(f"{sign}{digits}", 8 if octal else 0)


def _overflows(text: str) -> bool:
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _yaml_reason(error: yaml.YAMLError) -> str:
    """Format a YAML error on one line, without the excerpt."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return shown_reason(error)
    return f"{' '.join(problem.split()):.120} in line {mark.line + 1}, column {mark.column + 1}"
