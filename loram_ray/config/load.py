"""Loading of sections from YAML and overrides, with one clear line for each broken rule."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ValidationError

from loram_ray.commands import COMMANDS, STUDIES, Command
from loram_ray.config.aliases import with_present_names
from loram_ray.config.base import RayConfig, Section, kind_of, section_types
from loram_ray.config.flags import Flag, option_of
from loram_ray.config.overrides import apply_flag, apply_override
from loram_ray.config.run import STAGES, PartOfRun, RunConfig, compares_run, fill_paths
from loram_ray.errors import LoramError, nearest, shown
from loram_ray.utils.parsing import read_yaml
from loram_ray.utils.parsing.documents import broken_rule

_MISSING = "must be given; add it"
F = TypeVar("F", bound=Callable[..., Any])


class Loaded(NamedTuple):
    """Configuration of one command.

    Attributes:
        section: The command's section.
        ray: Settings of Ray.
        unread: Names of the run file's sections that the command does not read.
    """

    section: Any
    ray: RayConfig
    unread: list[str]


def load_run(config: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply overrides.

    Args:
        config: YAML file, or None to start from nothing.
        overrides: Overrides in the form ``dotted.key=value``. The value is taken literally if the
            key is text or a path, and parsed as YAML otherwise.

    Raises:
        LoramError: The file or an override cannot be read, or a value breaks a rule.
    """
    data = _settings(config, overrides)
    return validate(RunConfig, data, source=str(config) if config is not None else "--set")


def load_command(
    command: Command,
    config: Path | str | None,
    overrides: Sequence[str] = (),
    flags: Sequence[tuple[Flag, str]] = (),
) -> Loaded:
    """Read one command's configuration: options override ``--set``, which overrides a run file.

    A run file with a base and an output is validated as a whole, any other for this command alone.

    Args:
        command: The command.
        config: YAML file, or None to start from nothing.
        overrides: Overrides in the form ``dotted.key=value``, as for `load_run`.
        flags: Options with their values.

    Raises:
        LoramError: As for `load_run`; keys that were given as options are named as such.
    """
    name = command.name
    prefix = "" if name == "run" else f"{name}."
    data = _settings(config, overrides)
    unread = _unread(command, data)
    _require_distinct(flags)
    for flag, text in flags:
        apply_flag(data, flag, prefix, text)
    if name != "run" and (config is None or flags):
        data.setdefault(name, {})
    source = str(config) if config is not None else "--set" if overrides else None
    named = _with_options(prefix, [flag.present_key for flag, _ in flags], source)
    if name == "run":
        run = validate(RunConfig, data, "", named)
        return Loaded(run, run.ray, unread)
    if data.get("base") is not None and data.get("output") is not None:
        run = validate(RunConfig, data, "", named)
    else:
        filled, others = fill_paths(data), set(STAGES) - {name}
        part = {key: value for key, value in filled.items() if key not in others}
        run = validate(PartOfRun, part, "", named)
    return Loaded(section_of(run, name), run.ray, unread)


def _require_distinct(flags: Sequence[tuple[Flag, str]]) -> None:
    """Raise an error if a key was given under two names."""
    seen: dict[str, Flag] = {}
    for flag, text in flags:
        other = seen.setdefault(flag.present_key, flag)
        if other is not flag:
            raise LoramError(
                f"{flag.option} must not be given beside {other.option}, which is the same key, "
                f"got {shown(text)}; remove one of them"
            )


def _unread(command: Command, data: Mapping[str, Any]) -> list[str]:
    """Return the sections of a run file that a command unexpectedly does not read.

    A run file describes a pipeline, so the sections of other stages are not reported for a stage.
    """
    if command.name == "run":
        return []
    read = {command.name, *command.reads}
    if command.panel != STUDIES:
        read |= {other.name for other in COMMANDS if other.panel != STUDIES}
    if compares_run(data):
        read.add("compare")  # it describes the same pipeline, and its task
    return [name for name in STAGES if name in data and name not in read]


def _with_options(prefix: str, given: Sequence[str], source: str | None) -> Callable[[str], str]:
    """Return a function that words a broken rule, naming options or a key's source.

    Args:
        prefix: Prefix of the command's keys.
        given: Keys that were given as options.
        source: Source of the other keys; None if there are none.
    """

    def named(line: str) -> str:
        key, _, rest = line.partition(" ")
        own = key.startswith(prefix)
        option = option_of(key.removeprefix(prefix))
        if own and rest.startswith(_MISSING):
            if source is None:
                return f"{option} must be given; add it, or a run file with --config"
            return f"{source}: {key} must be given; add it to the config or pass {option}"
        inside = any(key == f"{prefix}{one}" or key.startswith(f"{prefix}{one}.") for one in given)
        if own and (inside or source is None):
            return f"{option} {rest}"
        return f"{source}: {line}" if source is not None else line

    return named


