"""Settings of what a user does after training: recovery, merging, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from loram_ray.config.corpus import TextConfig
from loram_ray.config.section import Precision, Section


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
    correction: bool = Field(
        False,
        description="shift the adapter by how far alignment and NF4 moved the weights that it was "
        "trained on from the base's, after EMLoC; after structured pruning",
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


class EvaluateConfig(Section):
    """evaluate: perplexity, and exact match of generated answers."""

    model: str = Field(
        description="base, pruned, aligned, quantised or merged model: a directory or hub id"
    )
    output: Path = Field(description="directory to write")
    adapter: Path | None = Field(None, description="adapter to put on the model")
    data: str | None = Field(None, description="rows as train takes: perplexity of the answers")
    chat_template: Path | None = Field(
        None, description="Jinja file; default: what the adapter was trained with, or the model's"
    )
    text: TextConfig | None = Field(None, description="plain text: perplexity of all of it")
    limit: int | None = Field(None, ge=1, description="use the first rows only")
    max_length: int = Field(512, ge=8, description="longer examples are cut on the right")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="as in train")
    batch_size: int = Field(16, ge=1, description="examples in one forward")
    exact_match: bool = Field(False, description="generate and compare with the answer")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer")
    precision: Precision = Field("bf16", description="of weights and activations")
    max_failures: int = Field(3, ge=0, description="actor failures survived")
    cpus: int | None = Field(None, ge=1, description="threads; default: those of the machine")
    gpus: float = Field(
        1.0, gt=0, le=1, description="share of a GPU, where there is one; others may use the rest"
    )

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluateConfig:
        if self.data is None and self.text is None:
            raise ValueError("data or text must be given; name what to evaluate on")
        if self.exact_match and self.data is None:
            raise ValueError("exact_match needs data; give questions with their answers")
        return self
