"""Bytes of an optimiser's state."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_MOMENTS = 2
_BLOCK = 256  # elements that share a scale (bitsandbytes' BlockwiseState)
_SMALLEST = 4096  # elements; bitsandbytes keeps less in float32


def moments_bytes(parameters: Iterable[torch.Tensor], optimiser: str) -> int:
    """Bytes of AdamW's two moments; where they are paged, all of them, as if none was on the host.

    Args:
        parameters: those that are trained.
        optimiser: a name that ``train.optimiser.name`` takes.
    """
    return sum(_MOMENTS * _moment(parameter, optimiser) for parameter in parameters)


def _moment(parameter: torch.Tensor, optimiser: str) -> int:
    count = parameter.numel()
    if optimiser == "adamw":
        return parameter.nbytes
    if optimiser.endswith("8bit") and count >= _SMALLEST:
        return count + 4 * -(-count // _BLOCK)
    return 4 * count
