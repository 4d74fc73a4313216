"""The run file: a section for each stage, and the paths that connect them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model, model_validator

from loram_ray.commands import COMMAND_OF, SECTIONS_OF_A_RUN
from loram_ray.config.aliases import RenamedKeyWarning
from loram_ray.config.base import RayConfig, Section, merge_settings
from loram_ray.config.marks import KeysOf

STAGES: dict[str, type[Section]] = {name: COMMAND_OF[name].model for name in SECTIONS_OF_A_RUN}
"""The sections of a run file."""

CHAIN = ("prune", "align", "train", "recover", "merge", "evaluate")
"""The stages of ``loram run``, in order."""

if TYPE_CHECKING:

    class _Sections(Section):
        """A section for each command, or None."""

        def __getattr__(self, name: str) -> Any: ...

else:
    _Sections = create_model(
        "_Sections",
        __base__=Section,
        **{name: (section | None, None) for name, section in STAGES.items()},
    )


class _Settings(_Sections):
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_paths(cls, data: Any) -> Any:
        return fill_paths(_without_baselines(data)) if isinstance(data, dict) else data


class RunConfig(_Settings):
    """run: Run all stages of a run file in order; skip complete ones, resume interrupted ones."""

    base: str = Field(
        min_length=1,
        description="Base model: a directory with safetensors files or a Hugging Face Hub id.",
    )
    output: Path = Field(description="Directory of the whole run.")


class PartOfRun(_Settings):
    """The part of a run file that one command reads, if the file is not a whole run."""

    base: str | None = None
    output: Path | None = None


def _without_baselines(data: dict[str, Any]) -> dict[str, Any]:
    """Return a run file without the key that asked for a comparison, which is a command now."""
    if "baselines" not in data:
        return data
    if data["baselines"] is not False:
        raise ValueError(
            "baselines must be left out, as comparing is a command now, got "
            f"{str(data['baselines']).lower():.40}; remove it and run loram compare --config FILE, "
            "see docs/how-to/compare.md"
        )
    warnings.warn("baselines was removed from run files; remove it", RenamedKeyWarning, 2)
    return {key: value for key, value in data.items() if key != "baselines"}


def fill_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in each section's defaults that depend on the rest of the run file.

    These are paths derived from the run's base, output and other sections, and settings of other
    sections that a command reads.
    """
    filled = dict(data)
    base = given if isinstance(given := filled.get("base"), str) else None
    root = Path(given) if isinstance(given := filled.get("output"), str | Path) else None
    special = {} if root is None else _special_paths(filled, base, root)
    for name, model in STAGES.items():
        paths = {"base": base, "output": root and root / name, **special.get(name, {})}
        if isinstance(section := filled.get(name), Mapping):
            known = {k: v for k, v in paths.items() if k in model.model_fields and v is not None}
            filled[name] = {**known, **section}
    for name, model in STAGES.items():
        if COMMAND_OF[name].reads and isinstance(filled.get(name), Section | Mapping):
            filled[name] = _with_shared(filled[name], model, filled)
    if root is not None and base is not None:
        _give_run(filled)
    return filled


def _give_run(filled: dict[str, Any]) -> None:
    """Give the comparison the sections of the run whose stages it shares."""
    if compares_run(filled):
        given = {name: _given(filled[name]) for name in CHAIN if filled.get(name) is not None}
        filled["compare"] = {"run": given, **filled["compare"]}


def compares_run(run: Mapping[str, Any]) -> bool:
    """Return whether the comparison of a run file has the system that shares the run's stages."""
    compare = run.get("compare")
    systems = compare.get("systems") if isinstance(compare, Mapping) else None
    return isinstance(systems, list | tuple) and "loram" in systems


def _with_shared(
    section: Section | Mapping[str, Any], model: type[Section], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a section's settings, merged over those shared with other sections of the run."""
    given = _given(section)
    for key, field in model.model_fields.items():
        mark = next((mark for mark in field.metadata if isinstance(mark, KeysOf)), None)
        if mark is None or key != mark.stage or run.get(key) is None:
            continue
        shared = _given(run[key])
        own = given.get(key)
        if own is None or isinstance(own, Mapping):
            kept = {name: value for name, value in shared.items() if name not in mark.without}
            given[key] = merge_settings(kept, own or {})
    return given


def _given(section: Any) -> dict[str, Any]:
    """Return the values that were given to a section, validated or not."""
    if isinstance(section, Section):
        return {key: _plain(getattr(section, key)) for key in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else {}


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _special_paths(
    filled: Mapping[str, Any], base: str | None, root: Path
) -> dict[str, dict[str, Any]]:
    """Return the paths of each section, except ``base`` and directories with the section's name."""

    def output(stage: str, folder: str) -> Path:
        section = filled.get(stage)
        if isinstance(section, Section):
            section = dict(section)
        given = section.get("output") if isinstance(section, Mapping) else None
        return Path(given) if isinstance(given, str | Path) else root / folder

    pruned, aligned = output("prune", "pruned"), output("align", "aligned")
    pruned_adapter, adapter = output("train", "adapter_pruned"), output("recover", "adapter")
    merged, quantized = output("merge", "merged"), output("quantize", "quantized")
    small = pruned if filled.get("align") is None else aligned
    loram: dict[str, Any] = {"model": base, "adapter": adapter}
    if filled.get("merge") is not None and recovers_delta(filled.get("recover")):
        loram = {"model": str(merged)}  # a delta is not an adapter
    train = filled.get("train")
    template = dict(train).get("chat_template") if isinstance(train, Section | Mapping) else None
    if isinstance(template, str | Path):
        loram["chat_template"] = template
    learnt, held_out = _first_task(filled)
    return {
        "prune": {"output": pruned},
        "align": {"pruned": pruned, "output": aligned},
        "train": {"model": small, "output": pruned_adapter, **learnt},
        "batch": {"model": small},
        "sweep": {"model": small, "models_dir": root / "models"},
        "recover": {"adapter": pruned_adapter, "output": adapter},
        "merge": {"adapter": adapter, "output": merged},
        "evaluate": {**loram, "output": root / "evaluation" / "loram", **held_out},
        "compare": {"output": root / "comparison"},
        "export": {"model": str(merged), "output": root / "gguf"},
        "quantize": {"model": small, "output": quantized},
        "publish": {"directory": small if filled.get("quantize") is None else quantized},
    }


def _first_task(run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data of the first task of compare, sweep or batch, for train and for evaluate."""
    tasks = _given(run.get("compare")).get("tasks")
    if isinstance(tasks, Mapping) and tasks:
        task = _given(next(iter(tasks.values())))
    elif "data" in (sweep := _given(run.get("sweep"))):
        task = {"data": sweep["data"]}
    else:
        several = _given(run.get("batch")).get("tasks")
        task = _given(several[0]) if isinstance(several, list | tuple) and several else {}
    names = (("data", "data"), ("held_out", "data"))
    learnt, held_out = ({to: task[key]} if key in task else {} for key, to in names)
    return learnt, held_out


def recovers_delta(recover: Any) -> bool:
    """Return whether a ``recover`` section, validated or not, writes a delta."""
    section = dict(recover) if isinstance(recover, Section | Mapping) else {}
    return section.get("form") == "delta"
