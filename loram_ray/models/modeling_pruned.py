"""Pruned causal language models for transformers; this file is saved beside the weights.

It only needs transformers, torch and ``configuration_pruned.py``, so a pruned model directory loads
with ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` even without
loram_ray. A pruned model is its family's stock model with some linears of other shapes. Attention
reshapes by ``head_dim``, and whole GQA groups are pruned, so most forward passes are unchanged. The
parts that depend on more than ``head_dim`` are adapted here: OLMo 2's norms over all heads, Phi-3's
split of its fused projection, and experts, which get separate linears.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeSparseMoeBlock,
)

from .configuration_pruned import (
    PrunedGemma2Config,
    PrunedGemma3Config,
    PrunedLlamaConfig,
    PrunedMistralConfig,
    PrunedMixtralConfig,
    PrunedOlmo2Config,
    PrunedPhi3Config,
    PrunedQwen2Config,
    PrunedQwen3Config,
    PrunedQwen3MoeConfig,
)


class Pruned(nn.Module):
    """Mixin that builds the stock model and applies the changes given in the configuration."""

    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            unfuse_experts(layer, config)
        replace_linears(self, config.pruned_linears or {})
        for layer in self.model.layers:
            adapt_attention(layer.self_attn)
        mask_linears(self, config.masked_linears or [])


def _pruned(stock: Any, config: Any) -> Any:
    """Return the class of a family's pruned models, whose name saved directories refer to.

    Args:
        stock: The family's stock model class.
        config: The configuration class of its pruned models.
    """
    settings = {
        "config_class": config,
        "__doc__": f"`{stock.__name__}` with linears of other shapes.",
    }
    return type(f"Pruned{stock.__name__}", (Pruned, stock), settings)


PrunedLlamaForCausalLM = _pruned(LlamaForCausalLM, PrunedLlamaConfig)
PrunedMistralForCausalLM = _pruned(MistralForCausalLM, PrunedMistralConfig)
PrunedQwen2ForCausalLM = _pruned(Qwen2ForCausalLM, PrunedQwen2Config)
PrunedQwen3ForCausalLM = _pruned(Qwen3ForCausalLM, PrunedQwen3Config)
PrunedGemma2ForCausalLM = _pruned(Gemma2ForCausalLM, PrunedGemma2Config)
PrunedGemma3ForCausalLM = _pruned(Gemma3ForCausalLM, PrunedGemma3Config)
PrunedPhi3ForCausalLM = _pruned(Phi3ForCausalLM, PrunedPhi3Config)
PrunedOlmo2ForCausalLM = _pruned(Olmo2ForCausalLM, PrunedOlmo2Config)
PrunedMixtralForCausalLM = _pruned(MixtralForCausalLM, PrunedMixtralConfig)
PrunedQwen3MoeForCausalLM = _pruned(Qwen3MoeForCausalLM, PrunedQwen3MoeConfig)


class Experts(nn.Module):
    """The experts of a mixture, with one linear per expert and projection, named as on disk.

    Args:
        fused: Stock module whose parameters hold all experts; only its shapes are used.
        names: Names of the gate, up and down projections.
        activation: transformers' name of the activation function.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str], activation: str) -> None:
        super().__init__()
        # Read sizes from the module: under ZeRO-3 its tensors are already partitioned.
        hidden, neurons = fused.hidden_dim, fused.intermediate_dim
        shapes = ((hidden, neurons), (hidden, neurons), (neurons, hidden))
        like: dict[str, Any] = {"device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        for number in range(fused.num_experts):
            linears = [nn.Linear(*shape, bias=False, **like) for shape in shapes]
            self.add_module(str(number), nn.ModuleDict(dict(zip(names, linears, strict=True))))
        self.num_experts = fused.num_experts
        self.names = names
        self.act_fn: nn.Module = ACT2FN[activation]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            hidden_states: Inputs, ``[tokens, hidden]``.
            top_k_index: Experts of each token, ``[tokens, k]``.
            top_k_weights: Weights of these experts, ``[tokens, k]``.
        """
        gate, up, down = self.names
        out = torch.zeros_like(hidden_states)
        # In training every expert runs, even without tokens, so that it has a gradient on every
        # worker.
        used = range(self.num_experts) if self.training else top_k_index.unique().tolist()
        for number in used:
            token, choice = torch.where(top_k_index == number)
            expert: Any = self.get_submodule(str(number))
            state = hidden_states[token]
            state = expert[down](self.act_fn(expert[gate](state)) * expert[up](state))
            state = state * top_k_weights[token, choice, None]
            out.index_add_(0, token, state.to(out.dtype))
        return out


class UnfusedMixtralLayer(MixtralDecoderLayer):
    """A Mixtral layer whose mixture of experts has the same name as on disk."""

    @property
    def mlp(self) -> Any:  # type: ignore[override]
        """The mixture of experts."""
        return self.block_sparse_moe


def unfuse_experts(layer: Any, config: Any) -> None:
    """Replace the fused experts of a stock decoder layer by separate, uninitialised linears.

    The layer's parameters then have the same names as on disk. A layer without experts is not
    changed.

    Args:
        layer: Decoder layer to change in place.
        config: Configuration of the model.
    """
    block: Any
    if isinstance(layer, MixtralDecoderLayer):
        block, names = layer._modules.pop("mlp"), ("w1", "w3", "w2")
        layer.block_sparse_moe = block
        layer.__class__ = UnfusedMixtralLayer
    elif isinstance(getattr(layer, "mlp", None), Qwen3MoeSparseMoeBlock):
        block, names = layer.mlp, ("gate_proj", "up_proj", "down_proj")
    else:
        return
    block.experts = Experts(block.experts, names, config.hidden_act)


def replace_linears(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Replace linears by uninitialised ones of shape ``[out_features, in_features]``."""
    for path, (out_features, in_features) in shapes.items():
        parent, _, name = path.rpartition(".")
        stock = model.get_submodule(path)
        resized = nn.Linear(
            in_features,
            out_features,
            bias=stock.bias is not None,
            device=stock.weight.device,
            dtype=stock.weight.dtype,
        )
        setattr(model.get_submodule(parent), name, resized)


class PartialRMSNorm(nn.Module):
    """RMS norm over features of which some were pruned.

    Args:
        stock: Norm over all features.
        features: Number of kept features.
        divisor: Divisor of the sum of squares: the number of kept features, or the original number,
            as if the pruned features were zero.
    """

    def __init__(self, stock: Any, features: int, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor
        self.variance_epsilon = stock.variance_epsilon
        like: dict[str, Any] = {"device": stock.weight.device, "dtype": stock.weight.dtype}
        self.weight = nn.Parameter(torch.ones(features, **like))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise hidden states ``[..., features]``."""
        state = hidden_states.to(torch.float32)
        variance = state.pow(2).sum(-1, keepdim=True) / self.divisor
        state = state * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * state).to(hidden_states.dtype)


class LayerConfig:
    """View of the model's configuration for an attention layer with fewer heads."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.model_config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        # Looked up, not copied: the model's attention implementation can be set later.
        if name == "model_config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model_config, name)


def adapt_attention(attention: Any) -> None:
    """Adapt the parts of an attention layer that depend on its number of heads."""
    config, dim = attention.config, attention.head_dim
    if isinstance(attention, Olmo2Attention):
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        of_kept = config.pruned_norm_mean == "kept"
        attention.q_norm = _norm_of(attention.q_norm, queries, attention.q_proj, of_kept)
        attention.k_norm = _norm_of(attention.k_norm, keys, attention.k_proj, of_kept)
    elif isinstance(attention, Phi3Attention):
        heads = attention.o_proj.in_features // dim
        if heads != config.num_attention_heads:
            attention.config = LayerConfig(config, heads)  # type: ignore[assignment]
            attention.num_key_value_heads = heads // attention.num_key_value_groups


def _norm_of(stock: Any, full_size: int, linear: nn.Linear, of_kept: bool) -> Any:
    """Return the norm after a linear, a partial one if rows of the linear were pruned."""
    features = linear.out_features
    if features == full_size:
        return stock
    return PartialRMSNorm(stock, features, features if of_kept else full_size)


class SparseLinear(nn.Linear):
    """A linear whose zero weights stay zero in training.

    Only the weight's gradient is masked, where the weight is zero; AdamW leaves such weights zero.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input [..., in]`` to ``[..., out]``."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            if torch.is_autocast_enabled(input.device.type):
                input = input.to(torch.get_autocast_dtype(input.device.type))
            return _SparseProduct.apply(input, self.weight, self.bias)
        return super().forward(input)


class _SparseProduct(torch.autograd.Function):
    """Linear product that masks the weight's gradient without a second copy of the weight."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        bias = None if bias is None else bias.to(input.dtype)
        return nn.functional.linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), input.flatten(0, -2)
        for_input = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        for_weight = for_bias = None
        if ctx.needs_input_grad[1]:
            for_weight = (rows.t() @ inputs).to(weight.dtype).mul_(weight != 0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            for_bias = rows.sum(0).to(weight.dtype)
        return for_input, for_weight, for_bias


def mask_linears(model: nn.Module, paths: list[str]) -> None:
    """Keep the zero weights of the linears at these paths in training."""
    for path in paths:
        model.get_submodule(path).__class__ = SparseLinear
