"""Non-structured pruning of one linear: which weights stay, and what they become."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loram_ray.pruning.sparse import Pattern, magnitude_mask, sparsegpt, wanda_mask
from loram_ray.pruning.statistics import Hessian, SquaredNorms, Statistic
from loram_ray.runtime.progress import say


@dataclass(frozen=True)
class Solved:
    """A linear after non-structured pruning.

    Attributes:
        weight: ``[out, in]`` in the base's dtype, zero where the mask is False.
        mask: bool ``[out, in]``.
        error: SparseGPT's relative error of the outputs on the calibration set, else None.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float | None


def solve_linear(
    weight: torch.Tensor,
    method: str,
    inputs: Statistic | None,
    ratio: float,
    pattern: Pattern,
    damping: float,
    name: str,
) -> Solved:
    """Prune the weights of one linear.

    Args:
        weight: ``[out, in]``, in the base's dtype.
        method: ``magnitude``, ``wanda`` or ``sparsegpt``.
        inputs: the method's statistic of the linear's inputs; None where it saw none, as an expert
            to which no calibration token came: it is pruned by magnitude then, with a message.
        ratio: share of weights to prune.
        pattern: where the zeros may lie.
        damping: of SparseGPT's Hessian.
        name: of the linear, for messages.
    """
    if not ratio:  # SparseGPT would still zero the columns of inputs that are always zero
        return Solved(weight.cpu(), torch.ones_like(weight, dtype=torch.bool).cpu(), None)
    if method != "magnitude" and inputs is None:
        say("prune", f"{name} saw no calibration token; it is pruned by magnitude")
    if isinstance(inputs, Hessian):
        hessian = inputs.matrix.to(weight.device)
        result = sparsegpt(weight, hessian, ratio, pattern, damping=damping, name=name)
        solved = result.weight.to(weight.dtype).mul_(result.mask)
        return Solved(solved.cpu(), result.mask.cpu(), result.error)
    if isinstance(inputs, SquaredNorms):
        mask = wanda_mask(weight, inputs.total.sqrt().to(weight.device), ratio, pattern)
    else:
        mask = magnitude_mask(weight, ratio, pattern)
    return Solved((weight * mask).cpu(), mask.cpu(), None)
