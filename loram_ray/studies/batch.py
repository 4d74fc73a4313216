"""Run a batch: train tasks on actors that keep the model, and write a table of results."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from loram_ray.artifacts.stage_directory import StageDirectory, StageResult
from loram_ray.config import BatchConfig, RayConfig, TrainConfig
from loram_ray.finetuning.summary import TrainingSummary
from loram_ray.models.base import BaseModel
from loram_ray.runtime.actors import Actors
from loram_ray.runtime.cluster import (
    advise_precision,
    gpus_per_worker,
    ray_session,
    require_resources,
)
from loram_ray.runtime.progress import METRICS_FILE, Reporter, last_line
from loram_ray.runtime.results import write_results
from loram_ray.runtime.schedule import Outcome, Schedule, run_tasks
from loram_ray.stages.recover import recover, require_recovery
from loram_ray.stages.train import require_room, train_by
from loram_ray.studies.tasks import Task, tasks_of
from loram_ray.utils.files import make_directory

if TYPE_CHECKING:
    from loram_ray.finetuning.frozen import FrozenModel
    from loram_ray.finetuning.lockstep import Lockstep

_SHOWN = 4
_COLUMNS = ("steps", "examples", "tokens", "trained_parameters", "best_step", "eval_loss", "loss")


@dataclass(frozen=True)
class BatchResult:
    """Result of a batch.

    Attributes:
        output: Output directory.
        rows: One row per task, in the order in which tasks start.
    """

    output: Path
    rows: list[dict[str, Any]]

    @property
    def failed(self) -> int:
        """Number of failed tasks."""
        return sum(row["state"] == "failed" for row in self.rows)


def batch(config: BatchConfig, ray_config: RayConfig | None = None) -> BatchResult:
    """Train an adapter for each task on one model, several at a time, and recover each.

    Tasks with ``adapter`` instead of ``data`` are only recovered; another trainer trained them.

    Each actor loads the model once and trains task after task. A task that fails, or whose actor
    dies too often, is reported with its reason and does not affect the others. A second call
    resumes incomplete tasks from their last checkpoints.

    Raises:
        LoramError: If there are no tasks, training settings are invalid, the model is not a model,
            or the cluster cannot place the actors. Errors of a task are reported in its row.
    """
    tasks = {task.name: task for task in tasks_of(config)}
    identity = BaseModel(config.model, "batch.model").identify()
    require_recovery(config.model, config.correction, "batch.correction")
    make_directory(config.output, "batch.output")
    each = config.adapters_per_worker
    workers = min(config.workers, -(-len(tasks) // each))
    cpus = workers * config.cpus_per_worker
    with (
        ray_session(ray_config or RayConfig(), cpus),
        Reporter("batch", len(tasks), "task") as reporter,
    ):
        gpus = gpus_per_worker(config.gpus_per_worker)
        require_resources(workers, config.cpus_per_worker, gpus, "batch.workers")
        trainings = [task.train for task in tasks.values() if task.train is not None]
        if trainings:
            advise_precision(trainings[0].precision, "batch.train")
        state = _Progress(reporter, tasks)
        actors = Actors(TaskActor, (each,), config.cpus_per_worker, config.gpus_per_worker, each)
        schedule = Schedule(list(tasks), config.max_failures)
        try:
            run_tasks(
                schedule,
                workers,
                lambda number, name: _run_task(tasks[name], actors, number, identity, state),
                state.ended,
                state.show,
                each,
                actors.release,
                actors.stop,
            )
        finally:
            actors.stop()
    rows = [_row(tasks[outcome.name], outcome) for outcome in schedule.outcomes]
    write_results(config.output, rows, _columns())
    return BatchResult(config.output, rows)


class TaskActor:
    """Keep a model loaded and train on it, one task after another or several at a time.

    Args:
        adapters: Number of tasks trained at a time.
    """

    def __init__(self, adapters: int) -> None:
        self._adapters = adapters
        self._frozen: FrozenModel | None = None
        self._lockstep: Lockstep | None = None
        self._loading = threading.Lock()

    def train(self, config: TrainConfig, work: Path, output: Path) -> TrainingSummary:
        """Train one task, loading its model if a different one or none is loaded."""
        from loram_ray.finetuning.frozen import FrozenModel
        from loram_ray.finetuning.lockstep import Lockstep
        from loram_ray.finetuning.trainer import train_adapter

        with self._loading:
            if self._frozen is None or not self._frozen.serves(config):
                self._frozen = self._lockstep = None
                require_room(config, self._adapters)
                if self._adapters > 1:
                    self._lockstep = Lockstep(lambda: FrozenModel.load(config))
                    self._frozen = self._lockstep.frozen
                else:
                    self._frozen = FrozenModel.load(config)
            frozen, lockstep = self._frozen, self._lockstep
        return train_adapter(config, work, output, frozen, lockstep)


class _Progress:
    """Show the number of finished tasks and the progress of the running ones."""

    def __init__(self, reporter: Reporter, tasks: dict[str, Task]) -> None:
        self._reporter, self._tasks = reporter, tasks
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._ended = self._failed = 0

    def begun(self, name: str) -> None:
        with self._lock:
            self._running.add(name)

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._running.discard(outcome.name)
            self._ended += 1
            self._failed += outcome.state == "failed"
        self.show()

    def show(self) -> None:
        with self._lock:
            shown: dict[str, Any] = {"failed": self._failed} if self._failed else {}
            for name in sorted(self._running)[:_SHOWN]:
                config = self._tasks[name].train
                shown[name] = "recovering" if config is None else self._progress_of(config)
            self._reporter.update(self._ended, shown)

    def _progress_of(self, config: TrainConfig) -> str:
        line = last_line(StageDirectory(config.output).work / METRICS_FILE) or {"step": 0}
        loss = f" loss {line['loss']:.3f}" if "loss" in line else ""
        return f"{line['step']}/{config.steps}{loss}"


def _run_task(
    task: Task, actors: Actors, number: int, identity: tuple[str, str], state: _Progress
) -> Outcome:
    """Train and recover one task; called again if its actor dies."""
    started = time.perf_counter()
    state.begun(task.name)

    def training(config: TrainConfig, work: Path, output: Path) -> TrainingSummary:
        summary: TrainingSummary = actors.call(number, "train", config, work, output)
        return summary

    trained = None if task.train is None else train_by(task.train, training, identity)
    recovered = None if task.recover is None else recover(task.recover)
    skipped = all(stage.skipped for stage in (trained, recovered) if stage is not None)
    details = {} if trained is None else _details(trained)
    details["seconds"] = 0.0 if skipped else time.perf_counter() - started
    return Outcome(task.name, "skipped" if skipped else "done", details=details)


def _details(trained: StageResult) -> dict[str, Any]:
    """Return the columns that describe a training."""
    last = last_line(trained.output / METRICS_FILE, having="loss")
    return {
        **{key: trained.manifest.details.get(key) for key in _COLUMNS},
        "loss": None if last is None else last["loss"],
    }


def _row(task: Task, outcome: Outcome) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys((*_COLUMNS, "seconds"))
    return {
        "name": task.name,
        "state": outcome.state,
        "reason": outcome.reason,
        "deaths": outcome.deaths,
        "data": None if task.train is None else task.train.data,
        "adapter": None if outcome.state == "failed" else str(task.adapter),
        **empty,
        **outcome.details,
    }


def _columns() -> dict[str, pa.DataType]:
    text = ("name", "state", "reason", "data", "adapter")
    whole = ("deaths", "steps", "examples", "tokens", "trained_parameters", "best_step")
    real = ("eval_loss", "loss", "seconds")
    kinds = ((text, pa.string()), (whole, pa.int64()), (real, pa.float64()))
    return {name: kind for names, kind in kinds for name in names}
