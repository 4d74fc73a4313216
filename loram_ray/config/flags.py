"""Command-line options, created from the configuration's models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loram_ray.commands import Command
from loram_ray.config.aliases import other_keys
from loram_ray.config.base import RayConfig, Section, section_types
from loram_ray.config.marks import KeysOf
from loram_ray.config.run import STAGES, RunConfig


class Kind(Enum):
    """How the text of an option is parsed, with the type that the help shows."""

    TEXT = "<str>"
    PATH = "<path>"
    INTEGER = "<int>"
    NUMBER = "<float>"
    CHOICE = "<choice>"
    SWITCH = "<bool>"
    LIST = "<list>"
    YAML = "<yaml>"


@dataclass(frozen=True)
class Flag:
    """A command-line option for a key of a section.

    Attributes:
        key: Dotted key below the section, e.g. ``lora.r``.
        kind: How the text is parsed.
        help: Description.
        default: Default as text; None for none.
        required: Whether the option must be given.
        choices: Allowed values, if they can be listed.
        hidden: Whether the option is left out of the help.
        shorthand: Nested key that is set if the value is not a mapping.
        of_the_run: Whether the key belongs to the run file itself, such as ``ray.address``.
        present: The key's present name, if the option has another one.
        renamed: Whether the option has a former name of the key.
    """

    key: str
    kind: Kind
    help: str
    default: str | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    hidden: bool = False
    shorthand: str = ""
    of_the_run: bool = False
    present: str = ""
    renamed: bool = False

    @property
    def present_key(self) -> str:
        """Dotted key below the section under its present name."""
        return self.present or self.key

    @property
    def option(self) -> str:
        """The option as typed, with dashes; underscores are accepted too."""
        return option_of(self.key)


def option_of(key: str) -> str:
    """Return the option of a dotted key, e.g. ``--lora.rank-pattern``."""
    return f"--{key.replace('_', '-')}"


def flags_of(
    model: type[BaseModel],
    prefix: str = "",
    defaults: BaseModel | None = None,
    required: bool = True,
    hidden: bool = False,
) -> Iterator[Flag]:
    """Yield the options of a section and its nested sections.

    Args:
        model: Model of the section.
        prefix: Prefix of each key.
        defaults: Values of the keys, if the outer section sets them.
        required: Whether keys without a default must be given.
        hidden: Whether the help leaves the options out.
    """
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        default = field.default if defaults is None else getattr(defaults, name)
        if (inner := _only_section(field.annotation)) is not None:
            inside = default if isinstance(default, BaseModel) else None
            needed = required and default is PydanticUndefined
            yield Flag(
                key=key,
                kind=Kind.YAML,
                help=field.description or "",
                hidden=hidden or not inner.shorthand,
                shorthand=inner.shorthand,
            )
            yield from flags_of(inner, f"{key}.", inside, needed, hidden)
            continue
        yield _flag(key, field, default, required, hidden)
        if (mark := keys_of(field)) is not None and mark.stage == name:
            for flag in flags_of(STAGES[name], f"{key}.", None, False, True):
                if flag.key.split(".")[len(key.split("."))] not in mark.without:
                    yield flag


def keys_of(field: FieldInfo) -> KeysOf | None:
    """Return the marker of a field that holds keys of another section, if any."""
    return next((mark for mark in field.metadata if isinstance(mark, KeysOf)), None)


def _only_section(annotation: Any) -> type[Section] | None:
    """Return the section class of a field that is a section or an optional section."""
    options = _without_none(annotation)
    inside = section_types(options[0]) if len(options) == 1 else []
    return inside[0] if inside == options else None


def _flag(key: str, field: FieldInfo, default: Any, required: bool, hidden: bool) -> Flag:
    kind, choices = _kind_of(field.annotation)
    given = default is not PydanticUndefined
    return Flag(
        key=key,
        kind=kind,
        help=field.description or "",
        default=default_text(default) if given else None,
        required=required and not given,
        choices=choices,
        hidden=hidden,
    )


def default_text(default: Any) -> str | None:
    """Return a default as it is typed; None if there is nothing to show."""
    if default is None or default == "" or default == () or default == {}:
        return None
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(str(item).replace("\n", "\\n") for item in default)
    text = str(default)
    return text if text.isprintable() and text == text.strip() else repr(text)


def _kind_of(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    options = _without_none(annotation)
    if len(options) != 1:
        if set(options) <= {int, float}:
            return Kind.NUMBER, ()
        return (Kind.LIST if any(get_origin(one) is tuple for one in options) else Kind.YAML), ()
    [option] = options
    origin = get_origin(option)
    if origin is Literal:
        return Kind.CHOICE, tuple(str(value) for value in get_args(option))
    if origin in (tuple, list):
        return (Kind.YAML if section_types(option) else Kind.LIST), ()
    plain = {
        bool: Kind.SWITCH,
        int: Kind.INTEGER,
        float: Kind.NUMBER,
        str: Kind.TEXT,
        Path: Kind.PATH,
    }
    return plain.get(option, Kind.YAML), ()


def _without_none(annotation: Any) -> list[Any]:
    """Return the types of a value, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _without_none(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in _without_none(inner)]
    return [] if annotation is type(None) else [annotation]


def flags_for(command: Command) -> list[Flag]:
    """Return a command's options: the keys of its section, and Ray's if it uses Ray.

    Options with other names of a key follow the key's own; the help leaves them out.
    """
    if command.name == "run":
        flags = [
            replace(flag, hidden=True, required=False) if flag.key.split(".")[0] in STAGES else flag
            for flag in flags_of(RunConfig)
        ]
    else:
        of_ray = flags_of(RayConfig, "ray.") if command.uses_ray else ()
        of_the_run = (replace(flag, of_the_run=True) for flag in of_ray)
        flags = [*flags_of(command.model), *of_the_run]
    return [named for flag in flags for named in (flag, *_under_other_names(command, flag))]


def _under_other_names(command: Command, flag: Flag) -> Iterator[Flag]:
    for key, renamed in other_keys(command.model, flag.key):
        yield replace(flag, key=key, present=flag.key, renamed=renamed, hidden=True, required=False)
