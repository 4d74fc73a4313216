"""Configuration of LoRA fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import (
    BadShare,
    Free,
    Identified,
    OptimiserConfig,
    Precision,
    Section,
    merge_settings,
    require_whole_batches,
)
from loram_ray.config.marks import Alias, EqualInTrials, Renamed, SetByComparison, SetByStudy
from loram_ray.peft_options import NOT_RECOVERED, changes_frozen_weights, is_chosen
from loram_ray.utils.patterns import patterns_error

MAX_RANK = 2**16
"""Maximum rank, larger than any linear layer's smaller dimension."""


def _from_peft(key: Any, value: Any) -> Any:
    """Return an option's value as it is here, if it has another form in PEFT."""
    if key == "init" and value is True:
        return "default"
    if key == "targets" and value == "all-linear":
        return None
    if key == "layers" and type(value) is int:
        return (value,)
    return value


class LoraConfig(Section):
    """LoRA adapter, with the PEFT options that recovery carries over exactly."""

    r: Identified[int] = Field(8, ge=1, le=MAX_RANK, description="Rank of the adapter.")
    alpha: Identified[Annotated[float, Alias("lora_alpha")]] = Field(
        16,
        gt=0,
        allow_inf_nan=False,
        description="LoRA alpha (lora_alpha in PEFT). The update is scaled by alpha / r, or by "
        "alpha / sqrt(r) with use_rslora.",
    )
    dropout: Identified[Annotated[float, Alias("lora_dropout")]] = Field(
        0.05,
        ge=0,
        lt=1,
        description="Dropout probability of the adapter's input (lora_dropout in PEFT).",
    )
    targets: Identified[Annotated[tuple[str, ...] | None, Alias("target_modules")]] = Field(
        None,
        description="Names of the modules to adapt, e.g. q_proj (target_modules in PEFT). "
        "Default: all linear layers of the family that can be pruned.",
    )
    exclude: Identified[Annotated[tuple[str, ...], Alias("exclude_modules")]] = Field(
        (),
        description="Names or full paths of modules to exclude from targets "
        "(exclude_modules in PEFT).",
    )
    layers: Identified[Annotated[tuple[int, ...] | None, Alias("layers_to_transform")]] = Field(
        None,
        description="Indices of the layers to adapt (layers_to_transform in PEFT). Default: "
        "all layers.",
    )
    lm_head: Identified[bool] = Field(False, description="Also adapt lm_head, as in the paper.")
    rank_pattern: Identified[dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]]] = Field(
        {},
        description="Ranks that differ from r, by module name or regular expression.",
    )
    alpha_pattern: Identified[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = (
        Field(
            {},
            description="Values that differ from alpha, by module name or regular expression.",
        )
    )
    use_rslora: Identified[bool] = Field(
        False, description="Use rank-stabilised LoRA, which scales the update by alpha / sqrt(r)."
    )
    init: Identified[
        Annotated[Literal["default", "gaussian", "orthogonal", "eva"], Alias("init_lora_weights")]
    ] = Field(
        "default",
        description="Initialisation of A and B (init_lora_weights in PEFT), whose product starts "
        "at zero. 'default': Kaiming-uniform A; 'gaussian': normal A; 'orthogonal': A and B with "
        "orthogonal rows; 'eva': A from the principal directions of the layer's inputs.",
    )
    dtype: Identified[Precision] = Field(
        "fp32", description="Data type of the adapter's weights and optimiser states."
    )

    @model_validator(mode="before")
    @classmethod
    def _say_what_cannot_be_recovered(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key, why in NOT_RECOVERED.items():
            if is_chosen(data.get(key)):
                raise ValueError(f"{key} cannot be recovered: {why}; remove it")
        start = data.get("init")
        if changes_frozen_weights(start):
            raise ValueError(
                f"init = {start} cannot be recovered: it changes the frozen weights of the pruned "
                "model, but not those of the base; use default, orthogonal or eva"
            )
        return {key: _from_peft(key, value) for key, value in data.items()}

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_match_in_time(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        fault = patterns_error(list(patterns))
        if fault is not None:
            raise ValueError(f"must be {fault}")
        return patterns

    @model_validator(mode="after")
    def _head_is_in_no_layer(self) -> LoraConfig:
        if self.layers is not None and self.lm_head:
            raise ValueError(
                "lm_head must be false if layers are given, as it is not in a layer, got true; "
                "remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_rank_for_eva(self) -> LoraConfig:
        if self.init == "eva" and self.rank_pattern:
            raise ValueError(
                "rank_pattern must not be given with init = eva, which uses one rank for linears "
                f"with the same input, got {dict(self.rank_pattern)}; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _halves_of_an_orthogonal_matrix(self) -> LoraConfig:
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"r must be even with init = orthogonal, got {odd[0]}; use an even r")
        return self


class AdapterOptimiserConfig(OptimiserConfig):
    """AdamW optimiser of an adapter."""

    name: Identified[Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]] = Field(
        "adamw",
        description="Optimiser. The 8-bit and paged variants are from bitsandbytes and need a "
        "GPU: they store moments in 8 bits, or in memory that can be paged to the "
        "host.",
    )
    b_learning_rate_ratio: Identified[float] = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Ratio of B's learning rate to A's (LoRA+).",
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
"""Named settings: those of the LoRAM paper's code and those common today."""


def _described() -> str:
    def items(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in settings.items():
            if isinstance(value, Mapping):
                yield from items(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key} {value}"

    return "; ".join(f"{name}: {', '.join(items(keys))}" for name, keys in PRESETS.items())


class TrainConfig(Section):
    """Train a LoRA adapter on a frozen pruned, aligned, quantised or base model in a Ray actor."""

    preset: Free[Literal["paper", "modern"] | None] = Field(
        None,
        description="Preset that changes the defaults of other keys; keys that are given take "
        f"precedence. {_described()}.",
    )
    model: Free[Annotated[Path, SetByStudy(), SetByComparison()]] = Field(
        description="Directory of the pruned, aligned, quantised or base model to train on."
    )
    output: Free[Annotated[Path, SetByStudy(), SetByComparison()]] = Field(
        description="Directory to write the adapter to."
    )
    data: Free[Annotated[str, SetByStudy(), SetByComparison()]] = Field(
        description="Training data: a JSON Lines, JSON, CSV or Parquet file, or a saved or hub "
        "data set, with 'messages', 'prompt' and 'completion', 'instruction' and 'output', or "
        "'text'."
    )
    chat_template: Free[Annotated[Path | None, EqualInTrials()]] = Field(
        None, description="Jinja file with a chat template. Default: the tokenizer's."
    )
    lora: Identified[LoraConfig] = LoraConfig()
    steps: Identified[Annotated[int, EqualInTrials()]] = Field(
        400, ge=1, description="Number of optimiser steps."
    )
    batch_size: Identified[int] = Field(16, ge=1, description="Examples per optimiser step.")
    micro_batch_size: Identified[int] = Field(
        4, ge=1, description="Examples per forward pass; must divide batch_size."
    )
    max_length: Identified[Annotated[int, EqualInTrials()]] = Field(
        512,
        ge=8,
        description="Maximum length of an example in tokens; longer ones are truncated on the "
        "right.",
    )
    max_bad_share: Identified[BadShare] = 0.01
    packing: Identified[bool] = Field(
        False,
        description="Pack the examples of a forward pass into one sequence instead of padding. "
        "Attention is masked between examples, and the loss is the same.",
    )
    eval_data: Free[Annotated[str | None, EqualInTrials()]] = Field(
        None,
        description="Held-out data in the formats of data. The checkpoint with the lowest loss on "
        "it is kept.",
    )
    eval_share: Identified[Annotated[float, EqualInTrials()]] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the data to hold out, from 0 to below 1, instead of eval_data.",
    )
    evaluate_every: Free[Annotated[int, Renamed("eval_every"), EqualInTrials()]] = Field(
        50, ge=1, description="Steps between evaluations."
    )
    patience: Free[int | None] = Field(
        None,
        ge=1,
        description="Number of evaluations without a lower held-out loss after which to stop "
        "early. Default: never.",
    )
    optimiser: Identified[AdapterOptimiserConfig] = AdapterOptimiserConfig(
        learning_rate=1e-4, warmup_steps=10
    )
    precision: Identified[Precision] = Field(
        "bf16", description="Data type of the frozen weights and of activations."
    )
    attention: Identified[Literal["sdpa", "eager", "flash_attention_2"] | None] = Field(
        None,
        description="Attention implementation of Transformers; flash_attention_2 requires the "
        "package flash-attn. Default: sdpa if the family supports it.",
    )
    compile: Identified[bool] = Field(False, description="Compile each layer with torch.compile.")
    activation_checkpointing: Free[bool] = Field(
        False,
        description="Store only the input of each layer and recompute the rest in the backward "
        "pass.",
    )
    checkpoint_every: Free[int] = Field(
        50,
        ge=1,
        description="Steps between checkpoints. With held-out data, each evaluation also writes a "
        "checkpoint.",
    )
    max_failures: Free[Annotated[int, SetByStudy()]] = Field(
        3, ge=0, description="Number of actor failures to tolerate."
    )
    cpus: Free[Annotated[int | None, SetByStudy()]] = Field(
        None, ge=1, description="Number of threads. Default: the machine's CPUs."
    )
    gpus: Free[Annotated[float, SetByStudy()]] = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a GPU to reserve, if there is one; the rest stays available to "
        "others.",
    )
    seed: Identified[Annotated[int, EqualInTrials()]] = Field(
        0, ge=0, lt=2**32, description="Seed for initialisation, data order and dropout."
    )

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out examples."""
        return self.eval_data is not None or self.eval_share > 0

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") in PRESETS:
            return merge_settings(PRESETS[data["preset"]], data)
        return data

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        require_whole_batches(self.batch_size, self.micro_batch_size)
        return self

    @model_validator(mode="after")
    def _one_held_out_set(self) -> TrainConfig:
        if self.eval_data is not None and self.eval_share:
            raise ValueError(
                f"eval_share must be 0 if eval_data is given, got {self.eval_share}; remove one of "
                "them"
            )
        if self.patience is not None and not self.evaluates:
            raise ValueError(
                f"patience must be given with held-out data, got {self.patience} without; add "
                "eval_data or eval_share"
            )
        return self
