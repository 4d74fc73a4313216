"""Settings of many fine-tuning tasks over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import KeysOf, Section
from loram_ray.utils.names import fault_of_output

OF_THE_WHOLE = frozenset({"model", "output", "data", "cpus", "gpus", "max_failures"})
"""Keys of the train section that many trainings share."""


class TaskConfig(Section):
    """One task, or several: one for each file of a glob and each combination of a grid."""

    has_identity = False

    name: str | None = Field(
        None, description="of its directory; default: the data file's, with the grid's values"
    )
    data: str = Field(description="rows as train takes them: a file, or a glob of a file a task")
    train: Annotated[dict[str, Any], KeysOf("train")] = Field(
        {}, description="keys of the train section, over batch.train"
    )
    grid: dict[str, tuple[Any, ...]] = Field(
        {}, description="dotted keys of the train section with values to combine, e.g. lora.r"
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description="of its training")
    priority: int = Field(0, description="tasks of a higher one begin first")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name is not None and (fault := fault_of_output(name)) is not None:
            raise ValueError(f"must be {fault}, got {name!r:.80}; rename the task")
        return name


class BatchConfig(Section):
    """batch: many tasks over one model become an adapter each."""

    has_identity = False

    model: Path = Field(description="directory: pruned, aligned, quantised or base")
    output: Path = Field(description="directory to write, with one for each task")
    base: str | None = Field(
        None, description="what was pruned: adapters trained on a pruned model are recovered to it"
    )
    correction: bool | None = Field(
        None, description="of the recovered adapters, as recover.correction"
    )
    tasks: tuple[TaskConfig, ...] = Field((), description="what to train")
    train: Annotated[dict[str, Any], KeysOf("train", OF_THE_WHOLE)] = Field(
        {}, description="keys of the train section that all tasks share, over those of the file's"
    )
    actors: int = Field(1, ge=1, description="processes that each keep a model and train on it")
    adapters_per_actor: int = Field(
        1,
        ge=1,
        description="tasks at a time in each actor, on one copy of the model and in one forward; "
        "equal to those trained alone up to rounding; loram plan says how many fit",
    )
    cpus: int = Field(1, ge=1, description="threads of an actor")
    gpus: float = Field(
        1.0, gt=0, le=1, description="share of a GPU of an actor, where there is one"
    )
    max_failures: int = Field(
        3, ge=0, description="deaths of its actor after which a task is given up"
    )

    @model_validator(mode="after")
    def _no_paths_in_shared(self) -> BatchConfig:
        sections = {"train": self.train}
        sections |= {f"tasks.{i}.train": task.train for i, task in enumerate(self.tasks)}
        for where, keys in sections.items():
            for key in OF_THE_WHOLE & keys.keys():
                raise ValueError(
                    f"{where} must leave {key} to the batch, got {keys[key]!r}; set it in batch or "
                    "in the task"
                )
        return self
