"""Schema of the keys read from a model's ``config.json``, with types and bounds.

The bounds are far above any published model. They reject sizes that could not be computed before
any memory or time is spent on them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from loram_ray.utils.parsing.documents import Document

_Size = Annotated[int, Field(ge=1, le=10**7)]
_Heads = Annotated[int, Field(ge=1, le=10**5)]
_Layers = Annotated[int, Field(ge=1, le=10**4)]
Token = Annotated[int, Field(ge=-1, le=10**8)]
_Positive = Annotated[float, Field(gt=0, le=1e30)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Shape = Annotated[list[_Size], Field(min_length=2, max_length=2)]


_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")


class ModelConfig(Document):
    """Keys of ``config.json`` that this package or transformers' models compute with."""

    model_type: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    moe_intermediate_size: _Size | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | None = None
    num_key_value_heads: _Heads | None = None
    head_dim: _Heads | None = None
    num_experts: Annotated[int, Field(ge=0, le=10**5)] | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=10**5)] | None = None
    num_experts_per_tok: Annotated[int, Field(ge=0, le=10**5)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=10**8)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=10**10)] | None = None
    sliding_window: Annotated[int, Field(ge=0, le=10**10)] | None = None
    layer_types: list[str] | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: Annotated[int, Field(ge=1, le=10**4)] | None = None
    rms_norm_eps: _Share | None = None
    initializer_range: Annotated[float, Field(ge=0, le=1e6)] | None = None
    attention_dropout: float | Annotated[int, Field(ge=0)] | None = None
    rope_theta: _Positive | None = None
    rope_local_base_freq: _Positive | None = None
    partial_rotary_factor: _Share | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None
    dtype: str | dict[str, Any] | None = None
    torch_dtype: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    pruned_linears: dict[str, _Shape] | None = None
    masked_linears: list[str] | None = None

    @field_validator(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        mode="before",
    )
    @classmethod
    def _is_given(cls, size: Any) -> Any:
        if size is None:
            raise ValueError("must be an integer, got null")
        return size

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.text_config is None:  # only text models, which need these keys
            for key in _NEEDED:
                if getattr(self, key) is None:
                    raise ValueError(f"{key} must be given")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads is not None and groups is not None and heads % groups:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads = {groups}, "
                f"got {heads}"
            )
        if heads and self.hidden_size and not self.head_dim and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads = {heads} if head_dim is "
                f"not given, got {self.hidden_size}"
            )
        return self


class AdapterConfig(Document):
    """Keys of a LoRA's ``adapter_config.json`` that determine what it computes."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1, le=10**6)] = 8
    lora_alpha: Annotated[float, Field(ge=-1e9, le=1e9)] = 8.0
    lora_dropout: _Share | None = None
    use_rslora: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=10**6)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(ge=-1e9, le=1e9)]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None

    @model_validator(mode="after")
    def _scales(self) -> AdapterConfig:
        if self.lora_alpha == 0:
            raise ValueError("lora_alpha must not be 0, which disables the adapter")
        return self
