"""Expand a batch's configuration into tasks: globs, grids and names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from loram_ray.config import (
    BatchConfig,
    RecoverConfig,
    TaskConfig,
    TrainConfig,
    merge_settings,
    named,
    validate,
    with_values,
)
from loram_ray.errors import LoramError
from loram_ray.plan import PLAN_FILE, PruningPlan
from loram_ray.runtime.results import RESULTS_FILE, TABLE_FILE
from loram_ray.stages.recover import recovery_in
from loram_ray.utils.names import first_clash, output_name_error


@dataclass(frozen=True)
class Task:
    """A training, a recovery, or a training with the recovery that follows it.

    Attributes:
        name: Name of its directory.
        train: Training configuration; None if another trainer has trained the adapter.
        recover: Recovery configuration; None if the adapter needs no recovery.
        priority: Priority; tasks with a higher one start first.
    """

    name: str
    train: TrainConfig | None
    recover: RecoverConfig | None
    priority: int

    @property
    def adapter(self) -> Path:
        """Directory of the resulting adapter."""
        last = self.recover or self.train
        assert last is not None
        return last.output


def tasks_of(config: BatchConfig) -> list[Task]:
    """Return the tasks of a batch in the order in which they start.

    Raises:
        LoramError: If there are no tasks, names are invalid or not distinct, or training settings
            are invalid.
    """
    found = [
        task for number, one in enumerate(config.tasks) for task in _expand(config, number, one)
    ]
    if not found:
        raise LoramError("batch.tasks must not be empty; add a task with data")
    if (clash := first_clash(task.name for task in found)) is not None:
        one, other = clash
        clashing = (
            f"{one} occurs twice" if one == other else f"{one} and {other} differ only in case"
        )
        raise LoramError(f"batch.tasks must have distinct names, but {clashing}; set name")
    _require_one_model(config, found)
    return sorted(found, key=lambda task: -task.priority)


def _require_one_model(config: BatchConfig, tasks: list[Task]) -> None:
    """Require tasks that share a copy of the model to load it with equal settings."""
    kinds = {(task.train.precision, task.train.attention) for task in tasks if task.train}
    if config.adapters_per_worker > 1 and len(kinds) > 1:
        raise LoramError(
            "batch.adapters_per_worker above 1 needs the same precision and attention for all "
            "tasks, got "
            f"{', '.join(f'{precision} with {attention}' for precision, attention in kinds)}; set "
            "them in batch.train, or set it to 1"
        )


def _expand(config: BatchConfig, number: int, task: TaskConfig) -> Iterator[Task]:
    key = f"batch.tasks.{number}"
    which, source = ("data", task.data) if task.adapter is None else ("adapter", task.adapter)
    assert source is not None
    files = sorted(glob(source, recursive=True)) if has_magic(source) else [source]
    if not files:
        kind = "file" if which == "data" else "directory"
        raise LoramError(
            f"{key}.{which} must match at least one {kind}, got {source}; check the path"
        )
    if which == "adapter":
        _require_recoverable(config, f"{key}.adapter")
    for file in files:
        for values in itertools.product(*task.grid.values()):
            settings = dict(zip(task.grid, values, strict=True))
            name = task.name or _stem(file)
            if task.name and len(files) > 1:
                name = f"{task.name}-{_stem(file)}"
            name = named(name, settings)
            if (fault := output_name_error(name, (RESULTS_FILE, TABLE_FILE))) is not None:
                raise LoramError(
                    f"{key}.name must be {fault}, got {name!r:.80} for {file}; set the task's name"
                )
            yield _task(config, task, name, file, settings, key)


def _require_recoverable(config: BatchConfig, key: str) -> None:
    """Require the base and the pruned model that adapters of another trainer are recovered by."""
    if config.base is None:
        raise LoramError(f"batch.base must be given for {key}, which is recovered to it; add it")
    if not PruningPlan.is_in(config.model):
        raise LoramError(
            f"batch.model must be a pruned model for {key}, {config.model} holds no {PLAN_FILE}; "
            "an adapter of the base needs no recovery"
        )


def _stem(file: str) -> str:
    return Path(file).name.partition(".")[0]


def _task(
    config: BatchConfig, task: TaskConfig, name: str, file: str, grid: dict[str, Any], key: str
) -> Task:
    folder = config.output / name
    if task.adapter is not None:
        assert config.base is not None
        recovery = RecoverConfig(
            adapter=Path(file),
            base=config.base,
            model=config.model,
            output=folder / "adapter",
            correction=config.correction,
        )
        return Task(name, None, recovery, task.priority)
    settings = with_values(merge_settings(config.train, task.train), grid)
    if task.seed is not None:
        settings["seed"] = task.seed
    trained, recover = recovery_in(folder, config.model, config.base, config.correction)
    settings.update(
        model=config.model,
        output=trained,
        data=file,
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        max_failures=config.max_failures,
    )
    train: TrainConfig = validate(TrainConfig, settings, f"{key} ({name})")
    return Task(name, train, recover, task.priority)
