"""Settings of what makes a trained adapter the base's: recovery and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from loram_ray.config.base import Section


class RecoverConfig(Section):
    """recover: a pruned adapter becomes an adapter of the base."""

    adapter: Path = Field(description="directory written by train on a pruned model")
    base: str = Field(description="base model that was pruned: a directory or a hub id")
    output: Path = Field(description="directory to write")
    form: Literal["adapter", "delta"] = Field(
        "adapter",
        description="after non-structured pruning: adapter is a truncated SVD, delta is exact and "
        "for merge",
    )
    svd_rank: int | None = Field(
        None,
        ge=1,
        description="rank of the truncated SVD, at most a linear's shorter side; default: the "
        "pruned adapter's own",
    )
    max_svd_error: float = Field(
        0.1, ge=0, description="relative error of the truncated SVD beyond which there is a warning"
    )
    correction: bool | None = Field(
        None,
        description="shift the adapter by how far alignment and NF4 moved the weights that it was "
        "trained on from the base's, after EMLoC; default: yes after training on an aligned or "
        "quantised model of structured pruning",
    )
    correction_lambda: float = Field(
        3.0,
        gt=0,
        description="most that the correction may be of what was learnt, direction by direction",
    )
    model: Path | None = Field(
        None,
        description="directory of the model that the adapter was trained on, for the correction; "
        "default: the one that the adapter names",
    )

    @model_validator(mode="after")
    def _rank_of_an_svd(self) -> RecoverConfig:
        if self.form == "delta" and self.svd_rank is not None:
            raise ValueError(
                f"svd_rank is for form adapter, got {self.svd_rank} with form delta, which is "
                "exact; leave one of them out"
            )
        return self


class MergeConfig(Section):
    """merge: base and recovered adapter become one model."""

    base: str = Field(description="full-precision base model: a directory or a hub id")
    adapter: Path = Field(description="directory of a PEFT LoRA or a delta for the base")
    output: Path = Field(description="directory to write")
    max_shard_bytes: int = Field(5 * 10**9, ge=1, description="upper bound of a weight shard")
    parity: bool = Field(
        True,
        description="compare the merged model's logits with those of base and adapter, one layer "
        "in memory at a time, and refuse a merged model that is another",
    )
