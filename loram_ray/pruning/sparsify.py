"""Non-structured pruning of one linear: the kept weights and their new values."""

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
        weight: Pruned weight ``[out, in]`` in the base's dtype, zero where the mask is False.
        mask: Kept weights, bool ``[out, in]``.
        error: SparseGPT's relative error of the outputs on the calibration set, otherwise None.
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
        weight: Weight in the base's dtype, ``[out, in]``.
        method: Criterion, a key of `MASKINGS`.
        inputs: The criterion's statistic of the linear's inputs. None for an expert that no
            calibration token reached, which is pruned by magnitude, with a message.
        ratio: Share of weights to prune.
        pattern: Allowed positions of zeros.
        damping: Damping of SparseGPT's Hessian, as a share of its mean diagonal.
        name: Name of the linear, for messages.
    """
    if not ratio:  # SparseGPT would still zero the columns of dead inputs
        return Sparsified(weight.cpu(), torch.ones_like(weight, dtype=torch.bool).cpu(), None)
    if CRITERIA[method].calibrates and inputs is None:
        say("prune", f"{name} received no calibration tokens; it is pruned by magnitude")
    by = method if inputs is not None else "magnitude"
    return MASKINGS[by](_Linear(weight, inputs, ratio, pattern, damping, name))


@dataclass(frozen=True)
class _Linear:
    """Arguments of `sparsify_linear`, except the criterion."""

    weight: torch.Tensor
    inputs: Statistic | None
    ratio: float
    pattern: Pattern
    damping: float
    name: str

    def masked(self, mask: torch.Tensor) -> Sparsified:
        """Return the linear with masked but otherwise unchanged weights."""
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
"""Functions that prune the weights of a linear, by criterion."""
