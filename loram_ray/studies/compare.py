"""Run a comparison: its steps in dependency order, and the table of all systems."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa

from loram_ray.artifacts.manifest import write_json
from loram_ray.artifacts.stage_directory import StageResult
from loram_ray.commands import command_of
from loram_ray.config import CompareConfig, RayConfig, accepts_a_run
from loram_ray.errors import LoramError
from loram_ray.evaluation.uncertainty import gain_kept, goodness
from loram_ray.runtime.cluster import ray_session
from loram_ray.runtime.progress import say
from loram_ray.runtime.results import write_results
from loram_ray.stages.run import cpus_for_models
from loram_ray.studies.claims import (
    CLAIMS_FILE,
    Verdict,
    claims_about,
    mean_and_deviation,
    verdict,
)
from loram_ray.studies.comparison_table import NAMES, as_markdown
from loram_ray.studies.scores import (
    SCORES_FILE,
    Score,
    read_scores,
    scores_of,
    with_others,
    write_scores,
)
from loram_ray.studies.steps import Cell, Comparison, Step
from loram_ray.studies.systems import comparison_of
from loram_ray.utils.files import make_directory, write_atomic

PAGE_FILE = "comparison.md"
_Group = tuple[str, str | None, float | None, str]
"""System, method, ratio and task."""


@dataclass(frozen=True)
class ComparisonResult:
    """Result of a comparison.

    Attributes:
        output: Output directory.
        rows: One row per system, method, ratio and task, with mean and deviation over seeds.
        claims: Verdict on each claim, by method and ratio.
        failed: Reasons of failed steps, by name.
    """

    output: Path
    rows: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    failed: dict[str, str]


@accepts_a_run
def compare(config: CompareConfig, ray_config: RayConfig | None = None) -> ComparisonResult:
    """Compare LoRAM's variants with the base, LoRA on the base, and the pruned model.

    Shared stages run once. Complete stages are skipped, so a long comparison can run in parts. A
    failed step is reported, and only the steps that need it are left out. The output contains
    ``results.json``, ``results.parquet``, ``claims.json`` and ``comparison.md``, and
    ``scores.json`` with each individual score, for comparisons with other seeds (``merge_scores``).

    Raises:
        LoramError: If a section is missing or invalid, or nothing could be scored.
    """
    planned = comparison_of(config)
    others = read_scores(config.merge_scores, config.metric, planned.cells)
    make_directory(config.output, "compare.output")
    say("compare", f"{len(planned.steps)} stages, {len(planned.cells)} scores")
    sections = [step.config for step in planned.steps.values()]
    with ray_session(ray_config or RayConfig(), cpus_for_models(sections)):
        done, failed = run_steps(
            planned.steps,
            lambda step: command_of(step.config)(step.config, ray_config),
            config.max_concurrent,
        )
    scored = [cell for cell in planned.cells if cell.evaluation in done]
    if not scored:
        name, reason = next(iter(failed.items()))
        raise LoramError(f"compare: no system could be scored; {name}: {reason}")
    _require_metric(config.metric, scored, done)
    own = scores_of(scored, done, config.metric)
    write_scores(config.output / SCORES_FILE, own, config.metric)
    scores = with_others(own, others)
    rows = rows_of(scores, config.metric)
    rows += [_not_done(cell, planned, failed) for cell in planned.cells if cell not in scored]
    claims = claims_of(scores, config.metric)
    write_results(config.output, rows, _columns(rows))
    write_json(config.output / CLAIMS_FILE, claims)
    write_atomic(config.output / PAGE_FILE, as_markdown(rows, claims, config.metric))
    return ComparisonResult(config.output, rows, claims, failed)


def run_steps(
    steps: Mapping[str, Step], do: Callable[[Step], StageResult], max_concurrent: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run steps in dependency order; a failure affects only the steps that depend on it.

    An interrupt does not wait for running steps: they continue in daemon threads until the process
    ends, and resume at the next call.

    Args:
        steps: Steps by name.
        do: Function that runs a step.
        max_concurrent: Maximum number of concurrent steps.

    Returns:
        The manifest details of completed steps, and the reasons of failed ones, by name.
    """
    # Concurrent first imports from Transformers' lazy package can see it half initialised.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    waiting = dict(steps)
    running: set[str] = set()
    ended: SimpleQueue[tuple[str, Future[StageResult], float]] = SimpleQueue()

    def run(name: str) -> None:
        began, result = time.monotonic(), Future[StageResult]()
        try:
            result.set_result(do(steps[name]))
        except BaseException as error:
            result.set_exception(error)
        ended.put((name, result, time.monotonic() - began))

    while waiting or running:
        for name in list(waiting):
            needs = waiting[name].needs
            if lost := [need for need in needs if need in failed]:
                failed[name] = f"requires {lost[0]}, which failed"
                del waiting[name]
            elif all(need in done for need in needs) and len(running) < max_concurrent:
                del waiting[name]
                running.add(name)
                threading.Thread(target=run, args=(name,), daemon=True).start()
        with suppress(Empty):
            name, result, seconds = ended.get(timeout=0.5)  # wake up for interrupts
            running.remove(name)
            _keep(name, result, seconds, done, failed)
            say("compare", f"{len(done) + len(failed)}/{len(steps)} {name}: "
                f"{failed.get(name) or done[name]['status']}")  # fmt: skip
    return done, failed


