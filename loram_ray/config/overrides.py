"""Values of ``--set key=value``: literal text if the key is text, YAML otherwise."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from loram_ray.config.aliases import present_key, warn_renamed
from loram_ray.config.flags import Flag, Kind, option_of
from loram_ray.config.marks import KeysOf
from loram_ray.config.run import STAGES, RunConfig
from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing import comment_in, is_unicode, parse_yaml

_NOTHING = ("", "~", "null")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value of a run's settings.

    Args:
        data: Settings, changed in place.
        override: Override in the form ``dotted.key=value``.

    Raises:
        LoramError: The override is not an assignment, its value is not valid YAML where YAML is
            required, or the key contains an invalid index of a list.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LoramError(f"--set must be key=value, got '{override}'; e.g. --set train.lora.r=16")
    if not all(key.split(".")):
        raise LoramError(f"--set must have a dotted key, got '{key}'; e.g. --set train.lora.r=16")
    key = present_key(RunConfig, key)
    set_value(data, key, _value(key, text, f"--set {key}"), f"--set {key}")


def apply_flag(data: dict[str, Any], flag: Flag, prefix: str, text: str) -> None:
    """Set one value of a run's settings from an option of the command line.

    A list may be written with commas: ``--lora.targets q_proj,v_proj``.

    Args:
        data: Settings, changed in place.
        flag: The option.
        prefix: Prefix of the key, e.g. ``prune.`` for a key of prune.
        text: Text of the value.

    Raises:
        LoramError: The value is not valid YAML where YAML is required.
    """
    if flag.renamed:
        warn_renamed(flag.option, option_of(flag.present_key))
    key = flag.present_key if flag.of_the_run else f"{prefix}{flag.present_key}"
    if flag.shorthand and not text.startswith("{"):
        inner = f"{flag.present_key}.{flag.shorthand}"
        flag = replace(flag, key=inner, present="", kind=Kind.LIST, shorthand="")
        apply_flag(data, flag, prefix, text)
        return
    if flag.kind is Kind.LIST and text not in _NOTHING and text[0] not in "[{":
        value: Any = [_value(f"{key}.0", item, flag.option) for item in text.split(",")]
    else:
        value = _value(key, text, flag.option)
    set_value(data, key, value, flag.option)


def set_value(data: dict[str, Any], key: str, value: Any, label: str) -> None:
    """Set the value at a dotted key, creating the sections on the way to it."""
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        place = _place_in(node, parent, label)
        if isinstance(node, dict) and not isinstance(node.get(parent), dict | list):
            node[parent] = {}
        node = node[place]
        if not isinstance(node, dict | list):
            raise LoramError(
                f"{label} must name a key of a section or an item of a list, but {parent} is "
                "neither; change the key or set the whole list"
            )
    node[_place_in(node, last, label)] = value


def _value(key: str, text: str, label: str) -> Any:
    """Parse the text of a key's value; messages refer to the key by ``label``."""
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
        raise LoramError(f"{label} must be valid YAML, got {shown(text)}; quote it") from error
    if comment is not None:
        raise LoramError(
            f"{label} must have no comment, got {comment!r:.60}; quote the text that contains #"
        )
    return value


def _place_in(node: Any, part: str, label: str) -> str | int:
    """Convert one part of a dotted key to a dictionary key or a list index."""
    if not isinstance(node, list):
        return part
    if not (part.isascii() and part.isdecimal() and len(part) < 10) or int(part) >= len(node):
        raise LoramError(
            f"{label} must be an index from 0 to {len(node) - 1}, got '{part}'; change the index "
            "or set the whole list"
        )
    return int(part)


def _kinds(annotation: Any, parts: Sequence[str], metadata: Sequence[Any] = ()) -> list[Any]:
    """Return the types of the value at a dotted key; empty for an unknown key.

    Text is `str` or `Path`, None stands for NoneType, and any other type stands for itself.
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
    """Return the types of a value that is not a section."""
    if get_origin(annotation) is Literal:
        return sorted({type(value) for value in get_args(annotation)}, key=repr)
    return [None if annotation is type(None) else annotation]
