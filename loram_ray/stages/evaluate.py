"""The evaluate stage: scores a model, with or without an adapter, on held-out data."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loram_ray.artifacts.adapter import CONFIG_FILE, content_digest, require_readable
from loram_ray.artifacts.manifest import (
    digest_of,
    hash_file,
    read_manifest,
    require_stage,
    write_json,
)
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import EvaluateConfig, RayConfig, TextConfig
from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.read import identify
from loram_ray.corpus.rows import identify_rows
from loram_ray.errors import LoramError
from loram_ray.evaluation.benchmark import Found, Scores
from loram_ray.evaluation.benchmarks import name_of
from loram_ray.evaluation.scoring import Plan, Scorer, tokenizer_of
from loram_ray.evaluation.traits import settings_of_reading
from loram_ray.models.base import BaseModel
from loram_ray.models.tokenizer import read_template
from loram_ray.plan import PruningPlan
from loram_ray.recovery.deltas import is_delta
from loram_ray.runtime.actors import Actors
from loram_ray.runtime.cluster import (
    advise_precision,
    gpus_per_worker,
    ray_session,
    require_resources,
)
from loram_ray.runtime.progress import METRICS_FILE, Reporter, last_line, read_lines
from loram_ray.runtime.schedule import Outcome, Schedule, run_tasks
from loram_ray.utils.names import slug
from loram_ray.utils.parsing.documents import as_type, read_as

SCORES_FILE, ITEMS = "scores.json", "items"
_RECORD_FILE, _HARNESS_FILE = "batches.jsonl", "lm_eval.json"
_HARNESS = "lm-eval"


def evaluate(config: EvaluateConfig, ray_config: RayConfig | None = None) -> StageResult:
    """Score a base, pruned, aligned or merged model, with or without an adapter.

    Writes ``scores.json``: ``answer_perplexity`` and ``exact_match`` if there is ``data``,
    ``text_perplexity`` if there is ``text``, and ``NAME/SCORE`` of each benchmark, each with its
    standard error as ``..._stderr``. The results of single items are written to ``items``. Batches
    are distributed over actors; batches scored before an interruption are not scored again.

    Raises:
        LoramError: The adapter is not for the model, or there is no usable data.
    """
    opened = BaseModel.open(config.model, "evaluate.model")
    model_digest, base_fingerprint = opened.identify()
    model = opened.directory
    parents = {"model": model_digest, "data": _data_digest(config)}
    if config.adapter is not None:
        parents["adapter"] = _adapter_digest(config.adapter, model, model_digest, base_fingerprint)
    if config.chat_template is not None:
        template = read_template(config.chat_template, "evaluate.chat_template")
        parents["chat_template"] = digest_of(template)
    tokenizer = tokenizer_of(config.model_copy(update={"model": str(model)}))
    return run_stage(
        config.output,
        "evaluate",
        settings={**_settings(config), **settings_of_reading(config, model, tokenizer)},
        parents=parents,
        base_fingerprint=base_fingerprint,
        write=lambda target: _write(target, config, model, ray_config or RayConfig()),
        reads=(config.model, config.adapter, config.data),
    )


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return the settings that determine the result; data is identified by content, not by path."""
    settings = config.identity()
    for benchmark, given in zip(config.benchmarks, settings["benchmarks"], strict=True):
        given["name"] = name_of(benchmark)
    return settings


def _data_digest(config: EvaluateConfig) -> str:
    parts: list[Any] = []

    def add(data: str | None, text: TextConfig | None, key: str) -> None:
        if data is not None:
            parts.extend(identify_rows(f) for f in list_files(data, f"{key}data", EXAMPLES))
        if text is not None:
            parts.extend([identify(text.sources, f"{key}text.sources"), text.sequence_length])

    add(config.data, config.text, "evaluate.")
    for number, benchmark in enumerate(config.benchmarks):
        key = f"evaluate.benchmarks.{number}."
        add(getattr(benchmark, "data", None), getattr(benchmark, "text", None), key)
        add(getattr(benchmark, "shots_from", None), None, f"{key}shots_from of ")
    if config.lm_eval is not None and (folder := config.lm_eval.include_path) is not None:
        files = _files_of_tasks(folder, config.output)
        parts.extend([str(path.relative_to(folder)), hash_file(path)] for path in files)
    return digest_of(parts)


def _files_of_tasks(folder: Path, output: Path) -> list[Path]:
    """Return the sorted files of lm-eval's tasks in a folder: YAML, Python and files these name.

    Other files in the folder are ignored, as a run may add results and compiled Python.
    """
    output = output.resolve()
    inside = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.resolve().is_relative_to(output)
    ]
    tasks = [path for path in inside if path.suffix in (".yaml", ".py")]
    text = "\n".join(path.read_text(errors="replace") for path in tasks)
    return [path for path in inside if path in tasks or path.name in text]


def _adapter_digest(adapter: Path, model: Path, model_digest: str, base: str) -> str:
    """Return an adapter's digest; raise an error if it was made for another model."""
    if is_delta(adapter):
        raise LoramError(
            f"evaluate.adapter must be a PEFT adapter directory, but {adapter} contains a dense "
            "delta; run loram merge and evaluate the merged model"
        )
    if not (adapter / CONFIG_FILE).exists():
        raise LoramError(
            f"evaluate.adapter must be a PEFT adapter directory, but {adapter} contains no "
            f"{CONFIG_FILE}; run loram train or loram recover first"
        )
    require_readable(adapter, "evaluate.adapter")
    if read_manifest(adapter) is None:
        return content_digest(adapter)
    manifest = require_stage(adapter, ("train", "recover"), "evaluate.adapter")
    if manifest.base_fingerprint != base:
        raise LoramError(
            f"evaluate.adapter must belong to evaluate.model's base, but {adapter} is for base "
            f"{manifest.base_fingerprint[:12]} and {model} has base {base[:12]}; use the adapter's "
            "own base"
        )
    of_model, of_adapter = PruningPlan.load_if_any(model), PruningPlan.load_if_any(adapter)
    if (of_model is None) != (of_adapter is None):
        remedy = "evaluate it on its base" if of_adapter is None else "run loram recover first"
        raise LoramError(
            f"evaluate.adapter must match evaluate.model, but {adapter} is not for "
            f"{model}; {remedy}"
        )
    if of_model is not None and of_adapter is not None and of_model.digest != of_adapter.digest:
        raise LoramError(
            f"evaluate.adapter must have the pruning plan of evaluate.model, but {adapter} was "
            f"trained with another one than {model}'s; use the pruned model it was trained on"
        )
    return manifest.digest


