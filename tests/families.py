"""A tiny random stock model of each supported family, and what each keeps where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# A window shorter than the tests' inputs; layers 0 and 2 slide where a family alternates.
_SLIDING = {"sliding_window": 8}
_ALTERNATING = {
    **_SLIDING,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SLIDING,
    "qwen2": {},
    "qwen3": {},
    "gemma2": _ALTERNATING,
    "gemma3_text": _ALTERNATING,
    "phi3": _SLIDING,
    "olmo2": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": {**_EXPERTS, "intermediate_size": 40, "moe_intermediate_size": 24},
}
MIXTURES = ("mixtral", "qwen3_moe")


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The stock model; its norms, biases and routers are not as after initialisation."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            else:
                parameter.normal_(std=0.2 if parameter.dim() == 3 or "gate" in name else 0.1)
    return model.eval()  # type: ignore[no-any-return]


def write_base(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write the stock model as its class saves it, with the byte tokenizer."""
    build(family, seed, **changes).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory
