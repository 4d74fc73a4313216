"""The run: all stages of one configuration in order, and the scores of the result."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_ray.artifacts.manifest import write_json
from loram_ray.artifacts.stage_directory import StageResult
from loram_ray.commands import command_of
from loram_ray.config import (
    CHAIN,
    AlignConfig,
    PruneConfig,
    RayConfig,
    RunConfig,
    Section,
    recovers_delta,
)
from loram_ray.errors import LoramError
from loram_ray.pruning.pool import threads_of
from loram_ray.runtime.cluster import ray_session
from loram_ray.runtime.progress import say

RESULTS_FILE = "results.json"
MAIN_SCORES = ("answer_perplexity", "text_perplexity", "exact_match")
"""Scores of an evaluation that tables show; those of benchmarks have names of their own."""


@dataclass(frozen=True)
class Step:
    """A step of a run: its name and the configuration of its stage."""

    name: str
    config: Section


@dataclass
class RunResult:
    """Result of a run.

    Attributes:
        output: Directory of the run.
        stages: Details of each step by name, with ``seconds`` and ``skipped``.
        rows: One row with the scores of LoRAM, or none without an evaluation.
    """

    output: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def run(config: RunConfig, ray_config: RayConfig | None = None) -> RunResult:
    """Run every configured stage, skipping complete stages and resuming interrupted ones.

    Raises:
        LoramError: As for the stages.
    """
    steps = plan_steps(config)
    if not steps:
        raise LoramError("the config must have at least one stage; add one, e.g. 'prune:'")
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
    result.rows = _rows(result.stages)
    write_json(config.output / RESULTS_FILE, {"stages": result.stages, "rows": result.rows})
    return result


def cpus_for_models(sections: Iterable[Section]) -> int:
    """Return the maximum number of logical CPUs that pruning and alignment use at a time."""
    return max([1, *map(_cpus_for, sections)])


def _cpus_for(section: Section) -> int:
    if isinstance(section, AlignConfig):
        return section.max_workers * section.cpus_per_worker
    if isinstance(section, PruneConfig) and section.calibration is not None:
        return section.calibration.workers * threads_of(section.calibration)
    return 1


def plan_steps(config: RunConfig) -> list[Step]:
    """Return the steps of a run in order."""
    _require_something_of_loram(config)
    sections = {name: getattr(config, name) for name in CHAIN}
    return [Step(name, section) for name, section in sections.items() if section is not None]


def _require_something_of_loram(config: RunConfig) -> None:
    """Raise an error if the evaluation would score a delta as an adapter, or only the base."""
    evaluate, recover = config.evaluate, config.recover
    if evaluate is None or recover is None or not recovers_delta(recover):
        return
    untouched = evaluate.adapter is None and evaluate.model == config.base
    if untouched or evaluate.adapter == recover.output:
        raise LoramError(
            "evaluate must score the merged model if recover.form is delta; add 'merge:' and "
            "remove evaluate.model and evaluate.adapter"
        )


def _summary(name: str, stage: StageResult, seconds: float) -> str:
    if stage.skipped:
        return f"{name}: already complete, skipped ({stage.output})"
    return f"{name}: done in {seconds:.0f} s ({stage.output})"


def _rows(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of LoRAM's scores, if the run evaluates."""
    if "evaluate" not in stages:
        return []
    scores = stages["evaluate"]["details"]
    training = stages["train"]["details"] if "train" in stages else {}
    return [
        {
            "name": "LoRAM",
            **{key: scores[key] for key in MAIN_SCORES if key in scores},
            "trained_parameters": training.get("trained_parameters"),
            "model_parameters": training.get("model_parameters", scores["model_parameters"]),
            "model_bytes": training.get("model_bytes", scores["model_bytes"]),
            "train_seconds": training.get("seconds"),
        }
    ]
