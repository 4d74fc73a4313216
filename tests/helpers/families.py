"""Tiny random stock models of each supported family, and the layout of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import loram_ray as lr
from helpers import tiny
from loram_ray.architectures import architecture_of
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

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
# A window shorter than the tests' inputs; layers 0 and 2 slide if a family alternates.
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
    """Build the stock model, with non-default norms, biases and routers."""
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


# Longer than the sliding windows; 48 tokens, two experts each, leave no expert of four unused.
IDS = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


CLOSE = {"rtol": 0, "atol": 2e-5}


@dataclass(frozen=True)
class Case:
    family: str
    base: Path
    pruned: Path
    plan: PruningPlan

    @property
    def targets(self) -> list[str]:
        return list(architecture_of(self.family).target_names())

    def zeroed(self) -> PreTrainedModel:
        return zero_pruned(load_model(self.base, "fp32"), self.plan)


def prune(base: Path, output: Path, **settings: Any) -> Path:
    settings = {"ratio": 0.5, "layers": (1, 3), "seed": 1, **settings}
    return lr.prune(lr.PruneConfig(base=str(base), output=output, **settings)).output


@torch.no_grad()
def zero_pruned(
    model: PreTrainedModel, plan: PruningPlan, norm_mean: str = "kept"
) -> PreTrainedModel:
    """Zero the heads and neurons of the stock model that a plan does not keep, one by one.

    A norm over all heads (OLMo 2) then takes the mean square over all heads, zeros included. For
    ``norm_mean`` "kept", it is scaled up to the mean over the kept heads.
    """
    sizes = plan.geometry
    if norm_mean == "kept" and hasattr(model.model.layers[0].self_attn, "q_norm"):
        for number, units in plan.layers.items():
            attention = model.model.layers[number].self_attn
            for norm in (attention.q_norm, attention.k_norm):
                if norm.weight.numel() > sizes.head_dim:
                    of_kept(norm, sizes.num_kv_heads / len(units.kv_heads))
    for number, units in plan.layers.items():
        layer = model.model.layers[number]
        for head in set(range(sizes.num_kv_heads)) - set(units.kv_heads.tolist()):
            zero_kv_head(layer.self_attn, head, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts
            for expert, kept in enumerate(units.neurons.tolist()):
                for neuron in set(range(sizes.intermediate_size)) - set(kept):
                    experts.gate_up_proj[expert, neuron] = 0
                    experts.gate_up_proj[expert, sizes.intermediate_size + neuron] = 0
                    experts.down_proj[expert, :, neuron] = 0
        else:
            for neuron in set(range(sizes.intermediate_size)) - set(units.neurons.tolist()):
                zero_neuron(layer.mlp, neuron, sizes.intermediate_size)
    return model


def of_kept(norm: Any, times: float) -> None:
    """Scale a norm's mean square by a factor."""

    def forward(state: torch.Tensor) -> torch.Tensor:
        mean = state.double().pow(2).mean(-1, keepdim=True) * times
        return (norm.weight * state.double() / (mean + norm.variance_epsilon).sqrt()).to(state)

    norm.forward = forward


def zero_kv_head(attention: Any, head: int, heads: int, kv_heads: int, dim: int) -> None:
    group = heads // kv_heads
    queries = slice(head * group * dim, (head + 1) * group * dim)
    keys = slice(head * dim, (head + 1) * dim)
    attention.o_proj.weight[:, queries] = 0
    if hasattr(attention, "qkv_proj"):
        first_key, first_value = heads * dim, (heads + kv_heads) * dim
        attention.qkv_proj.weight[queries] = 0
        attention.qkv_proj.weight[first_key:first_value][keys] = 0
        attention.qkv_proj.weight[first_value:][keys] = 0
        return
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        linear = getattr(attention, name)
        linear.weight[rows] = 0
        if linear.bias is not None:
            linear.bias[rows] = 0


def zero_neuron(mlp: Any, neuron: int, size: int) -> None:
    mlp.down_proj.weight[:, neuron] = 0
    if hasattr(mlp, "gate_up_proj"):
        mlp.gate_up_proj.weight[neuron] = 0
        mlp.gate_up_proj.weight[size + neuron] = 0
    else:
        mlp.gate_proj.weight[neuron] = 0
        mlp.up_proj.weight[neuron] = 0
