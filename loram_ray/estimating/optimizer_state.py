"""Size of the optimizer state."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_MOMENTS = 2
_BLOCK = 256  # elements per scale (bitsandbytes' BlockwiseState)
_SMALLEST = 4096  # elements; bitsandbytes keeps smaller tensors in float32


def moments_bytes(parameters: Iterable[torch.Tensor], optimiser: str) -> int:
    """Return the bytes of AdamW's two moments; paged moments count as if all were on the GPU.

    Args:
        parameters: Trainable parameters.
        optimiser: Value of ``train.optimiser.name``.
    """
    return sum(_MOMENTS * _moment(parameter, optimiser) for parameter in parameters)


def _moment(parameter: torch.Tensor, optimiser: str) -> int:
    count = parameter.numel()
    if optimiser == "adamw":
        return parameter.nbytes
    if optimiser.endswith("8bit") and count >= _SMALLEST:
        return count + 4 * -(-count // _BLOCK)
    return 4 * count
