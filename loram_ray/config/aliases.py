"""Other names of keys: former names, which are accepted with a warning, and names of PEFT."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from loram_ray.commands import COMMAND_OF
from loram_ray.config.marks import Alias, DottedKeysOf, KeysOf, Renamed


class RenamedKeyWarning(FutureWarning):
    """A setting was renamed or removed."""


class _Place(NamedTuple):
    """A place in the settings: its type and the marks on it."""

    annotation: Any
    marks: Sequence[Any] = ()

    def options(self) -> Iterator[_Place]:
        """Yield the types that the value may have, without Annotated and Union."""
        origin, arguments = get_origin(self.annotation), get_args(self.annotation)
        if origin is Annotated:
            yield from _Place(arguments[0], (*self.marks, *arguments[1:])).options()
        elif origin in (Union, types.UnionType):
            for inner in arguments:
                yield from _Place(inner, self.marks).options()
        else:
            yield self

    def models(self) -> Iterator[type[BaseModel]]:
        """Yield the sections whose keys a mapping at this place has."""
        for annotation, marks in self.options():
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield annotation
            elif get_origin(annotation) is dict:
                yield from (COMMAND_OF[m.stage].model for m in marks if isinstance(m, KeysOf))

    def item(self) -> _Place:
        """Return the place of a list's items or of a dictionary's values."""
        for annotation, _ in self.options():
            if (arguments := get_args(annotation)) and get_origin(annotation) in (tuple, list):
                return _Place(arguments[0])
            if arguments and get_origin(annotation) is dict:
                return _Place(arguments[1])
        return _Place(None)

    def inside(self, key: str) -> tuple[type[BaseModel] | None, _Place]:
        """Return the section that has a key, given under any name, and the place of its value."""
        models = list(self.models())
        for model in models:
            if (field := model.model_fields.get(_present(model).get(key, key))) is not None:
                return model, _Place(field.annotation, field.metadata)
        return None, _Place(None) if models else self.item()

    def dotted(self, key: str, names: _Names) -> str:
        """Return the other name of a dotted key below this place."""
        found, place = [], self
        for part in key.split("."):
            model, inner = place.inside(part)
            found.append(names(model).get(part, part) if model else part)
            place = inner
        return ".".join(found)

    def name(self, key: str, names: _Names) -> str:
        """Return the other name of a key in a mapping at this place, which may be dotted."""
        for mark in self.marks:
            if isinstance(mark, DottedKeysOf):
                return _Place(COMMAND_OF[mark.stage].model).dotted(key, names)
        model, _ = self.inside(key)
        return names(model).get(key, key) if model else key


_Names = Callable[[type[BaseModel]], Mapping[str, str]]


def aliases_of(marks: Sequence[Any]) -> list[Alias]:
    """Return the other names among the marks of a key."""
    return [mark for mark in marks if isinstance(mark, Alias)]


@functools.cache
def _present(model: type[BaseModel]) -> Mapping[str, str]:
    """Return the keys of a section by their other names."""
    fields = model.model_fields.items()
    return {alias.name: key for key, field in fields for alias in aliases_of(field.metadata)}


@functools.cache
def _former(model: type[BaseModel]) -> Mapping[str, str]:
    """Return the former names of a section's renamed keys."""
    fields = model.model_fields.items()
    return {
        key: alias.name
        for key, field in fields
        for alias in aliases_of(field.metadata)
        if isinstance(alias, Renamed)
    }


@functools.cache
def _renamed(model: type[BaseModel]) -> Mapping[str, str]:
    """Return the renamed keys of a section by their former names."""
    return {former: key for key, former in _former(model).items()}


def with_present_names(
    model: type[BaseModel], settings: Mapping[str, Any], source: str = "", stacklevel: int = 2
) -> dict[str, Any]:
    """Return a section's settings with each key, at any depth, under its present name.

    Args:
        model: The section.
        settings: Keys and values as given.
        source: Source of the settings, for warnings.
        stacklevel: As for `warnings.warn`.

    Raises:
        ValueError: A key is given under two names.
    """
    lines: list[str] = []
    found: dict[str, Any] = _translated(_Place(model), settings, _present, "", lines)
    for line in lines:
        text = f"{source}: {line}" if source else line
        warnings.warn(text, RenamedKeyWarning, stacklevel=stacklevel)
    return found


def present_key(model: type[BaseModel], key: str) -> str:
    """Return the present name of a dotted key of a section, and warn if a part was renamed."""
    present = _Place(model).dotted(key, _present)
    if _Place(model).dotted(key, _renamed) != key:
        warn_renamed(key, present)
    return present


def warn_renamed(old: str, new: str) -> None:
    """Warn about a setting under its former name."""
    warnings.warn(_line(old, new), RenamedKeyWarning, stacklevel=3)


def other_keys(model: type[BaseModel], key: str) -> Iterator[tuple[str, bool]]:
    """Yield the other names of a dotted key, and whether a part of it was renamed."""
    place, names = _Place(model), [("", False)]
    for part in key.split("."):
        _, place = place.inside(part)
        more = [(alias.name, isinstance(alias, Renamed)) for alias in aliases_of(place.marks)]
        names = [
            (f"{before}.{name}".lstrip("."), renamed or since)
            for before, renamed in names
            for name, since in [(part, False), *more]
        ]
    yield from names[1:]


def with_former_names(model: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's settings with renamed keys, at any depth, under their former names."""
    found: dict[str, Any] = _translated(_Place(model), settings, _former, "", [])
    return found


def former_key(model: type[BaseModel], key: str) -> str:
    """Return a dotted key with renamed parts under their former names."""
    return _Place(model).dotted(key, _former)


def _translated(place: _Place, value: Any, names: _Names, where: str, lines: list[str]) -> Any:
    """Return a value with other names of its keys.

    Args:
        place: Place of the value.
        value: Value; sections that were validated already are left as they are.
        names: Other names of a section's keys.
        where: Prefix of the keys in the value, for messages.
        lines: List to append a line to for each key under its former name.
    """
    if isinstance(value, list | tuple):
        item = place.item()
        items = (_translated(item, x, names, f"{where}{i}.", lines) for i, x in enumerate(value))
        return list(items) if isinstance(value, list) else tuple(items)
    if not isinstance(value, Mapping):
        return value
    found: dict[Any, Any] = {}
    for key, given in value.items():
        if not isinstance(key, str):
            found[key] = given
            continue
        name = place.name(key, names)
        if name in found or (name != key and name in value):
            other = next(k for k in value if k != key and place.name(k, names) == name)
            raise ValueError(
                f"{where}{key} must not be given beside {where}{other}, which is the same key, "
                f"got {given!r:.60}; remove one of them"
            )
        if place.name(key, _renamed) != key:
            lines.append(_line(f"{where}{key}", f"{where}{name}"))
        _, inner = place.inside(key)
        found[name] = _translated(inner, given, names, f"{where}{name}.", lines)
    return found


def _line(old: str, new: str) -> str:
    return f"{old} was renamed to {new}; change it"
