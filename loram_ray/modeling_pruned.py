"""Pruned causal language models for transformers; this file is saved beside the weights.

It needs transformers, torch and ``configuration_pruned.py`` alone, so that a pruned model directory
loads with ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` where
loram_ray is not installed. A pruned model is its family's stock model with some linears of other
shapes: attention reshapes by ``head_dim`` and whole GQA groups are pruned, so no forward pass
changes.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from .configuration_pruned import PrunedLlamaConfig


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """Llama with per-layer numbers of attention heads and intermediate neurons."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        """Build the stock model and replace the pruned linears."""
        super().__init__(config)
        replace_linears(self, config.pruned_linears or {})
        mask_linears(self, config.masked_linears or [])


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


class SparseLinear(nn.Linear):
    """A linear whose weights that are zero stay zero in training.

    Only the weight's gradient is masked, where the weight is zero; AdamW leaves such weights zero.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input [..., in]`` to ``[..., out]``."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            if torch.is_autocast_enabled(input.device.type):
                input = input.to(torch.get_autocast_dtype(input.device.type))
            return _SparseProduct.apply(input, self.weight, self.bias)
        return super().forward(input)


class _SparseProduct(torch.autograd.Function):
    """A linear product that saves no second copy of the weight for its masked gradient."""

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
    """Make the linears at these paths keep their zero weights in training."""
    for path in paths:
        model.get_submodule(path).__class__ = SparseLinear
