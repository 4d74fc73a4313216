"""LoRA under a mask: ``h = x W + s * drop(x) ((B A) * M)``, for LoRAM's non-structured variants.

Updates are learnt only where weights were kept. (B A) * M has full rank, so it has to be formed,
but never as a whole and never for longer than one product: `MaskedProduct` forms it block by block
over the output rows, and again in the backward pass.

Cost in addition to plain LoRA (2TN FLOPs forward, 2TN backward for the input's gradient), for T
tokens and a weight of N elements:

- 2TN in the backward pass for ``grad^T x``. Plain LoRA skips it, as the weight is frozen; here the
  gradients of A and B need it, masked.
- 2TN forward and, with dropout, 2TN backward for ``x ((B A) * M)`` beside ``x W``. Without dropout
  one product does both: always in the backward pass, and in the forward pass if activations are at
  least float32. (bfloat16 would round W + (B A) * M and so lose the small updates of an adapter
  early in training.)
- 4rN to form the product twice, and 4rN for the gradients: as much as 4r tokens cost.

In total this is 1.5 times plain LoRA's FLOPs in float32 without dropout, 2 times in bfloat16
without dropout, and 2.5 times with dropout. (Measured on a CPU core: 1.5, 2.4 and 2.5 times the
duration, for 1,024 tokens, a 2,048 x 2,048 weight and r = 8.)

Memory: saved activations are those of plain LoRA. The mask takes one bit per weight, and a running
product takes a few blocks of `BLOCK_ELEMENTS` elements.
"""

from __future__ import annotations

import warnings
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

from loram_ray.artifacts.adapter import open_tensors, stored_names
from loram_ray.artifacts.tensorfile import require_finite
from loram_ray.masks import Masks, unpack
from loram_ray.plan import PruningPlan

BLOCK_ELEMENTS = 2**23


class MaskedProduct(torch.autograd.Function):
    """``x (W + s * (B A) * M)^T``, or ``x (s * (B A) * M)^T`` if no W is given.

    With ``G = s * (grad^T x) * M``, formed block by block like the product, the gradients are
    ``dB = G A^T``, ``dA = B^T G`` and ``dx = grad (W + s * (B A) * M)``. W gets no gradient.
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
        """Return the product, ``[..., out]`` in x's dtype.

        Args:
            ctx: Autograd context.
            x: Input, ``[..., in]``; its dtype is that of the large products.
            a: LoRA's A, ``[r, in]``.
            b: LoRA's B, ``[out, r]`` in a's dtype, in which B A is formed.
            packed: Packed mask, uint8 ``[out, ceil(in / 8)]``.
            scale: LoRA's scale s.
            weight: Frozen weight W, ``[out, in]``.
            block_elements: Maximum number of elements of (B A) * M in memory at a time, but at
                least one row.
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
        wide = torch.promote_types(x.dtype, torch.float32)  # avoids rounding after each block
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
    """Yield slices of a weight's rows of up to ``elements`` elements, but at least one row."""
    step = max(elements // columns, 1)
    return (slice(start, start + step) for start in range(0, len(packed), step))


class MaskedLoraLinear(lora.Linear):
    """PEFT's LoRA layer with a masked product; its tensors keep PEFT's names.

    Attributes:
        packed_mask: Packed mask, uint8 ``[out, ceil(in / 8)]``, in a non-persistent buffer.

    Raises:
        ValueError: The adapter computes more than ``s * B A``.
    """

    packed_mask: torch.Tensor

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, packed_mask: torch.Tensor, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        if self.lora_variant or any(self.lora_bias.values()):
            raise ValueError("only a plain LoRA can be masked, without DoRA or biases")
        frozen: Any = self.get_base_layer()
        device = frozen.weight.device
        self.register_buffer("packed_mask", packed_mask.to(device), persistent=False)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return ``s * (B A) * M``, which PEFT's merging asks for."""
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta * unpack(self.packed_mask, delta.shape[1])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output, ``[..., out]``, from ``x``, ``[..., in]``."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("masked adapters cannot be mixed in one batch")
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
        """Return ``x (W + s * (B A) * M)^T``, or ``x (s * (B A) * M)^T`` if no weight is given."""
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
    """Put a LoRA on a model, masked if it is or was trained under a pruning plan with masks.

    Args:
        model: Base, pruned, aligned or merged model.
        directory: Directory that the model was loaded from.
        adapter: Configuration of a new adapter, or directory of a saved one.
        in_use: Packed masks by module that other adapters use too; missing masks are added.

    Raises:
        ValueError: The model lacks a target or a target cannot be masked, or the adapter's tensors
            and the model's modules do not match.
        RuntimeError: The adapter's tensors have other shapes.
        LoramError: The adapter contains NaN or infinity.
    """
    if isinstance(adapter, peft.LoraConfig):
        _mask(adapter, PruningPlan.load_if_any(directory), in_use)
        return peft.get_peft_model(model, adapter)  # type: ignore[return-value]
    with open_tensors(adapter) as file:
        stored = stored_names(file, adapter)
        weights = {
            name: require_finite(name, file.read(own), adapter) for name, own in stored.items()
        }
    config: Any = peft.PeftConfig.from_pretrained(str(adapter))
    # Other trainers apply no masks, and save no plan beside an adapter.
    _mask(config, PruningPlan.load_if_any(adapter), in_use)
    with warnings.catch_warnings():  # PEFT looks for its own names; all are checked below
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
    # PEFT only warns about modules without a tensor, and ignores tensors without a module.
    found: Any = peft.set_peft_model_state_dict(adapted, weights)
    if found.unexpected_keys:
        raise ValueError(f"the model has no parameter {found.unexpected_keys[0]}")
    lacking = [name for name in found.missing_keys if "lora_" in name]
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}")
    return adapted


def _mask(config: Any, plan: PruningPlan | None, in_use: dict[str, torch.Tensor] | None) -> None:
    """Make PEFT put masked layers in the place of the linears that a plan has masks for."""
    if plan is not None and plan.masks is not None:
        in_use = {} if in_use is None else in_use
        config._register_custom_module({nn.Linear: partial(_masked_linear, plan.masks, in_use)})


def _masked_linear(
    masks: Masks,
    in_use: dict[str, torch.Tensor],
    target: nn.Module,
    adapter_name: str,
    *,
    target_name: str,
    **kwargs: Any,
) -> MaskedLoraLinear | None:
    """Return the layer that PEFT puts in the place of a linear; None if the linear has no mask.

    The decision follows the pruning plan and not the zeros, as a kept weight may be zero.
    """
    if target_name not in masks.shapes:
        return None
    if target_name not in in_use:
        in_use[target_name] = masks.packed(target_name).to(next(target.parameters()).device)
    packed = in_use[target_name]
    return MaskedLoraLinear(target, adapter_name, packed, target_name=target_name, **kwargs)
