"""Settings of training a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import OptimiserConfig, Precision, Section, over
from loram_ray.utils.patterns import fault_of_patterns

_NOT_RECOVERED = {
    "use_dora": "DoRA's magnitudes belong to the pruned weights' norms",
    "lora_bias": "a trained bias is no low-rank product",
    "bias": "a trained bias is no low-rank product",
    "modules_to_save": "whole trained modules would replace pruned ones",
    "trainable_token_indices": "trained embedding rows are no low-rank product",
    "layer_replication": "the base has no replicated layers",
    "target_parameters": "bare parameters have no rows and columns in the plan",
    "loftq_config": "LoftQ changes the frozen weights",
    "corda_config": "CorDA changes the frozen weights",
    "use_qalora": "QA-LoRA pools the inputs of A, which the base has more of",
}
"""Settings of PEFT whose adapter cannot be scattered to the base's shapes, and why."""

_CHANGING_THE_WEIGHTS = ("pissa", "olora", "loftq", "corda", "lora_ga")

_NAMES_IN_PEFT = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "exclude_modules": "exclude",
}


MAX_RANK = 2**16
"""Above any linear's shorter side."""


class LoraConfig(Section):
    """The adapter, in PEFT's terms: all of its settings that recovery carries over exactly."""

    r: int = Field(8, ge=1, le=MAX_RANK, description="rank")
    alpha: float = Field(
        16, gt=0, allow_inf_nan=False, description="scale numerator: alpha / r, or alpha / sqrt(r)"
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    targets: tuple[str, ...] | None = Field(
        None, description="short module names; default: every pruned linear of the family"
    )
    exclude: tuple[str, ...] = Field((), description="targets to leave out, by name or full path")
    layers: tuple[int, ...] | None = Field(
        None, description="numbers of the layers that get an adapter; default: all"
    )
    lm_head: bool = Field(False, description="adapt lm_head too, as the paper does")
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(
        {}, description="rank by module-name pattern"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="alpha by module-name pattern"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    init: Literal["default", "gaussian", "orthogonal", "eva"] = Field(
        "default",
        description="of A and B, whose product is zero: Kaiming-uniform A, normal A, A and B with "
        "orthogonal rows, or as A the directions in which the inputs vary most (EVA)",
    )
    dtype: Precision = Field("fp32", description="of the adapter's weights and optimiser state")

    @model_validator(mode="before")
    @classmethod
    def _say_what_cannot_be_recovered(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key, why in _NOT_RECOVERED.items():
            if data.get(key) not in (None, False, "none"):
                raise ValueError(f"{key} cannot be recovered: {why}; leave it out")
        for name, ours in _NAMES_IN_PEFT.items():
            if name in data:
                raise ValueError(f"{name} is called {ours} here; rename the key")
        start = data.get("init")
        if isinstance(start, str) and start.lower().startswith(_CHANGING_THE_WEIGHTS):
            raise ValueError(
                f"init = {start} cannot be recovered: it changes the frozen weights, and what it "
                "takes out of the pruned ones is not in the base's; take default, orthogonal or eva"
            )
        return data

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_match_in_time(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        fault = fault_of_patterns(list(patterns))
        if fault is not None:
            raise ValueError(f"must be {fault}")
        return patterns

    @model_validator(mode="after")
    def _head_is_in_no_layer(self) -> LoraConfig:
        if self.layers is not None and self.lm_head:
            raise ValueError(
                "lm_head must be false where layers are chosen, as it is in none of them, got "
                "true; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _one_rank_for_eva(self) -> LoraConfig:
        if self.init == "eva" and self.rank_pattern:
            raise ValueError(
                "rank_pattern must be left out with init = eva, which finds equally many "
                f"directions for linears of the same input, got {dict(self.rank_pattern)}; leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _halves_of_an_orthogonal_matrix(self) -> LoraConfig:
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"r must be even with init = orthogonal, got {odd[0]}; take an even r")
        return self


class AdapterOptimiserConfig(OptimiserConfig):
    """AdamW on an adapter."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="the other three are bitsandbytes': moments in 8 bits, or in memory that is "
        "paged to the host; on a GPU",
    )
    b_learning_rate_ratio: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="learning rate of B over that of A (LoRA+)"
    )


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
        "packing": True,
    },
}
"""Settings under a name: those of LoRAM's reference, and what has become usual since then."""


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
    chat_template: Path | None = Field(
        None, description="Jinja file, instead of the tokenizer's own chat template"
    )
    lora: LoraConfig = LoraConfig()
    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="examples in a step")
    micro_batch_size: int = Field(4, ge=1, description="examples in one forward")
    max_length: int = Field(512, ge=8, description="longer examples are cut on the right")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unusable rows that is skipped; more is refused"
    )
    packing: bool = Field(
        False,
        description="lay a forward's short examples behind each other instead of padding them; "
        "they do not see each other and the loss is the same",
    )
    eval_data: str | None = Field(
        None, description="held-out rows, as data: their loss during training chooses a checkpoint"
    )
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="share of data's examples to hold out, instead of eval_data"
    )
    eval_every: int = Field(50, ge=1, description="steps between evaluations")
    patience: int | None = Field(
        None, ge=1, description="evaluations without a better loss after which training ends"
    )
    optimiser: AdapterOptimiserConfig = AdapterOptimiserConfig(learning_rate=1e-4, warmup_steps=10)
    precision: Precision = Field("bf16", description="of frozen weights and activations")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None,
        description="transformers' implementation; flash_attention_2 needs flash-attn; default: "
        "sdpa where the family has it",
    )
    compile: bool = Field(False, description="compile each layer with torch.compile")
    activation_checkpointing: bool = Field(
        False, description="keep only layers' inputs, compute the rest again in the backward pass"
    )
    checkpoint_every: int = Field(
        50, ge=1, description="steps between checkpoints; with evaluation there is one at each"
    )
    max_failures: int = Field(3, ge=0, description="actor failures survived")
    cpus: int | None = Field(None, ge=1, description="threads; default: those of the machine")
    gpus: float = Field(
        1.0, gt=0, le=1, description="share of a GPU, where there is one; others may use the rest"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initialisation, order, dropout")

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out examples."""
        return self.eval_data is not None or self.eval_share > 0

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            return over(PRESETS[data["preset"]], data)
        return data

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, "
                f"got {self.batch_size}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_held_out_set(self) -> TrainConfig:
        if self.eval_data is not None and self.eval_share:
            raise ValueError(
                f"eval_share must be 0 where eval_data is given, got {self.eval_share}; "
                "leave one of them out"
            )
        if self.patience is not None and not self.evaluates:
            raise ValueError(
                f"patience needs held-out examples, got {self.patience} without; "
                "give eval_data or eval_share"
            )
        return self
