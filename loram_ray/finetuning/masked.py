"""LoRA under a mask, for non-structured pruning: ``h = x W + s (x ((B A) * M))``.

What is learnt lives only where weights were kept. The product ``(B A) * M`` has no low rank, so
plain LoRA's two thin products do not do; nor is it formed for each token. A block of its output
rows is formed once for all tokens of a call, used, and dropped; the backward pass forms it again.

Costs against plain LoRA, for T tokens of a linear ``[out, in]``: plain LoRA has 2 T out in
operations forward and as many backward (the frozen weight's own), and thin products beside them.
The masked product adds 2 T out in forward and 4 T out in backward, of which half is the gradient
with respect to ``B A`` that plain LoRA never forms: the work of the linears grows from 4 to 10
T out in, 2.5 times. Memory: the mask, one bit a weight, and two blocks of `_BLOCK_ELEMENTS` numbers
at a time; of activations, what plain LoRA keeps.

The sum ``W + s (B A) * M`` would save one product, but in bfloat16 it rounds away an adapter that
is small beside its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import nn
from torch.nn import functional

from loram_ray.masks import unpack
from loram_ray.modeling_pruned import SparseLinear
from loram_ray.plan import PruningPlan

_BLOCK_ELEMENTS = 2**22


def masked_product(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor, scale: float
) -> torch.Tensor:
    """``scale * x ((b a) * mask)^T``, differentiable in x, a and b.

    Args:
        x: ``[..., in]``; products are formed in its dtype.
        a: ``[r, in]``.
        b: ``[out, r]``.
        packed: the mask, uint8 ``[out, ceil(in / 8)]``, see `masks.pack`.
        scale: LoRA's alpha / r.

    Returns:
        ``[..., out]``, in the dtype of x.
    """
    return _MaskedProduct.apply(x, a, b, packed, scale)


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        packed: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, packed)
        ctx.scale = scale
        output = x.new_empty(*x.shape[:-1], len(b))
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(len(b), x.shape[-1]):
                weight = _block(a, b[rows], packed[rows]).mul_(scale)
                output[..., rows] = functional.linear(x, weight.to(x.dtype))
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, packed = ctx.saved_tensors
        inputs, outputs = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        for_x = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        for_a, for_b = torch.zeros_like(a), torch.empty_like(b)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(len(b), x.shape[-1]):
                mask = unpack(packed[rows], x.shape[-1])
                if for_x is not None:
                    weight = _block(a, b[rows], packed[rows]).mul_(ctx.scale)
                    for_x.addmm_(outputs[:, rows], weight.to(outputs.dtype))
                change = (outputs[:, rows].t() @ inputs).to(a.dtype).mul_(mask).mul_(ctx.scale)
                for_b[rows] = change @ a.t()
                for_a.addmm_(b[rows].t(), change)
        return None if for_x is None else for_x.view_as(x), for_a, for_b, None, None


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Spans of output rows whose product with all columns has `_BLOCK_ELEMENTS` at most."""
    step = max(_BLOCK_ELEMENTS // columns, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _block(a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Rows of ``(b a) * mask``, in the dtype of a."""
    return (b @ a).mul_(unpack(packed, a.shape[1]))


class MaskedLoraLinear(peft.tuners.lora.Linear):
    """PEFT's LoRA on a linear, its product masked; parameters have PEFT's names.

    Attributes:
        packed_mask: uint8 ``[out, ceil(in / 8)]``; set by `attach_masks`, not saved.
    """

    packed_mask: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("packed_mask", None, persistent=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        assert self.packed_mask is not None, "attach_masks has not been called"
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a: Any = self.lora_A[name].weight
            b: Any = self.lora_B[name].weight
            inputs = self.lora_dropout[name](x).to(_compute_dtype(x, a))
            product = masked_product(inputs, a, b, self.packed_mask, self.scaling[name])
            result = result + product.to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the weight, ``[out, in]``."""
        assert self.packed_mask is not None, "attach_masks has not been called"
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta * unpack(self.packed_mask, delta.shape[1])


def _compute_dtype(x: torch.Tensor, a: torch.Tensor) -> torch.dtype:
    """Where there is no autocast, PEFT computes in the adapter's dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype


def allow_masks(config: peft.LoraConfig) -> peft.LoraConfig:
    """Have PEFT use `MaskedLoraLinear` on the linears of a masked model; returns the config."""
    config._register_custom_module({SparseLinear: MaskedLoraLinear})
    return config


def attach_masks(model: nn.Module, plan: PruningPlan) -> None:
    """Give every masked LoRA of a model its mask from the plan.

    The plan is the truth: a kept weight may be zero.

    Args:
        model: a causal LM that PEFT has put adapters on, without PEFT's wrapper around it.
        plan: of the pruned model.
    """
    for name, module in model.named_modules():
        if isinstance(module, MaskedLoraLinear):
            assert plan.masks is not None
            packed = plan.masks.packed(plan.architecture.name_on_disk(name))
            frozen: Any = module.get_base_layer()
            module.packed_mask = packed.to(frozen.weight.device)
