"""The run: all stages of one configuration in order, and a comparison of the results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_ray.artifacts.manifest import write_json
from loram_ray.artifacts.stage_directory import StageResult
from loram_ray.commands import command_of
from loram_ray.config import (
    AlignConfig,
    EvaluateConfig,
    MergeConfig,
    PruneConfig,
    RayConfig,
    RunConfig,
    Section,
    recovers_delta,
)
from loram_ray.errors import LoramError
from loram_ray.evaluation.uncertainty import gain_kept
from loram_ray.pruning.pool import threads_of
from loram_ray.runtime.cluster import ray_session
from loram_ray.runtime.progress import say

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Step:
    """A step of a run: its name and the configuration of its stage."""

    name: str
    config: Section


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    Attributes:
        name: Name of the compared model.
        evaluation: Name of the step that scored it.
        training: Name of the step that trained its adapter, or None.
    """

    name: str
    evaluation: str
    training: str | None = None


@dataclass
class RunResult:
    """Result of a run.

    Attributes:
        output: Directory of the run.
        stages: Details of each step by name, with ``seconds`` and ``skipped``.
        rows: Rows of the comparison.
    """

    output: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(config: RunConfig, ray_config: RayConfig | None = None) -> RunResult:
    """Run every configured stage, skipping complete stages and resuming interrupted ones.

    Raises:
        LoramError: As for the stages.
    """
    steps, rows = plan_steps(config)
    if not steps:
        raise LoramError("the config must have at least one stage; add 'prune:' to it")
    result = RunResult(config.output)
    ray = ray_config or config.ray
    with ray_session(ray, cpus_for_models([step.config for step in steps])):
        for number, step in enumerate(steps, start=1):
            say("run", f"[{number}/{len(steps)}] {step.name}")
            started = time.perf_counter()
            stage = command_of(step.config)(step.config, ray)
            seconds = time.perf_counter() - started
            say("run", _summary(step.name, stage, seconds))
            result.stages[step.name] = {
                "output": str(stage.output),
                "skipped": stage.skipped,
                "seconds": seconds,
                "details": stage.manifest.details,
            }
    result.rows = [_row(row, result.stages) for row in rows]
    write_json(config.output / RESULTS_FILE, {"stages": result.stages, "rows": result.rows})
    return result


def cpus_for_models(sections: Iterable[Section]) -> int:
    """Return the maximum number of logical CPUs that pruning and alignment use at a time."""
    return max([1, *map(_cpus_for, sections)])


def _cpus_for(section: Section) -> int:
    if isinstance(section, AlignConfig):
        return section.actors * section.cpus_per_worker
    if isinstance(section, PruneConfig) and section.calibration is not None:
        return section.calibration.workers * threads_of(section.calibration)
    return 1


def plan_steps(config: RunConfig) -> tuple[list[Step], list[Row]]:
    """Return the steps of a run in order, and the comparison made from them."""
    steps = [
        Step(name, section)
        for name in ("prune", "align", "train", "recover", "merge")
        if (section := getattr(config, name)) is not None
    ]
    rows: list[Row] = []
    _require_something_of_loram(config)
    if config.baselines:
        steps += list(_comparison_trainings(config))
    if config.evaluate is not None:
        for row, evaluation in _evaluations(config, config.evaluate):
            steps.append(Step(row.evaluation, evaluation))
            rows.append(row)
    return steps, rows


def _require_something_of_loram(config: RunConfig) -> None:
    """Raise an error if the evaluation would score a delta as an adapter, or only the base."""
    evaluate, recover = config.evaluate, config.recover
    if evaluate is None or recover is None or not recovers_delta(recover):
        return
    untouched = evaluate.adapter is None and evaluate.model == config.base
    if untouched or evaluate.adapter == recover.output:
        raise LoramError(
            "evaluate must score the merged model where recover.form is delta; add 'merge:' and "
            "leave evaluate.model and evaluate.adapter out"
        )


def _comparison_trainings(config: RunConfig) -> Iterator[Step]:
    """Yield steps to train LoRAM without alignment and LoRA on the full base, on the same data."""
    if config.train is None or config.prune is None or config.recover is None:
        raise LoramError("baselines needs the sections prune, train and recover; add them")
    root = config.output / "baselines"
    if config.align is not None:
        unaligned = {"model": config.prune.output, "output": root / "adapter_pruned_unaligned"}
        yield Step("train without alignment", config.train.model_copy(update=unaligned))
        recovered = {
            "adapter": unaligned["output"],
            "model": unaligned["model"],
            "output": root / "adapter_unaligned",
        }
        yield Step("recover without alignment", config.recover.model_copy(update=recovered))
        if recovers_delta(config.recover):
            merging = MergeConfig(
                base=config.base, adapter=recovered["output"], output=root / "merged_unaligned"
            )
            yield Step("merge without alignment", merging)
    full = {"model": Path(config.base), "output": root / "adapter_full"}
    yield Step("train on the full base", config.train.model_copy(update=full))


def _evaluations(
    config: RunConfig, evaluate: EvaluateConfig
) -> Iterator[tuple[Row, EvaluateConfig]]:
    root = config.output / "evaluation"

    def scored(
        name: str, folder: str, model: str | Path, adapter: Path | None, training: str | None
    ) -> tuple[Row, EvaluateConfig]:
        update = {"model": str(model), "adapter": adapter, "output": root / folder}
        row = Row(name, f"evaluate {name}", training)
        return row, evaluate.model_copy(update=update)

    if config.baselines:
        compared = config.output / "baselines"
        assert config.prune is not None
        yield scored("full base, untouched", "base", config.base, None, None)
        yield scored("pruned model, as it is", "pruned", config.prune.output, None, None)
        if config.align is not None:
            unaligned: tuple[str | Path, Path | None] = (
                (compared / "merged_unaligned", None)
                if recovers_delta(config.recover)
                else (config.base, compared / "adapter_unaligned")
            )
            training = "train without alignment"
            yield scored("LoRAM without alignment", "unaligned", *unaligned, training)
    yield (
        Row("LoRAM", "evaluate LoRAM", "train" if config.train else None),
        evaluate,
    )
    if config.baselines:
        yield scored(
            "LoRA on the full base",
            "full",
            config.base,
            compared / "adapter_full",
            "train on the full base",
        )


def _summary(name: str, stage: StageResult, seconds: float) -> str:
    if stage.skipped:
        return f"{name}: complete before, skipped ({stage.output})"
    return f"{name}: done in {seconds:.0f} s ({stage.output})"


def _row(row: Row, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the comparison from the steps' results."""
    scores = stages[row.evaluation]["details"]
    training = stages[row.training]["details"] if row.training else {}
    return {
        "name": row.name,
        **{
            key: scores[key]
            for key in ("answer_perplexity", "text_perplexity", "exact_match")
            if key in scores
        },
        "trained_parameters": training.get("trained_parameters"),
        "model_parameters": training.get("model_parameters", scores["model_parameters"]),
        "model_bytes": training.get("model_bytes", scores["model_bytes"]),
        "train_seconds": training.get("seconds"),
    }


def loram_keeps(rows: list[dict[str, Any]], metric: str = "answer_perplexity") -> float | None:
    """Return LoRAM's gain over the untouched base as a share of full LoRA's gain.

    None if a row is missing or full LoRA gained nothing.
    """
    found = {row["name"]: row.get(metric) for row in rows}
    base, loram = found.get("full base, untouched"), found.get("LoRAM")
    full = found.get("LoRA on the full base")
    if base is None or loram is None or full is None:
        return None
    return gain_kept(metric, base, loram, full)
