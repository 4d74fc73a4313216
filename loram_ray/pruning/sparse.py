"""Which weights of one linear are zeroed, and what happens to the others: three criteria.

Magnitude and Wanda (arXiv 2306.11695) choose a mask and leave the kept weights as they are;
SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774) moves them to make up for the zeros.
All are functions of tensors, on whatever device those are.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from loram_ray.errors import LoramError
from loram_ray.pruning.pattern import Pattern, kept_in_groups, lowest, rank
from loram_ray.runtime.progress import say

__all__ = ["Pattern", "SparseGptResult", "magnitude_mask", "sparsegpt", "wanda_mask"]

_MOST_DAMPING = 1.0
_LEAST_RAISED = 1e-3  # the step after a damping of zero, which ten times would not move
_LEAF = 8  # columns whose errors are gathered into one product within a block


@dataclass(frozen=True)
class SparseGptResult:
    """What SparseGPT made of one linear.

    Attributes:
        weight: float32 ``[out, in]``, zero where the mask is False and at dead inputs.
        mask: bool ``[out, in]``, True where a weight was kept.
        damping: share of the mean diagonal that was added to the Hessian's diagonal in the end.
        error: ``tr((W - W') H (W - W')^T) / tr(W H W^T)``, H undamped: the relative squared error
            of the outputs over the calibration inputs; 0 where the outputs were zero.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    damping: float
    error: float


def magnitude_mask(
    weight: torch.Tensor, ratio: float, pattern: Pattern, *, name: str = "the linear"
) -> torch.Tensor:
    """Keep the largest absolute weights.

    Unstructured drops the ``floor(ratio * out * in)`` smallest of the whole matrix, the ratio taken
    as the decimal number that was written; n:m the n smallest of each m consecutive inputs of a
    row. Of equal weights the first in row-major order is dropped first.

    Args:
        weight: ``[out, in]``.
        ratio: share of zeros; n:m has its own and ignores it.
        pattern: where zeros may lie.
        name: the linear's, for errors.

    Returns:
        bool ``[out, in]``, True where kept.

    Raises:
        LoramError: the ratio is not in [0, 1), the weight is not finite, or m does not divide the
            inputs.
    """
    _check(weight, ratio, pattern, name)
    scores = weight.float().abs()
    if pattern.group:
        return kept_in_groups(scores, pattern)
    return ~lowest(scores.reshape(1, -1), _share(ratio, scores.numel())).view_as(scores)


