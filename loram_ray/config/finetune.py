"""Configuration of recovery and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from loram_ray.config.base import Free, Identified, Section
from loram_ray.config.marks import SetByComparison


class RecoverConfig(Section):
    """Recover an adapter of the base model from an adapter trained on a pruned model."""

    adapter: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory of the pruned adapter: written by train, or a PEFT LoRA from "
        "another trainer."
    )
    base: Free[Annotated[str, SetByComparison()]] = Field(
        description="Base model that was pruned: a directory or a Hugging Face Hub id."
    )
    output: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory to write the recovered adapter to."
    )
    form: Identified[Literal["adapter", "delta"]] = Field(
        "adapter",
        description="Form of the result after unstructured or n:m pruning. 'adapter' is a "
        "truncated SVD; 'delta' is exact and can only be merged.",
    )
    svd_rank: Identified[int | None] = Field(
        None,
        ge=1,
        description="Rank of the truncated SVD, capped at a linear layer's smaller dimension. "
        "Default: the rank of the pruned adapter.",
    )
    max_svd_error: Free[float] = Field(
        0.1, ge=0, description="Relative error of the truncated SVD above which to warn."
    )
    correction: Identified[bool | None] = Field(
        None,
        description="Correct the adapter for the changes that alignment and NF4 made to the "
        "weights it was trained on, as in EMLoC. Default: true if it was trained on an aligned or "
        "quantised model from structured pruning.",
    )
    correction_lambda: Identified[float] = Field(
        3.0,
        gt=0,
        description="Upper bound of the correction relative to the learned update, per singular "
        "direction.",
    )
    model: Free[Annotated[Path | None, SetByComparison()]] = Field(
        None,
        description="Pruned model that the adapter was trained on: a directory or a Hugging Face "
        "Hub id. Needed for the correction, and for the pruning plan of an adapter from another "
        "trainer. Default: the one that the adapter names.",
    )

    @model_validator(mode="after")
    def _rank_of_an_svd(self) -> RecoverConfig:
        if self.form == "delta" and self.svd_rank is not None:
            raise ValueError(
                f"svd_rank must not be given with form delta, which is exact, got "
                f"{self.svd_rank}; remove one of them"
            )
        return self


class MergeConfig(Section):
    """Merge a recovered adapter into the base model."""

    base: Free[str] = Field(
        description="Full-precision base model: a directory or a Hugging Face Hub id."
    )
    adapter: Free[Path] = Field(
        description="Directory of a PEFT LoRA adapter or a delta for the base model."
    )
    output: Free[Path] = Field(description="Directory to write the merged model to.")
    max_shard_bytes: Identified[int] = Field(
        5 * 10**9, ge=1, description="Maximum size of a weight shard in bytes."
    )
    parity: Free[bool] = Field(
        True,
        description="Compare the merged model's logits with those of the base with the adapter, "
        "one layer in memory at a time, and fail if they differ.",
    )