def _settings(config: Path | str | None, overrides: Sequence[str]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if config is not None:
        data = _present(_read_run(Path(config)), str(config))
    for override in overrides:
        apply_override(data, override)
    for stage in STAGES:
        if stage in data and data[stage] is None:  # "recover:" without keys requests the defaults
            data[stage] = {}
    return data


def _present(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a run file's settings with each key under its present name."""
    try:
        return with_present_names(RunConfig, data, source)
    except ValueError as error:
        raise LoramError(f"{source}: {error}") from error


def section_of(run: RunConfig | PartOfRun, stage: str) -> Any:
    """Return one stage's section.

    Raises:
        LoramError: The run file has no such section.
    """
    section = getattr(run, stage)
    if section is None:
        raise LoramError(f"{stage} must be a section of the config; add '{stage}:' to it")
    return section


def accepts_a_run(function: F) -> F:
    """Let a function ``stage(section, ray)`` accept a whole run too, for compatibility."""
    stage = function.__name__

    @functools.wraps(function)
    def call(config: Any, ray_config: RayConfig | None = None) -> Any:
        if isinstance(config, RunConfig):
            warnings.warn(
                f"{stage}(run) is deprecated; call {stage}(run.{stage}, run.ray)",
                FutureWarning,
                stacklevel=2,
            )
            config, ray_config = section_of(config, stage), ray_config or config.ray
        return function(config, ray_config)

    return cast(F, call)


def validate(
    model: type[Section],
    data: Mapping[str, Any],
    source: str,
    named: Callable[[str], str] | None = None,
) -> Any:
    """Validate a dictionary; raise an error with one clear line for each broken rule.

    Args:
        model: Section to validate against.
        data: Keys and values.
        source: Source of the data, for messages.
        named: Words a line, instead of prefixing it with the source.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(model, entry) for entry in _causes(error.errors())]
        raise LoramError(*(named(x) if named else f"{source}: {x}" for x in lines)) from error


def _causes(errors: Sequence[Any]) -> list[Any]:
    """Leave out errors that only follow from others.

    If ``base`` or ``output`` is invalid, sections lack paths derived from them. If an item of a
    list is invalid, the list is reported as too short. Of a list's invalid items, only the first is
    reported.
    """
    shared = [error for error in errors if error["loc"] in (("base",), ("output",))]
    if shared:
        return shared
    locations = [error["loc"] for error in errors]
    own = [
        error
        for error in errors
        if not any(
            len(other) > len(error["loc"]) and other[: len(error["loc"])] == error["loc"]
            for other in locations
        )
    ]
    first: dict[Any, Any] = {}
    for error in own:
        *inside, last = error["loc"] or ("",)
        first.setdefault((*inside, "item" if isinstance(last, int) else last), error)
    return list(first.values())


def _read_run(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "--config")
    if not isinstance(data, dict):
        raise LoramError(
            f"--config {path} must contain keys and values; see jobs/configs/demo.yaml"
        )
    return data


def _describe(model: type[BaseModel], error: Any) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location) or "the config"
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            known = _fields_at(model, location[:-1])
            return f"{key} is not a known key{nearest(str(location[-1]), known)}"
        case "missing":
            return f"{key} {_MISSING} to the config or pass --set {key}=…"
        case "value_error":
            text = str(
                error["ctx"]["error"]
            )  # only the text of a section's error begins with the key
            return (f"{key} " if text.startswith("must ") else f"{key}." if location else "") + text
        case "path_type":
            return f"{key} must be a path, got {shown(error['input'])}; change the value"
    return f"{key} {broken_rule(error)}; change the value"


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the field names of the section at a location, for suggestions."""
    current: type[BaseModel] = model
    by_kind: dict[str, type[Section]] = {}
    for part in location:
        if part in by_kind:  # in a list of several kinds, the kind follows the index
            current = by_kind[part]
        elif part in current.model_fields:
            inside = section_types(current.model_fields[part].annotation)
            current = inside[0] if inside else current
            by_kind = {kind_of(section): section for section in inside} if inside[1:] else {}
    return list(current.model_fields)
