"""Settings of what a user does: training, recovery, merging, evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from loram_ray.config.corpus import TextConfig
from loram_ray.config.section import OptimiserConfig, Precision, Section


class LoraConfig(Section):
    """The adapter's shape, in PEFT's terms."""

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="scale numerator: alpha / r, or alpha / sqrt(r)")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    targets: tuple[str, ...] | None = Field(
        None, description="short module names; default: every pruned linear of the family"
    )
    lm_head: bool = Field(False, description="adapt lm_head too, as the paper does")
    rank_pattern: dict[str, int] = Field({}, description="rank by module-name pattern")
    alpha_pattern: dict[str, float] = Field({}, description="alpha by module-name pattern")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r)")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05, "lm_head": True},
        "steps": 400,
        "batch_size": 128,
        "max_length": 512,
        "optimiser": {"learning_rate": 1e-5, "warmup_steps": 100},
        "activation_checkpointing": True,
    },
    "modern": {
        "lora": {"r": 32, "alpha": 32, "dropout": 0.0},
        "batch_size": 16,
        "max_length": 1024,
        "optimiser": {"learning_rate": 2e-4, "warmup_steps": 20},
        "activation_checkpointing": True,
    },
}
"""Settings under a name: those of LoRAM's reference, and what has become usual since then."""


def under_preset(given: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and what the preset has besides; sections inside key by key."""
    found = {**preset, **given}
    for key, value in preset.items():
        inner = given.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            found[key] = under_preset(inner, value)
    return found


def _described() -> str:
    def said(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in settings.items():
            if isinstance(value, Mapping):
                yield from said(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key} {value}"

    return "; ".join(f"{name}: {', '.join(said(keys))}" for name, keys in PRESETS.items())


class TrainConfig(Section):
    """train: LoRA on a frozen pruned, aligned, quantised or base model, in one Ray actor."""

    preset: Literal["paper", "modern"] | None = Field(
        None, description=f"defaults of other keys, each of which may still be set. {_described()}"
    )
    model: Path = Field(description="directory: pruned, aligned, quantised or base")
    output: Path = Field(description="directory to write")
    data: str = Field(
        description="JSON lines, JSON, CSV, Parquet or a saved or hub data set, with 'messages', "
        "'prompt' and 'completion', 'instruction' and 'output', or 'text'"
    )
    lora: LoraConfig = LoraConfig()
    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="examples in a step")
    micro_batch_size: int = Field(4, ge=1, description="examples in one forward")
    max_length: int = Field(512, ge=8, description="longer examples are cut on the right")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unusable rows that is skipped; more is refused"
    )
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-4, warmup_steps=10)
    precision: Precision = Field("bf16", description="of frozen weights and activations")
    activation_checkpointing: bool = Field(
        False, description="keep only layers' inputs, compute the rest again in the backward pass"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="actor failures survived")
    cpus: int | None = Field(None, ge=1, description="threads; default: those of the machine")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initialisation, order, dropout")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            return under_preset(data, PRESETS[data["preset"]])
        return data

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, "
                f"got {self.batch_size}; change one of the two"
            )
        return self


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


class EvaluateConfig(Section):
    """evaluate: perplexity, and exact match of generated answers."""

    model: str = Field(
        description="base, pruned, aligned, quantised or merged model: a directory or hub id"
    )
    output: Path = Field(description="directory to write")
    adapter: Path | None = Field(None, description="adapter to put on the model")
    data: str | None = Field(None, description="rows as train takes: perplexity of the answers")
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

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluateConfig:
        if self.data is None and self.text is None:
            raise ValueError("data or text must be given; name what to evaluate on")
        if self.exact_match and self.data is None:
            raise ValueError("exact_match needs data; give questions with their answers")
        return self
