"""Configuration of a hyperparameter sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from loram_ray.config.base import Free, Identified, Section
from loram_ray.config.batch import OF_THE_WHOLE
from loram_ray.config.marks import DottedKeysOf, EqualInTrials, KeysOf, Renamed, keys_with
from loram_ray.config.train import TrainConfig

_COMPARED_BY = keys_with(TrainConfig, EqualInTrials())


class RangeConfig(Section):
    """Range to draw numbers from; integers if both bounds are integers."""

    low: Identified[int | float] = Field(description="Lower bound, inclusive.")
    high: Identified[int | float] = Field(description="Upper bound, inclusive.")
    log: Identified[bool] = Field(False, description="Draw on a logarithmic scale.")

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"high must be above low = {self.low}, got {self.high}; change one")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low}; change one")
        return self


class SweepConfig(Section):
    """Try training settings, stop poor trials early, and keep the best adapter."""

    model: Free[Path] = Field(
        description="Directory of the pruned, aligned, quantised or base model to train on."
    )
    models: Free[tuple[Path, ...]] = Field(
        (), description="Directories of several models of one base to try, instead of model."
    )
    ratios: Identified[tuple[float, ...]] = Field(
        (),
        description="Values of prune.ratio to try; a model is pruned and aligned for each.",
    )
    base: Free[str | None] = Field(
        None,
        description="Base model that was pruned: a directory or a Hugging Face Hub id. If given, "
        "the best adapter is recovered to it.",
    )
    correction: Identified[bool | None] = Field(
        None, description="Whether to correct the recovered adapters; see recover.correction."
    )
    output: Free[Path] = Field(description="Directory to write to.")
    data: Free[str] = Field(description="Training data in the formats of train.data.")
    train: Identified[Annotated[dict[str, Any], KeysOf("train", OF_THE_WHOLE)]] = Field(
        {},
        description="Keys of the train section for all trials; they override the run file's train "
        "section. Data must be held out.",
    )
    prune: Free[Annotated[dict[str, Any] | None, KeysOf("prune")]] = Field(
        None,
        description="Keys of the prune section, used with ratios. Default: the run file's section.",
    )
    align: Free[Annotated[dict[str, Any] | None, KeysOf("align")]] = Field(
        None,
        description="Keys of the align section, used with ratios. Default: the run file's section.",
    )
    models_dir: Free[Path | None] = Field(
        None, description="Directory for the models of ratios. Default: models, next to the output."
    )
    grid: Identified[Annotated[dict[str, tuple[Any, ...]], DottedKeysOf("train")]] = Field(
        {}, description="Dotted keys of the train section with values to try, e.g. lora.r."
    )
    ranges: Identified[Annotated[dict[str, RangeConfig], DottedKeysOf("train")]] = Field(
        {}, description="Dotted keys of the train section with ranges to draw values from."
    )
    trials: Identified[int | None] = Field(
        None,
        ge=1,
        description="Number of combinations to draw. Default: all combinations of the grid.",
    )
    seed: Identified[int] = Field(0, ge=0, lt=2**32, description="Seed of the draws.")
    grace_steps: Identified[int | None] = Field(
        None,
        ge=1,
        description="Steps of each trial before it can be stopped early (ASHA); set it to "
        "train.steps to disable early stopping. Default: until the first evaluation.",
    )
    reduction_factor: Identified[float] = Field(
        3.0,
        gt=1,
        description="Reduction factor of ASHA: at each rung, the best 1 / reduction_factor of the "
        "trials continue.",
    )
    finalists: Identified[int] = Field(
        1,
        ge=1,
        description="Number of best trials per model to recover and evaluate on the base.",
    )
    workers: Free[Annotated[int, Renamed("actors")]] = Field(
        1,
        ge=1,
        description="Maximum number of concurrent trials, each in a Ray actor with a copy of "
        "the model.",
    )
    cpus_per_worker: Free[Annotated[int, Renamed("cpus")]] = Field(
        1, ge=1, description="Number of threads per worker."
    )
    gpus_per_worker: Free[Annotated[float, Renamed("gpus")]] = Field(
        1.0, gt=0, le=1, description="Share of a GPU per worker, if there is one."
    )
    max_failures: Free[int] = Field(
        3, ge=0, description="Number of worker failures to tolerate per trial."
    )

    @model_validator(mode="after")
    def _varies_what_can_be_compared(self) -> SweepConfig:
        if self.models and self.ratios:
            raise ValueError("ratios and models must not be given together; remove one of them")
        if not (self.grid or self.ranges or self.ratios or len(self.models) > 1):
            raise ValueError("grid, ranges, ratios or models must be given; add one of them")
        if self.ranges and self.trials is None:
            raise ValueError(
                "trials must be given with ranges: it is the number of combinations to draw; add it"
            )
        for key in self.train.keys() & OF_THE_WHOLE:
            raise ValueError(f"train must not set {key}, got {self.train[key]!r}; set it in sweep")
        for where, keys in (("grid", self.grid), ("ranges", self.ranges)):
            for key in keys.keys() & (OF_THE_WHOLE | _COMPARED_BY):
                raise ValueError(
                    f"{where} must not contain {key}, as trials would not be comparable; set it in "
                    "train"
                )
        for key in self.grid.keys() & self.ranges.keys():
            raise ValueError(
                f"ranges must not contain {key}, which is also in grid; remove one of them"
            )
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid must have values for {key}, got none; add at least one")
        return self

    @model_validator(mode="after")
    def _judged_on_the_base(self) -> SweepConfig:
        several = len(self.models) > 1 or len(self.ratios) > 1 or self.finalists > 1
        if several and self.base is None:
            raise ValueError(
                "base must be given with several models or finalists, which are compared on it; "
                "add it"
            )
        return self