def wanda_mask(
    weight: torch.Tensor,
    input_norms: torch.Tensor,
    ratio: float,
    pattern: Pattern,
    *,
    name: str = "the linear",
) -> torch.Tensor:
    """Keep the weights with the largest ``|w_ij| * ||x_j||_2`` of their row (Wanda, equation 1).

    Unstructured drops the ``floor(ratio * in)`` lowest of each row, the ratio taken as the decimal
    number that was written; n:m the n lowest of each m consecutive inputs of a row. Of equal scores
    the first in the row is dropped first.

    Args:
        weight: ``[out, in]``.
        input_norms: L2 norms of the inputs over the calibration tokens, ``[in]``.
        ratio: share of zeros; n:m has its own and ignores it.
        pattern: where zeros may lie.
        name: the linear's, for errors.

    Returns:
        bool ``[out, in]``, True where kept.

    Raises:
        LoramError: the ratio is not in [0, 1), the weight or a norm is not finite, or m does not
            divide the inputs.
    """
    _check(weight, ratio, pattern, name)
    _require_finite(input_norms, "input norms", name)
    scores = weight.float().abs().mul_(input_norms.float())
    if pattern.group:
        return kept_in_groups(scores, pattern)
    return ~lowest(scores, _share(ratio, scores.shape[1]))


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    ratio: float,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    name: str = "the linear",
) -> SparseGptResult:
    """Zero weights column after column, each row's later weights making up for it (SparseGPT).

    The paper's algorithm 1 pushes errors to the right through U, the upper Cholesky factor of
    ``H^-1``. With ``H = R R^T``, R upper triangular, U is ``R^-1``; with D = W - W' the changes so
    far, what has been pushed into the columns of a block b is ``D R[:, b] R[b, b]^-1``. So the same
    weights come from one factorisation of H, without its inverse, and each block is reached by one
    product with the blocks before it.

    Unstructured chooses within each block, over all its rows and columns, so that the zeros up to
    any block are the floor of the ratio; n:m within each row when the first column of a group is
    reached. Of equal scores the first column is dropped first.

    Args:
        weight: ``[out, in]``.
        hessian: ``(2 / N) sum x x^T`` of the linear's N calibration inputs, float32 ``[in, in]``;
            left as it is.
        ratio: share of zeros; n:m has its own and ignores it.
        pattern: where zeros may lie.
        damping: share of the mean diagonal added to the diagonal.
        block_size: columns of a block; under n:m the nearest multiple of m below it, or m.
        name: the linear's, for messages and errors.

    Raises:
        LoramError: the ratio is not in [0, 1), a weight or the Hessian is not finite, m does not
            divide the inputs, or the Hessian is not positive definite however damped.
    """
    _check(weight, ratio, pattern, name)
    _require_finite(hessian, "Hessian of the calibration inputs", name)
    columns = weight.shape[1]
    if pattern.group:
        block_size = max(block_size // pattern.group, 1) * pattern.group

    dead = hessian.diagonal() == 0
    # Transposed: a column of the linear is then one contiguous row.
    change = weight.float().t().contiguous().clone()
    outputs = _output_energy(change, hessian)
    change[dead] = 0
    factor, damping, added = _factor(hessian, dead, damping, name)  # R^T
    pruned = torch.empty_like(change)
    dropped = torch.empty_like(change, dtype=torch.bool)
    error = torch.zeros((), dtype=torch.float64, device=change.device)
    for start in range(0, columns, block_size):
        block = slice(start, min(start + block_size, columns))
        inverse = _upper_inverse(factor[block, block])
        pushed = factor[block, :start] @ change[:start]
        updated = torch.addmm(change[block], inverse.t(), pushed, out=pruned[block])
        zeros = _share(ratio, block.stop * weight.shape[0]) - _share(ratio, start * weight.shape[0])
        errors = _prune_block(
            updated, inverse, factor.diagonal()[block, None], pattern, zeros, dropped[block]
        )
        change[block] -= updated
        # D (H + added) D^T = (D R)(D R)^T, and D R are the errors.
        error += _energy(errors) - added * _energy(change[block])
    return SparseGptResult(
        pruned.t().contiguous(),
        dropped.t().logical_not(),
        damping,
        max(float(error / outputs), 0.0) if outputs > 0 else 0.0,
    )


def _prune_block(
    block: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    pattern: Pattern,
    zeros: int,
    dropped: torch.Tensor,
) -> torch.Tensor:
    """Prune one block in place, its own columns making up for each other.

    Args:
        block: ``[columns, out]``, with what earlier blocks pushed into it.
        inverse: U of these columns, ``[columns, columns]``.
        scale: ``1 / U_ii``, ``[columns, 1]``.
        pattern: where zeros may lie.
        zeros: how many, if unstructured.
        dropped: bool ``[columns, out]``, filled.

    Returns:
        The errors ``w / U_ii`` of the dropped weights, zero elsewhere, ``[columns, out]``.
    """
    columns = len(block)
    errors = torch.empty_like(block)
    if not pattern.group:
        scores = (block * scale).abs_().view(1, -1)
        dropped.copy_(lowest(scores, zeros).view_as(block))
    leaf = pattern.group or _LEAF
    for start in range(0, columns, leaf):
        end = min(start + leaf, columns)
        if pattern.group:
            scores = (block[start:end] * scale[start:end]).abs_()
            dropped[start:end] = rank(scores) < pattern.zeros
        weights = dropped[start:end] * scale[start:end]
        for i in range(start, end):
            torch.mul(block[i], weights[i - start], out=errors[i])
            block[i + 1 : end].addr_(inverse[i, i + 1 : end], errors[i], alpha=-1)
        block[end:].addmm_(inverse[start:end, end:].t(), errors[start:end], alpha=-1)
    block.masked_fill_(dropped, 0)
    return errors


def _factor(
    hessian: torch.Tensor, dead: torch.Tensor, damping: float, name: str
) -> tuple[torch.Tensor, float, float]:
    """Return R^T (lower triangular) of the damped ``H = R R^T``, the damping, and what it added."""
    alive = torch.where(dead, 1.0, hessian.diagonal().float())
    while True:
        added = damping * float(alive.mean())
        # R with its columns and rows reversed is the lower Cholesky factor of H reversed.
        flipped = hessian.float().flip(0, 1)
        flipped.diagonal().copy_((alive + added).flip(0))
        lower, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not failed:
            return lower.t().flip(0, 1), damping, added
        if damping >= _MOST_DAMPING:
            raise LoramError(
                f"prune.damping must make the Hessian of {name} positive definite, it is not at "
                f"{damping:g} of its mean diagonal; check the calibration inputs of {name}"
            )
        raised = min(max(10 * damping, _LEAST_RAISED), _MOST_DAMPING)
        say(
            "prune",
            f"{name}: Hessian not positive definite, damping raised {damping:g} -> {raised:g}",
        )
        damping = raised


def _upper_inverse(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of the transpose of a lower triangular matrix."""
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.t(), identity, upper=True)


def _share(ratio: float, total: int) -> int:
    return int(Fraction(str(ratio)) * total)


def _energy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().square_().sum()


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor, block: int = 512) -> torch.Tensor:
    """``tr(W H W^T)`` of a transposed weight ``[in, out]``: float64, from H's lower triangle."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        product = torch.mm(hessian[rows, :start].float(), weight[:start]).mul_(2)
        product.addmm_(hessian[rows, rows].float(), weight[rows])
        total += product.mul_(weight[rows]).sum(dtype=torch.float64)
    return total


def _check(weight: torch.Tensor, ratio: float, pattern: Pattern, name: str) -> None:
    if not pattern.group and not 0 <= ratio < 1:
        raise LoramError(
            f"prune.ratio must be at least 0 and below 1, got {ratio}; choose a share of zeros"
        )
    pattern.require(weight.shape[1], name)
    _require_finite(weight, "weight", name)


def _require_finite(tensor: torch.Tensor, what: str, name: str) -> None:
    # Least and greatest carry a NaN with them, and need no mask of the tensor's size.
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise LoramError(
            f"the {what} of {name} must be finite, got NaN or infinity; check the base model and "
            "the calibration data"
        )
