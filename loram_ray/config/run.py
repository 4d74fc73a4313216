"""The run file: a section for each stage, and the paths between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from loram_ray.config.align import AlignConfig
from loram_ray.config.base import RayConfig, Section
from loram_ray.config.batch import BatchConfig
from loram_ray.config.compare import CompareConfig
from loram_ray.config.evaluate import EvaluateConfig
from loram_ray.config.finetune import MergeConfig, RecoverConfig
from loram_ray.config.prune import PruneConfig
from loram_ray.config.publish import ExportConfig, PublishConfig, QuantizeConfig
from loram_ray.config.sweep import SweepConfig
from loram_ray.config.train import TrainConfig

STAGES: dict[str, type[Section]] = {
    "prune": PruneConfig,
    "align": AlignConfig,
    "train": TrainConfig,
    "batch": BatchConfig,
    "sweep": SweepConfig,
    "recover": RecoverConfig,
    "merge": MergeConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "quantize": QuantizeConfig,
    "publish": PublishConfig,
}


class RunConfig(Section):
    """run: the sections of all stages, and what they share."""

    base: str = Field(
        min_length=1, description="base model: a directory of safetensors or a hub id"
    )
    output: Path = Field(description="directory of the whole run")
    ray: RayConfig = RayConfig()
    prune: PruneConfig | None = None
    align: AlignConfig | None = None
    train: TrainConfig | None = None
    batch: BatchConfig | None = None
    sweep: SweepConfig | None = None
    recover: RecoverConfig | None = None
    merge: MergeConfig | None = None
    evaluate: EvaluateConfig | None = None
    compare: CompareConfig | None = None
    export: ExportConfig | None = None
    quantize: QuantizeConfig | None = None
    publish: PublishConfig | None = None
    baselines: bool = Field(
        False,
        description="also train without alignment and on the full base, and evaluate each",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_paths(cls, data: Any) -> Any:
        return fill_paths(data) if isinstance(data, dict) else data


def fill_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """Give each section the paths that follow from the run's base, output and other sections."""
    filled = dict(data)
    if not isinstance(filled.get("base"), str) or not isinstance(filled.get("output"), str | Path):
        return filled
    base, root = filled["base"], Path(filled["output"])

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
        loram = {"model": str(merged)}  # a delta is no adapter
    train = filled.get("train")
    template = dict(train).get("chat_template") if isinstance(train, Section | Mapping) else None
    if isinstance(template, str | Path):
        loram["chat_template"] = template
    learnt, held_out = _first_task(filled.get("compare"))
    derived: dict[str, dict[str, Any]] = {
        "prune": {"base": base, "output": pruned},
        "align": {"base": base, "pruned": pruned, "output": aligned},
        "train": {"model": small, "output": pruned_adapter, **learnt},
        "batch": {"model": small, "base": base, "output": root / "batch"},
        "sweep": {"model": small, "base": base, "output": root / "sweep"},
        "recover": {"adapter": pruned_adapter, "base": base, "output": adapter},
        "merge": {"base": base, "adapter": adapter, "output": merged},
        "evaluate": {**loram, "output": root / "evaluation" / "loram", **held_out},
        "compare": {"output": root / "comparison"},
        "export": {"model": str(merged), "output": root / "gguf"},
        "quantize": {"model": small, "output": quantized, "base": base},
        "publish": {
            "directory": small if filled.get("quantize") is None else quantized,
            "base": base,
        },
    }
    for name, paths in derived.items():
        section = filled.get(name)
        if isinstance(section, Mapping):
            filled[name] = {**paths, **section}
    return filled


def _first_task(compare: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data of the first task that is compared, for train and for evaluate; empty without one."""
    section = dict(compare) if isinstance(compare, Section | Mapping) else {}
    tasks = section.get("tasks")
    task = next(iter(tasks.values()), None) if isinstance(tasks, Mapping) and tasks else None
    given = dict(task) if isinstance(task, Section | Mapping) else {}
    names = (("data", "data"), ("held_out", "data"))
    learnt, held_out = ({to: given[key]} if key in given else {} for key, to in names)
    return learnt, held_out


def recovers_delta(recover: Any) -> bool:
    """Whether a ``recover`` section, validated or not, writes a delta."""
    section = dict(recover) if isinstance(recover, Section | Mapping) else {}
    return section.get("form") == "delta"
