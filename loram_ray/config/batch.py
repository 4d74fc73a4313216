"""Configuration of many fine-tuning tasks on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import Section
from loram_ray.config.marks import DottedKeysOf, KeysOf, Renamed, SetByStudy, keys_with
from loram_ray.config.train import TrainConfig
from loram_ray.utils.names import output_name_error

OF_THE_WHOLE = keys_with(TrainConfig, SetByStudy())
"""Keys of the train section that a batch sets for all of its trainings."""


class TaskConfig(Section):
    """One task, or one for each file of a glob pattern and each combination of a grid."""

    has_identity = False

    name: str | None = Field(
        None,
        description="Name of the task's directory. Default: the name of the data file, or of the "
        "adapter's directory, and the grid's values.",
    )
    data: str | None = Field(
        None,
        description="Training data in the formats of train.data: a file, or a glob pattern for "
        "one task per file.",
    )
    adapter: str | None = Field(
        None,
        description="Instead of data: a PEFT LoRA that another trainer trained on the model, to "
        "recover only. A directory, or a glob pattern for one task per directory.",
    )
    train: Annotated[dict[str, Any], KeysOf("train")] = Field(
        {}, description="Keys of the train section for this task; they override batch.train."
    )
    grid: Annotated[dict[str, tuple[Any, ...]], DottedKeysOf("train")] = Field(
        {},
        description="Dotted keys of the train section with values to combine, e.g. lora.r. Each "
        "combination is a task.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the training. Default: the train section's."
    )
    priority: int = Field(
        0, description="Priority of the task; tasks with a higher priority start first."
    )

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name is not None and (fault := output_name_error(name)) is not None:
            raise ValueError(f"must be {fault}, got {name!r:.80}; rename the task")
        return name

    @model_validator(mode="after")
    def _has_one_source(self) -> TaskConfig:
        if (self.data is None) == (self.adapter is None):
            given = "neither" if self.data is None else "both"
            raise ValueError(f"data or adapter must be given, got {given}; give one of them")
        if self.adapter is not None:
            for key in ("train", "grid", "seed"):
                if value := getattr(self, key):
                    raise ValueError(
                        f"{key} must be left out with adapter, which is trained already, got "
                        f"{value}; remove it"
                    )
        return self


class BatchConfig(Section):
    """Train an adapter for each of many tasks on one model."""

    has_identity = False

    model: Path = Field(
        description="Directory of the pruned, aligned, quantised or base model to train on."
    )
    output: Path = Field(description="Directory to write to, with one subdirectory per task.")
    base: str | None = Field(
        None,
        description="Base model that was pruned: a directory or a Hugging Face Hub id. If given, "
        "adapters trained on the pruned model are recovered to it.",
    )
    correction: bool | None = Field(
        None, description="Whether to correct the recovered adapters; see recover.correction."
    )
    tasks: tuple[TaskConfig, ...] = Field((), description="Tasks to train.")
    train: Annotated[dict[str, Any], KeysOf("train", OF_THE_WHOLE)] = Field(
        {},
        description="Keys of the train section for all tasks; they override the run file's train "
        "section.",
    )
    workers: Annotated[int, Renamed("actors")] = Field(
        1, ge=1, description="Number of Ray actors, each with a copy of the model."
    )
    adapters_per_worker: Annotated[int, Renamed("adapters_per_actor")] = Field(
        1,
        ge=1,
        description="Number of adapters that each worker trains at once, on one copy of the model "
        "and in shared forward passes. Results match those of separate training up to "
        "rounding. loram plan shows how many fit.",
    )
    cpus_per_worker: Annotated[int, Renamed("cpus")] = Field(
        1, ge=1, description="Number of threads per worker."
    )
    gpus_per_worker: Annotated[float, Renamed("gpus")] = Field(
        1.0, gt=0, le=1, description="Share of a GPU per worker, if there is one."
    )
    max_failures: int = Field(
        3, ge=0, description="Number of worker failures to tolerate per task."
    )

    @model_validator(mode="after")
    def _no_paths_in_shared(self) -> BatchConfig:
        sections = {"train": self.train}
        sections |= {f"tasks.{i}.train": task.train for i, task in enumerate(self.tasks)}
        for where, keys in sections.items():
            for key in OF_THE_WHOLE & keys.keys():
                raise ValueError(
                    f"{where} must not set {key}, got {keys[key]!r}; set it in batch or in the task"
                )
        return self
