"""Values of ``--set key=value``: as they are written where a key is text, else YAML."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from loram_ray.config.base import KeysOf
from loram_ray.config.flags import Flag, Kind
from loram_ray.config.run import STAGES, RunConfig
from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing import comment_in, is_unicode, parse_yaml

_NOTHING = ("", "~", "null")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value of a run's settings.

    Args:
        data: the settings, changed in place.
        override: ``dotted.key=value``.

    Raises:
        LoramError: it is no assignment, its value is not YAML where it must be, or the key
            counts a list's items wrongly.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LoramError(f"--set must be key=value, got '{override}'; e.g. --set train.lora.r=16")
    if not all(key.split(".")):
        raise LoramError(f"--set must have a dotted key, got '{key}'; e.g. --set train.lora.r=16")
    set_value(data, key, _value(key, text, f"--set {key}"), f"--set {key}")


def apply_flag(data: dict[str, Any], flag: Flag, prefix: str, text: str) -> None:
    """Set one value of a run's settings from an option of the command line.

    A list may be written with commas: ``--lora.targets q_proj,v_proj``.

    Args:
        data: The settings, changed in place.
        flag: The option.
        prefix: In front of its key: ``prune.`` for a key of prune.
        text: Its value.

    Raises:
        LoramError: The value is not YAML where it must be.
    """
    key = flag.key if flag.of_the_run else f"{prefix}{flag.key}"
    if flag.shorthand and not text.startswith("{"):
        flag = replace(flag, key=f"{flag.key}.{flag.shorthand}", kind=Kind.LIST, shorthand="")
        apply_flag(data, flag, prefix, text)
        return
    if flag.kind is Kind.LIST and text not in _NOTHING and text[0] not in "[{":
        value: Any = [_value(f"{key}.0", item, flag.option) for item in text.split(",")]
    else:
        value = _value(key, text, flag.option)
    set_value(data, key, value, flag.option)


def set_value(data: dict[str, Any], key: str, value: Any, label: str) -> None:
    """Set the value at a dotted key, and make the sections on the way to it."""
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        place = _place_in(node, parent, label)
        if isinstance(node, dict) and not isinstance(node.get(parent), dict | list):
            node[parent] = {}
        node = node[place]
        if not isinstance(node, dict | list):
            raise LoramError(
                f"{label} must name a key of a section or an item of a list, {parent} is "
                "neither; change the key or set the whole list"
            )
    node[_place_in(node, last, label)] = value


def _value(key: str, text: str, label: str) -> Any:
    """The value that a text stands for at a key, which messages call by its label."""
    for word in (key, text):
        if not is_unicode(word) or "\0" in word:
            remedy = "change it" if sys.getfilesystemencoding() == "utf-8" else "set PYTHONUTF8=1"
            raise LoramError(
                f"{label.replace(key, ascii(key))} must be UTF-8 text, got {ascii(text)}; {remedy}"
            )
    kinds = set(_kinds(RunConfig, key.split(".")))
    if kinds and kinds <= {str, Path, None}:
        return None if None in kinds and text in _NOTHING else text
    try:
        value = parse_yaml(text, label)
        comment = comment_in(text)
    except LoramError as error:
        if "not valid YAML" not in str(error):
            raise
        raise LoramError(
            f"{label} has a value that is not YAML: {shown(text)}; quote it"
        ) from error
    if comment is not None:
        raise LoramError(
            f"{label} must have no comment, got {comment!r:.60}; quote the text that holds #"
        )
    return value


def _place_in(node: Any, part: str, label: str) -> str | int:
    """One part of a dotted key as it indexes a dictionary, or a list by number."""
    if not isinstance(node, list):
        return part
    if not (part.isascii() and part.isdecimal() and len(part) < 10) or int(part) >= len(node):
        raise LoramError(
            f"{label} must count the items of a list from 0 to {len(node) - 1}, got '{part}'; "
            "change the number or set the whole list"
        )
    return int(part)


def _kinds(annotation: Any, parts: Sequence[str], metadata: Sequence[Any] = ()) -> list[Any]:
    """Types that a value at the end of a dotted key may have; empty for an unknown key.

    Text is `str` or `Path`, None is none, anything else stands for itself.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(arguments[0], parts, arguments[1:])
    if origin in (Union, types.UnionType):
        return [kind for inner in arguments for kind in _kinds(inner, parts, metadata)]
    section = next((STAGES[mark.stage] for mark in metadata if isinstance(mark, KeysOf)), None)
    if section is not None and origin is dict:
        annotation = section
    if not parts:
        return _ends(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(parts[0])
        return [] if field is None else _kinds(field.annotation, parts[1:], field.metadata)
    if origin is dict:
        return _kinds(arguments[1], parts[1:])
    if origin in (tuple, list):
        place = arguments[0] if arguments[-1] is ... else Union[tuple(arguments)]  # noqa: UP007
        return _kinds(place, parts[1:])
    return [] if annotation in (str, Path, type(None)) else [annotation]


def _ends(annotation: Any) -> list[Any]:
    """The types of a value."""
    if get_origin(annotation) is Literal:
        return sorted({type(value) for value in get_args(annotation)}, key=repr)
    return [None if annotation is type(None) else annotation]
