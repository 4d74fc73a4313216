"""Non-structured pruning of one linear: which weights stay, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loram_ray.criteria import CRITERIA
from loram_ray.pruning.sparse import Pattern, magnitude_mask, sparsegpt, wanda_mask
from loram_ray.pruning.statistics import Hessian, SquaredNorms, Statistic
from loram_ray.runtime.progress import say


@dataclass(frozen=True)
class Sparsified:
    """A linear after non-structured pruning.

    Attributes:
        weight: ``[out, in]`` in the base's dtype, zero where the mask is False.
        mask: bool ``[out, in]``.
        error: SparseGPT's relative error of the outputs on the calibration set, else None.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float | None


def sparsify_linear(
    weight: torch.Tensor,
    method: str,
    inputs: Statistic | None,
    ratio: float,
    pattern: Pattern,
    damping: float,
    name: str,
) -> Sparsified:
    """Prune the weights of one linear.

    Args:
        weight: ``[out, in]``, in the base's dtype.
        method: a criterion of `MASKINGS`.
        inputs: the method's statistic of the linear's inputs; None where it saw none, as an expert
            to which no calibration token came: it is pruned by magnitude then, with a message.
        ratio: share of weights to prune.
        pattern: where the zeros may lie.
        damping: of SparseGPT's Hessian.
        name: of the linear, for messages.
    """
    if not ratio:  # SparseGPT would still zero the columns of inputs that are always zero
        return Sparsified(weight.cpu(), torch.ones_like(weight, dtype=torch.bool).cpu(), None)
    if CRITERIA[method].calibrates and inputs is None:
        say("prune", f"{name} saw no calibration token; it is pruned by magnitude")
    by = method if inputs is not None else "magnitude"
    return MASKINGS[by](_Linear(weight, inputs, ratio, pattern, damping, name))


@dataclass(frozen=True)
class _Linear:
    """The arguments of `sparsify_linear`, but for the method."""

    weight: torch.Tensor
    inputs: Statistic | None
    ratio: float
    pattern: Pattern
    damping: float
    name: str

    def masked(self, mask: torch.Tensor) -> Sparsified:
        """The linear with its weights under a mask, unchanged otherwise."""
        return Sparsified((self.weight * mask).cpu(), mask.cpu(), None)


def _by_magnitude(linear: _Linear) -> Sparsified:
    return linear.masked(magnitude_mask(linear.weight, linear.ratio, linear.pattern))


def _by_wanda(linear: _Linear) -> Sparsified:
    assert isinstance(linear.inputs, SquaredNorms)
    norms = linear.inputs.total.sqrt().to(linear.weight.device)
    return linear.masked(wanda_mask(linear.weight, norms, linear.ratio, linear.pattern))


def _by_sparsegpt(linear: _Linear) -> Sparsified:
    assert isinstance(linear.inputs, Hessian)
    weight, ratio, pattern = linear.weight, linear.ratio, linear.pattern
    hessian = linear.inputs.matrix.to(weight.device)
    result = sparsegpt(weight, hessian, ratio, pattern, damping=linear.damping, name=linear.name)
    solved = result.weight.to(weight.dtype).mul_(result.mask)
    return Sparsified(solved.cpu(), result.mask.cpu(), result.error)


MASKINGS: dict[str, Callable[[_Linear], Sparsified]] = {
    "magnitude": _by_magnitude,
    "wanda": _by_wanda,
    "sparsegpt": _by_sparsegpt,
}
"""How the weights of a linear are pruned, by criterion."""