def _keep(
    name: str,
    ended: Future[StageResult],
    seconds: float,
    done: dict[str, dict[str, Any]],
    failed: dict[str, str],
) -> None:
    try:
        result = ended.result()
    except (LoramError, OSError) as error:
        failed[name] = str(error)
        return
    status = "already complete" if result.skipped else f"{seconds:.0f} s"
    done[name] = {**result.manifest.details, "status": status}


def _require_metric(
    metric: str, scored: Sequence[Cell], done: Mapping[str, dict[str, Any]]
) -> None:
    details = done[scored[0].evaluation]
    if metric not in details:
        known = [k for k, v in details.items() if isinstance(v, float) and "stderr" not in k]
        raise LoramError(
            f"compare.metric must be one of {', '.join(known)}, got {metric}; change it"
        )


def rows_of(scores: Sequence[Score], metric: str) -> list[dict[str, Any]]:
    """Return one row per system, method, ratio and task, over seeds.

    Args:
        scores: Scores; the share of gain kept needs those of the base and of full LoRA.
        metric: Metric of the scores.
    """
    base = {score.task: score.value for score in scores if score.system == "base"}
    full = {(score.task, score.seed): score.value for score in scores if score.system == "full"}
    grouped: dict[_Group, list[Score]] = {}
    for score in scores:
        grouped.setdefault((score.system, score.method, score.ratio, score.task), []).append(score)
    rows = []
    for (system, method, ratio, task), group in grouped.items():
        mean, deviation = mean_and_deviation([score.value for score in group])
        kept = [
            share
            for score in group
            if task in base and (of_full := full.get((task, score.seed))) is not None
            if (share := gain_kept(metric, base[task], score.value, of_full)) is not None
        ]
        kept_mean, kept_deviation = mean_and_deviation(kept) if kept else (None, None)
        rows.append(
            {
                "system": system,
                "method": method,
                "ratio": ratio,
                "task": task,
                "seeds": len(group),
                "metric": metric,
                "mean": mean,
                "deviation": deviation,
                "gain_kept": kept_mean,
                "gain_kept_deviation": kept_deviation,
                "other_scores": _mean_scores(group),
                "trained_parameters": group[0].trained_parameters,
                "model_parameters": group[0].model_parameters,
                "model_bytes": group[0].model_bytes,
                "train_seconds": group[0].train_seconds,
                "reason": "",
            }
        )
    return rows


def _mean_scores(group: Sequence[Score]) -> dict[str, float]:
    """Return the means of the other main scores that all scores of a group have."""
    return {
        name: statistics.fmean(score.other_scores[name] for score in group)
        for name in group[0].other_scores
        if all(name in score.other_scores for score in group)
    }


def _not_done(cell: Cell, planned: Comparison, failed: Mapping[str, str]) -> dict[str, Any]:
    """Return the row of a missing score, with the root cause."""
    name, reason = cell.evaluation, failed[cell.evaluation]
    while lost := [need for need in planned.steps[name].needs if need in failed]:
        name, reason = lost[0], failed[lost[0]]
    empty = dict.fromkeys(_columns(rows=()))
    return {
        **empty,
        "other_scores": {},
        "system": cell.system,
        "method": cell.method,
        "ratio": cell.ratio,
        "task": cell.task,
        "seeds": 0,
        "reason": f"{name}: {reason}",
    }


def claims_of(scores: Sequence[Score], metric: str) -> list[dict[str, Any]]:
    """Return the verdict on each claim for each method and ratio, over tasks and seeds."""
    seeds = sorted({score.seed for score in scores if score.seed is not None})
    pruned: list[tuple[str | None, float | None]] = sorted(
        {(score.method, score.ratio) for score in scores if score.method is not None}
    ) or [(None, None)]
    found = []
    for method, ratio in pruned:
        of_system: dict[str, dict[tuple[str, int], float]] = {}
        for score in scores:
            if score.method is None or (score.method, score.ratio) == (method, ratio):
                value = goodness(metric, score.value)
                for seed in [score.seed] if score.seed is not None else seeds:
                    of_system.setdefault(score.system, {})[score.task, seed] = value
        for tested in _verdicts(of_system):
            found.append(
                {
                    "claim": tested.claim.says,
                    "better": tested.claim.better,
                    "worse": tested.claim.worse,
                    "paper": tested.claim.paper,
                    "method": method,
                    "ratio": ratio,
                    "seen": tested.seen,
                    "difference": tested.difference,
                    "interval": tested.interval,
                    "pairs": tested.pairs,
                }
            )
    return found


def _verdicts(of_system: Mapping[str, Mapping[tuple[str, int], float]]) -> Iterator[Verdict]:
    named = dict.fromkeys(system.partition(" ")[0] for system in of_system)
    for claim in claims_about(name for name in named if name not in NAMES):
        better, worse = of_system.get(claim.better, {}), of_system.get(claim.worse, {})
        if better.keys() & worse.keys():
            yield verdict(claim, better, worse)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    others = dict.fromkeys(name for row in rows for name in row["other_scores"])
    return {
        "system": text,
        "method": text,
        "ratio": real,
        "task": text,
        "seeds": whole,
        "metric": text,
        "mean": real,
        "deviation": real,
        "gain_kept": real,
        "gain_kept_deviation": real,
        **{f"other_scores.{name}": real for name in others},
        "trained_parameters": whole,
        "model_parameters": whole,
        "model_bytes": whole,
        "train_seconds": real,
        "reason": text,
    }
