"""Settings of a sweep: trials of a training's settings, of which the best is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from loram_ray.config.base import Free, Identified, KeysOf, Section
from loram_ray.config.batch import OF_THE_WHOLE

_COMPARED_BY = {
    "steps",
    "seed",
    "max_length",
    "chat_template",
    "eval_data",
    "eval_share",
    "eval_every",
}


class RangeConfig(Section):
    """Numbers between two, both included: whole ones where both are."""

    low: Identified[int | float] = Field(description="the least")
    high: Identified[int | float] = Field(description="the greatest")
    log: Identified[bool] = Field(False, description="as often in each part of the same ratio")

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"high must be above low = {self.low}, got {self.high}; change one")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log is true, got {self.low}; change one")
        return self


class SweepConfig(Section):
    """sweep: settings of train are tried, bad ones not to their end; the best adapter is kept."""

    model: Free[Path] = Field(description="directory: pruned, aligned, quantised or base")
    models: Free[tuple[Path, ...]] = Field(
        (), description="several models of one base to try, instead of model"
    )
    ratios: Identified[tuple[float, ...]] = Field(
        (),
        description="values of prune.ratio to try: a model of each is made, as prune and align say",
    )
    base: Free[str | None] = Field(
        None, description="what was pruned: the best adapter is recovered to it"
    )
    correction: Identified[bool | None] = Field(
        None, description="of the recovered adapters, as recover.correction"
    )
    output: Free[Path] = Field(description="directory to write")
    data: Free[str] = Field(description="rows as train takes them")
    train: Identified[Annotated[dict[str, Any], KeysOf("train", OF_THE_WHOLE)]] = Field(
        {},
        description="keys of the train section that all trials share, over those of the file's; "
        "they must hold out examples",
    )
    prune: Free[Annotated[dict[str, Any] | None, KeysOf("prune")]] = Field(
        None, description="keys of the prune section, for ratios; default: the file's section"
    )
    align: Free[Annotated[dict[str, Any] | None, KeysOf("align")]] = Field(
        None, description="keys of the align section, for ratios; default: the file's section"
    )
    models_dir: Free[Path | None] = Field(
        None, description="directory of the models of ratios; default: models beside the output"
    )
    grid: Identified[dict[str, tuple[Any, ...]]] = Field(
        {}, description="dotted keys of the train section with values to try, e.g. lora.r"
    )
    ranges: Identified[dict[str, RangeConfig]] = Field(
        {}, description="dotted keys of the train section with ranges to draw from"
    )
    trials: Identified[int | None] = Field(
        None, ge=1, description="combinations to draw; default: each one of the grid"
    )
    seed: Identified[int] = Field(0, ge=0, lt=2**32, description="of the draws")
    grace_steps: Identified[int | None] = Field(
        None,
        ge=1,
        description="steps that every trial does (ASHA); train.steps stops none early; default: "
        "until its first evaluation",
    )
    reduction_factor: Identified[float] = Field(
        3.0, gt=1, description="of the trials that have come so far, one in as many goes on (ASHA)"
    )
    finalists: Identified[int] = Field(
        1,
        ge=1,
        description="best trials of each model that are recovered and judged on the base, unless "
        "there is but one",
    )
    actors: Free[int] = Field(
        1, ge=1, description="trials at a time, each in a process with a model"
    )
    cpus: Free[int] = Field(1, ge=1, description="threads of an actor")
    gpus: Free[float] = Field(
        1.0, gt=0, le=1, description="share of a GPU of an actor, where there is one"
    )
    max_failures: Free[int] = Field(
        3, ge=0, description="deaths of its actor after which a trial is given up"
    )

    @model_validator(mode="after")
    def _varies_what_can_be_compared(self) -> SweepConfig:
        if self.models and self.ratios:
            raise ValueError("ratios must be left out where models are given; leave out one")
        if not (self.grid or self.ranges or self.ratios or len(self.models) > 1):
            raise ValueError("grid, ranges, ratios or models must name what to try; add one")
        if self.ranges and self.trials is None:
            raise ValueError("trials must say how many to draw where there are ranges; add it")
        for key in self.train.keys() & OF_THE_WHOLE:
            raise ValueError(
                f"train must leave {key} to the sweep, got {self.train[key]!r}; set it in sweep"
            )
        for where, keys in (("grid", self.grid), ("ranges", self.ranges)):
            for key in keys.keys() & (OF_THE_WHOLE | _COMPARED_BY):
                raise ValueError(
                    f"{where} must not have {key}: trials could not be compared; set it in train"
                )
        for key in self.grid.keys() & self.ranges.keys():
            raise ValueError(f"ranges must not have {key}, which grid has; leave it in one")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid must have values for {key}, got none; add some")
        return self

    @model_validator(mode="after")
    def _judged_on_the_base(self) -> SweepConfig:
        several = len(self.models) > 1 or len(self.ratios) > 1 or self.finalists > 1
        if several and self.base is None:
            raise ValueError(
                "base must be given where several models or finalists are compared, which is done "
                "on it; add it"
            )
        return self
