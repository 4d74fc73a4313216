"""LoRA under a mask: ``h = x W + s * drop(x) ((B A) * M)``, LoRAM's non-structured variants.

What is learnt lives only where weights were kept. (B A) * M has full rank, so it has to be formed,
but never whole and never for longer than a product takes: `MaskedProduct` forms the rows of some
outputs, uses them and forms them again in the backward pass.

Cost, for T tokens and a weight of N elements, beside what plain LoRA does (2TN FLOPs forward, 2TN
backward for the input's gradient):

- 2TN in the backward pass for ``grad^T x``, which plain LoRA skips as the weight is frozen: the
  gradients of A and B need it, masked;
- 2TN forward and, under dropout, 2TN backward for ``x ((B A) * M)`` beside ``x W``. Without dropout
  one product does both: in the backward pass always, in the forward pass where activations are at
  least float32. (bfloat16 would round the sum W + (B A) * M, and with it a young adapter, away.)
- 4rN to form the product twice, and 4rN for the gradients: as many as 4r tokens cost.

So 1.5 times plain LoRA's FLOPs in float32 without dropout, 2 in bfloat16 without, 2.5 with dropout.
(A CPU core takes 1.5, 2.4 and 2.5 times as long for 1,024 tokens, 2,048 x 2,048 and r 8.)

Memory: activations saved are those of plain LoRA; one bit a weight for the mask; and while a
product runs, a few blocks of `BLOCK_ELEMENTS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loram_ray.artifacts.tensorfile import require_finite
from loram_ray.masks import Masks, unpack
from loram_ray.plan import PruningPlan

BLOCK_ELEMENTS = 2**23


class MaskedProduct(torch.autograd.Function):
    """``x (W + s * (B A) * M)^T``, or ``x (s * (B A) * M)^T`` where no W is given.

    With ``G = s * (grad^T x) * M``, formed block by block as the product is, the gradients are
    ``dB = G A^T``, ``dA = B^T G`` and ``dx = grad (W + s * (B A) * M)``. W gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        packed: torch.Tensor,
        scale: float,
        weight: torch.Tensor | None = None,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> torch.Tensor:
        """Return ``[..., out]`` in x's dtype.

        Args:
            ctx: autograd's.
            x: ``[..., in]``; the large products are in its dtype.
            a: ``[r, in]``.
            b: ``[out, r]`` of a's dtype; B A is formed in it.
            packed: the mask, uint8 ``[out, ceil(in / 8)]``.
            scale: LoRA's s.
            weight: frozen W ``[out, in]``.
            block_elements: upper bound of the elements of (B A) * M that exist at a time, if
                that is a row at least.
        """
        ctx.save_for_backward(x, a, b, packed, weight)
        ctx.scale, ctx.block_elements = scale, block_elements
        tokens = x.flatten(0, -2)
        out = x.new_empty(len(tokens), len(b))
        one_product = weight is not None and x.dtype.itemsize >= 4
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(packed, a.shape[1], block_elements):
                block = (b[rows] @ a).mul_(scale).mul_(unpack(packed[rows], a.shape[1]))
                block = block.to(x.dtype)
                if weight is not None and one_product:
                    block += weight[rows]
                torch.mm(tokens, block.t(), out=out[:, rows])
                if weight is not None and not one_product:
                    out[:, rows].addmm_(tokens, weight[rows].to(x.dtype).t())
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, a and b."""
        x, a, b, packed, weight = ctx.saved_tensors
        tokens, grads = x.flatten(0, -2), grad.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)  # a sum over blocks, not rounded each
        for_x = tokens.new_zeros(tokens.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        for_matrices = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        for_a, for_b = torch.zeros_like(a), torch.zeros_like(b)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(packed, a.shape[1], ctx.block_elements):
                mask = unpack(packed[rows], a.shape[1])
                if for_x is not None:
                    block = (b[rows] @ a).mul_(ctx.scale).mul_(mask)
                    if weight is not None:
                        block += weight[rows]
                    for_x += grads[:, rows] @ block.to(x.dtype)
                if for_matrices:
                    masked = (grads[:, rows].t() @ tokens).to(a.dtype).mul_(mask)
                    for_a.addmm_(b[rows].t(), masked, alpha=ctx.scale)
                    torch.mm(masked, a.t(), out=for_b[rows])
        if for_x is not None:
            for_x = for_x.to(x.dtype).view_as(x)
        if not for_matrices:
            return for_x, None, None, None, None, None, None
        return for_x, for_a, for_b.mul_(ctx.scale), None, None, None, None


def _blocks(packed: torch.Tensor, columns: int, elements: int) -> Iterator[slice]:
    """Slices of a weight's rows, of up to ``elements`` elements each, but at least a row."""
    step = max(elements // columns, 1)
    return (slice(start, start + step) for start in range(0, len(packed), step))


class MaskedLoraLinear(lora.Linear):
    """PEFT's LoRA layer with a masked product; its tensors have PEFT's names.

    Attributes:
        packed_mask: uint8 ``[out, ceil(in / 8)]``; a buffer that is not saved.

    Raises:
        ValueError: an adapter that is more than ``s * B A``.
    """

    packed_mask: torch.Tensor

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, packed_mask: torch.Tensor, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        if self.lora_variant or any(self.lora_bias.values()):
            raise ValueError("only a plain LoRA can be masked, without DoRA or biases of its own")
        frozen: Any = self.get_base_layer()
        device = frozen.weight.device
        self.register_buffer("packed_mask", packed_mask.to(device), persistent=False)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """``s * (B A) * M``, as PEFT's merging asks for it."""
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta * unpack(self.packed_mask, delta.shape[1])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapters under a mask cannot be mixed in one batch")
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if len(active) == 1 and not (self.training and self._dropout_of(active[0])):
            base: Any = self.get_base_layer()
            product = self.masked_product(x, active[0], base.weight)
            return product if base.bias is None else product + base.bias.to(product.dtype)
        result = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = result + self.masked_product(self.lora_dropout[name](x), name)
        return result

    def masked_product(
        self, x: torch.Tensor, adapter: str, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x (W + s * (B A) * M)^T``, or without W where none is given."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return MaskedProduct.apply(x, a, b, self.packed_mask, self.scaling[adapter], weight)

    def _dropout_of(self, adapter: str) -> float:
        dropout = self.lora_dropout[adapter]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0


def put_adapter_on(
    model: PreTrainedModel,
    directory: Path | str,
    adapter: peft.LoraConfig | Path,
    in_use: dict[str, torch.Tensor] | None = None,
) -> peft.PeftModel:
    """Put a LoRA on a model: under the masks of the model's plan, if that has masks.

    Args:
        model: base, pruned, aligned or merged.
        directory: where it was loaded from.
        adapter: the settings of a new adapter, or the directory of one that is there.
        in_use: packed masks by module that other adapters use, too; it gets what it lacks.

    Raises:
        ValueError: targets that the model lacks or that cannot be masked, tensors that the
            adapter lacks or that the model has no place for.
        RuntimeError: an adapter of other shapes.
        LoramError: an adapter with NaN or infinity.
    """
    new = isinstance(adapter, peft.LoraConfig)
    config: Any = adapter if new else peft.PeftConfig.from_pretrained(str(adapter))
    plan = PruningPlan.load_if_any(directory)
    if plan is not None and plan.masks is not None:
        in_use = {} if in_use is None else in_use
        config._register_custom_module({nn.Linear: partial(_masked_linear, plan.masks, in_use)})
    if new:
        return peft.get_peft_model(model, config)  # type: ignore[return-value]
    weights = peft.load_peft_weights(str(adapter), device="cpu")
    for name, tensor in weights.items():
        require_finite(name, tensor, str(adapter))
    adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
    # PEFT only warns of modules that get no tensor, and says nothing of tensors that get no module.
    found: Any = peft.set_peft_model_state_dict(adapted, weights)
    if found.unexpected_keys:
        raise ValueError(f"the model has no place for {found.unexpected_keys[0]}")
    lacking = [name for name in found.missing_keys if "lora_" in name]
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}")
    return adapted


def _masked_linear(
    masks: Masks,
    in_use: dict[str, torch.Tensor],
    target: nn.Module,
    adapter_name: str,
    *,
    target_name: str,
    **kwargs: Any,
) -> MaskedLoraLinear | None:
    """PEFT's question which layer to put in the place of a linear; None where it has no mask.

    The plan answers and not the zeros: a weight that was kept may be zero.
    """
    if target_name not in masks.shapes:
        return None
    if target_name not in in_use:
        in_use[target_name] = masks.packed(target_name).to(next(target.parameters()).device)
    packed = in_use[target_name]
    return MaskedLoraLinear(target, adapter_name, packed, target_name=target_name, **kwargs)
