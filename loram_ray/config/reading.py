"""From YAML and overrides to sections, and from broken rules to clear lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from loram_ray.config.run import STAGES, RunConfig
from loram_ray.config.section import Section, kind_of, section_types
from loram_ray.errors import LoramError, nearest


def load_run(config: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply overrides.

    Args:
        config: a YAML file, or None to start from nothing.
        overrides: ``dotted.key=value`` with a YAML value.

    Raises:
        LoramError: the file or an override cannot be read, or a value breaks a rule.
    """
    data = _read_yaml(Path(config)) if config is not None else {}
    for override in overrides:
        _apply(data, override)
    for stage in STAGES:
        if stage in data and data[stage] is None:  # "recover:" alone asks for its defaults
            data[stage] = {}
    return validate(RunConfig, data, source=str(config) if config is not None else "--set")


def section_of(run: RunConfig, stage: str) -> Any:
    """Return one stage's section.

    Raises:
        LoramError: the run file has none.
    """
    section = getattr(run, stage)
    if section is None:
        raise LoramError(f"{stage} must be a section of the config; add '{stage}:' to it")
    return section


def validate(model: type[Section], data: Mapping[str, Any], source: str) -> Any:
    """Validate a dictionary, turning each broken rule into one clear line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(model, entry) for entry in _causes(error.errors())]
        raise LoramError(*(f"{source}: {line}" for line in lines)) from error


def _causes(errors: Sequence[Any]) -> list[Any]:
    """Leave out errors that only follow from others.

    Sections lack paths where ``base`` or ``output`` is wrong, and a list is said to be too short
    where one of its items is wrong.
    """
    shared = [error for error in errors if error["loc"] in (("base",), ("output",))]
    if shared:
        return shared
    locations = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if not any(
            len(other) > len(error["loc"]) and other[: len(error["loc"])] == error["loc"]
            for other in locations
        )
    ]


class _Loader(yaml.SafeLoader):
    """YAML in which 4:8 is a pattern, not 248: PyYAML counts to base sixty, as YAML 1.1 did."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"(?!.*\d:)" + pattern.pattern, pattern.flags))
        if tag.endswith((":int", ":float"))
        else (tag, pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        raise LoramError(f"--config {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoramError(f"--config {path} cannot be read ({error}); check the file") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise LoramError(f"--config {path} is not valid YAML: {reason}; mend the line") from error
    if not isinstance(data, dict):
        raise LoramError(f"--config {path} must hold keys and values; see jobs/configs/demo.yaml")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LoramError(f"--set must be key=value, got '{override}'; e.g. --set train.lora.r=16")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise LoramError(f"--set {key} has a value that is not YAML: {text}; quote it") from error
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        place = _place_in(node, parent, key)
        if isinstance(node, dict) and not isinstance(node.get(parent), dict | list):
            node[parent] = {}
        node = node[place]
    node[_place_in(node, last, key)] = value


def _place_in(node: Any, part: str, key: str) -> str | int:
    """One part of a dotted key as it indexes a dictionary, or a list by number."""
    if not isinstance(node, list):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise LoramError(
            f"--set {key} must count the items of a list from 0 to {len(node) - 1}, got '{part}'; "
            "change the number or set the whole list"
        )
    return int(part)


def _describe(model: type[BaseModel], error: Any) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location) or "the config"
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            known = _fields_at(model, location[:-1])
            return f"{key} is not a known key{nearest(str(location[-1]), known)}"
        case "missing":
            return f"{key} must be given; add it to the config or pass --set {key}=…"
        case "value_error":
            text = str(error["ctx"]["error"])  # of a section it begins with the key, of a key not
            return (f"{key} " if text.startswith("must ") else f"{key}." if location else "") + text
        case "path_type":
            return f"{key} must be a path, got {value!r}; change the value"
    rule = re.sub(r"^\w+ should", "must", error["msg"])  # "Input should be", "Tuple should have"
    return f"{key} {rule}, got {value!r}; change the value"


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at a location, for suggestions."""
    current: type[BaseModel] = model
    by_kind: dict[str, type[Section]] = {}
    for part in location:
        if part in by_kind:  # which section of several it is comes after its number
            current = by_kind[part]
        elif part in current.model_fields:
            inside = section_types(current.model_fields[part].annotation)
            current = inside[0] if inside else current
            by_kind = {kind_of(section): section for section in inside} if inside[1:] else {}
    return list(current.model_fields)