def _write(
    target: StageDirectory, config: EvaluateConfig, model: Path, ray_config: RayConfig
) -> None:
    plan = Plan(config.model_copy(update={"model": str(model)}))
    absolute = config.model_copy(
        update={
            "model": str(model.resolve()),
            "adapter": config.adapter.resolve() if config.adapter else None,
            "chat_template": config.chat_template and config.chat_template.resolve(),
        }
    )
    record = _Record(target.work / _RECORD_FILE)
    waiting = {str(b.number): b for b in plan.batches if b.number not in record.found}
    harness = _Harness(target.work / _HARNESS_FILE, wanted=config.lm_eval is not None)
    workers = min(config.workers, max(len(waiting) + harness.waits, 1))
    cpus = config.cpus_per_worker or max((os.cpu_count() or 1) // config.workers, 1)
    with (
        ray_session(ray_config, workers * cpus),
        Reporter("evaluate", plan.items, "item") as reporter,
    ):
        require_resources(
            workers, cpus, gpus_per_worker(config.gpus_per_worker), "evaluate.workers"
        )
        advise_precision(config.precision, "evaluate")
        actors = Actors(Scorer, (absolute,), cpus, config.gpus_per_worker)

        def work(worker: int, name: str) -> Outcome:
            if name == _HARNESS:
                harness.keep(actors.call(worker, "harness", target.work.resolve()))
                return Outcome(name, "done")
            batch = waiting[name]
            record.add(batch.number, *actors.call(worker, "score", *plan.asked(batch)))
            return Outcome(name, "done")

        def ended(outcome: Outcome) -> None:
            if outcome.state == "failed":
                raise outcome.error or LoramError(outcome.reason)
            show()

        def show() -> None:
            line = last_line(target.work / METRICS_FILE)
            answered = {"lm-eval's requests": line["step"]} if line else {}
            reporter.update(sum(map(len, record.found.values())), answered)

        try:
            size = actors.call(0, "size")
            names = [*([_HARNESS] if harness.waits else []), *waiting]
            schedule = Schedule(names, config.max_failures)
            run_tasks(schedule, workers, work, ended, show, stop=actors.stop)
        finally:
            actors.stop()
    scores = {**size, **plan.scores(record.found), **harness.scores, "seconds": record.seconds}
    write_json(target.path / SCORES_FILE, scores)
    items = {
        measurement.title: found
        for measurement, found in zip(plan.measurements, plan.found(record.found), strict=True)
    }
    _write_items(target.path / ITEMS, items | harness.samples)
    target.details.update(scores)


def _write_items(folder: Path, results: Mapping[str, Iterable[Any]]) -> None:
    """Write each benchmark's items and their results to a file of its own."""
    folder.mkdir()
    for title, items in results.items():
        lines = "".join(json.dumps(one, default=str) + "\n" for one in items)
        (folder / f"{slug(title)}.jsonl").write_text(lines)


class _Kept(NamedTuple):
    """Results of lm-eval."""

    scores: Scores
    samples: dict[str, list[Any]]


class _Harness:
    """Results of lm-eval, kept in a file for resuming an interrupted evaluation.

    Args:
        path: The file.
        wanted: Whether there are tasks for lm-eval.

    Attributes:
        waits: Whether the tasks have yet to run.
        scores: Scores by ``task/metric``.
        samples: Samples of each task.
    """

    def __init__(self, path: Path, wanted: bool) -> None:
        self._path = path
        self.waits = wanted
        self.scores: Scores = {}
        self.samples: dict[str, list[Any]] = {}
        if path.exists():
            self.scores, self.samples = read_as(path, _Kept, constants=True)
            self.waits = False

    def keep(self, found: tuple[Scores, dict[str, list[Any]]]) -> None:
        """Write the results to the file."""
        write_json(self._path, found)
        self.scores, self.samples = found


@dataclass(frozen=True)
class _Batch:
    """A line of the record."""

    batch: int
    found: list[Found]
    seconds: float


class _Record:
    """Results of batches, kept in a file for resuming an interrupted evaluation.

    Args:
        path: The file.

    Attributes:
        found: Results of each batch's items, by the number of the batch.
        seconds: Total duration of the batches in seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adding = threading.Lock()
        self.found: dict[int, list[Found]] = {}
        self.seconds = 0.0
        for line in read_lines(path):
            with suppress(LoramError):  # an unreadable batch is scored again
                self._keep(as_type(_Batch, line, str(path)))

    def add(self, number: int, found: list[Found], seconds: float) -> None:
        """Append the results of a batch's items to the file."""
        batch = _Batch(number, found, seconds)
        with self._adding, open(self._path, "a") as file:
            file.write(json.dumps(asdict(batch)) + "\n")
            self._keep(batch)

    def _keep(self, batch: _Batch) -> None:
        self.found[batch.batch] = batch.found
        self.seconds += batch.seconds
