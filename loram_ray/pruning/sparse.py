"""Non-structured criteria: which weights of a linear become zero, and how the others change.

Magnitude and Wanda (arXiv 2306.11695) choose a mask and leave the kept weights unchanged. SparseGPT
(Frantar and Alistarh, ICML 2023, arXiv 2301.00774) updates them to compensate for the zeros. All
criteria are functions of tensors on any device.
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
_LEAST_RAISED = 1e-3  # first step if damping is zero, which multiplication by ten would not raise
_LEAF = 8  # number of columns whose errors are accumulated for one product within a block


@dataclass(frozen=True)
class SparseGptResult:
    """Result of SparseGPT for one linear.

    Attributes:
        weight: Pruned weight, float32 ``[out, in]``, zero where the mask is False and at dead
            inputs.
        mask: Kept weights, bool ``[out, in]``.
        damping: Share of the mean diagonal that was finally added to the Hessian's diagonal.
        error: Relative squared error of the outputs over the calibration inputs, ``tr((W - W') H (W
            - W')^T) / tr(W H W^T)`` with H undamped; 0 if the outputs are zero.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    damping: float
    error: float


def magnitude_mask(
    weight: torch.Tensor, ratio: float, pattern: Pattern, *, name: str = "the linear"
) -> torch.Tensor:
    """Keep the weights with the largest magnitude.

    Unstructured pruning drops the ``floor(ratio * out * in)`` smallest of the whole matrix, with
    the ratio read as an exact decimal; n:m drops the n smallest of each m consecutive inputs of a
    row. Of equal weights, the first in row-major order is dropped first.

    Args:
        weight: Weight of the linear, ``[out, in]``.
        ratio: Share of zeros; ignored for n:m, which sets its own.
        pattern: Allowed positions of zeros.
        name: Name of the linear, for errors.

    Returns:
        Kept weights, bool ``[out, in]``.

    Raises:
        LoramError: If the ratio is not in [0, 1), the weight is not finite, or m does not divide
            the number of inputs.
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

    Unstructured pruning drops the ``floor(ratio * in)`` lowest of each row, with the ratio read as
    an exact decimal; n:m drops the n lowest of each m consecutive inputs of a row. Of equal scores,
    the first in the row is dropped first.

    Args:
        weight: Weight of the linear, ``[out, in]``.
        input_norms: L2 norm of each input over the calibration tokens, ``[in]``.
        ratio: Share of zeros; ignored for n:m, which sets its own.
        pattern: Allowed positions of zeros.
        name: Name of the linear, for errors.

    Returns:
        Kept weights, bool ``[out, in]``.

    Raises:
        LoramError: If the ratio is not in [0, 1), the weight or a norm is not finite, or m does not
            divide the number of inputs.
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
    """Zero weights column by column, updating each row's later weights to compensate (SparseGPT).

    The paper's algorithm 1 pushes errors to the right through U, the upper Cholesky factor of
    ``H^-1``. With ``H = R R^T`` and R upper triangular, U is ``R^-1``. With D = W - W' the changes
    so far, the error pushed into the columns of a block b is ``D R[:, b] R[b, b]^-1``. The same
    weights thus need one factorisation of H and no inverse, and each block is updated by one
    product with the blocks before it.

    Unstructured pruning selects within each block, over all its rows and columns, so that the zeros
    up to any block are the floor of the ratio; n:m selects within each row when it reaches the
    first column of a group. Of equal scores, the first column is dropped first.

    Args:
        weight: Weight of the linear, ``[out, in]``.
        hessian: ``(2 / N) sum x x^T`` of the linear's N calibration inputs, float32 ``[in, in]``;
            not modified.
        ratio: Share of zeros; ignored for n:m, which sets its own.
        pattern: Allowed positions of zeros.
        damping: Share of the mean diagonal that is added to the Hessian's diagonal.
        block_size: Number of columns in a block; n:m rounds it down to a multiple of m, at least m.
        name: Name of the linear, for messages and errors.

    Raises:
        LoramError: If the ratio is not in [0, 1), a weight or the Hessian is not finite, m does not
            divide the number of inputs, or no damping makes the Hessian positive definite.
    """
    _check(weight, ratio, pattern, name)
    _require_finite(hessian, "Hessian of the calibration inputs", name)
    dead = hessian.diagonal() == 0
    # Transposed, so that a column of the linear is one contiguous row.
    change = weight.float().t().contiguous().clone()
    outputs = _output_energy(change, hessian)
    change[dead] = 0
    factor, damping, added = _factor(hessian, dead, damping, name)  # R^T
    pruned, dropped, error = _prune_blocks(change, factor, added, ratio, pattern, block_size)
    return SparseGptResult(
        pruned.t().contiguous(),
        dropped.t().logical_not(),
        damping,
        max(float(error / outputs), 0.0) if outputs > 0 else 0.0,
    )


def _prune_blocks(
    change: torch.Tensor,
    factor: torch.Tensor,
    added: float,
    ratio: float,
    pattern: Pattern,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune all blocks from left to right.

    Args:
        change: Transposed weight, ``[in, out]``; D, transposed, afterwards.
        factor: ``R^T``, ``[in, in]``.
        added: Value that was added to the Hessian's diagonal.
        ratio: Share of zeros, if unstructured.
        pattern: Allowed positions of zeros.
        block_size: Number of columns in a block, before n:m rounds it down.

    Returns:
        Pruned weight and mask of dropped weights, ``[in, out]``, and ``tr(D H D^T)`` in float64.
    """
    columns, rows = change.shape
    if pattern.group:
        block_size = max(block_size // pattern.group, 1) * pattern.group
    pruned = torch.empty_like(change)
    dropped = torch.empty_like(change, dtype=torch.bool)
    error = torch.zeros((), dtype=torch.float64, device=change.device)
    for start in range(0, columns, block_size):
        block = slice(start, min(start + block_size, columns))
        inverse = _upper_inverse(factor[block, block])
        pushed = factor[block, :start] @ change[:start]
        updated = torch.addmm(change[block], inverse.t(), pushed, out=pruned[block])
        zeros = _share(ratio, block.stop * rows) - _share(ratio, start * rows)
        errors = _prune_block(
            updated, inverse, factor.diagonal()[block, None], pattern, zeros, dropped[block]
        )
        change[block] -= updated
        # D (H + added) D^T = (D R)(D R)^T, and D R are the errors.
        error += _energy(errors) - added * _energy(change[block])
    return pruned, dropped, error


def _prune_block(
    block: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    pattern: Pattern,
    zeros: int,
    dropped: torch.Tensor,
) -> torch.Tensor:
    """Prune one block in place, updating its own later columns.

    Args:
        block: Transposed weights with the errors of earlier blocks, ``[columns, out]``.
        inverse: U of these columns, ``[columns, columns]``.
        scale: ``1 / U_ii``, ``[columns, 1]``.
        pattern: Allowed positions of zeros.
        zeros: Number of zeros, if unstructured.
        dropped: Output mask of dropped weights, bool ``[columns, out]``.

    Returns:
        Errors ``w / U_ii`` of the dropped weights, zero elsewhere, ``[columns, out]``.
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
    """Factorise the damped ``H = R R^T``; return ``R^T``, the damping and the value it added."""
    alive = torch.where(dead, 1.0, hessian.diagonal().float())
    while True:
        added = damping * float(alive.mean())
        # R with reversed rows and columns is the lower Cholesky factor of the reversed H.
        flipped = hessian.float().flip(0, 1)
        flipped.diagonal().copy_((alive + added).flip(0))
        lower, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not failed:
            return lower.t().flip(0, 1), damping, added
        if damping >= _MOST_DAMPING:
            raise LoramError(
                f"prune.damping must make the Hessian of {name} positive definite, but {damping:g} "
                f"of its mean diagonal does not; check the calibration inputs of {name}"
            )
        raised = min(max(10 * damping, _LEAST_RAISED), _MOST_DAMPING)
        say(
            "prune",
            f"{name}: Hessian not positive definite, damping raised {damping:g} -> {raised:g}",
        )
        damping = raised


def _upper_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Return the inverse of the transpose of a lower triangular matrix."""
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.t(), identity, upper=True)


def _share(ratio: float, total: int) -> int:
    return int(Fraction(str(ratio)) * total)


def _energy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().square_().sum()


def _output_energy(weight: torch.Tensor, hessian: torch.Tensor, block: int = 512) -> torch.Tensor:
    """Compute ``tr(W H W^T)`` in float64.

    Args:
        weight: Transposed weight, ``[in, out]``.
        hessian: H ``[in, in]``, of which only the lower triangle is read.
        block: Number of rows of H to process at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        product = torch.mm(hessian[rows, :start].float(), weight[:start]).mul_(2)
        product.addmm_(hessian[rows, rows].float(), weight[rows])
        total += product.mul_(weight[rows]).sum(dtype=torch.float64)
    return total


def _check(weight: torch.Tensor, ratio: float, pattern: Pattern, name: str) -> None:
    if not pattern.group and not 0 <= ratio < 1:
        raise LoramError(f"prune.ratio must be at least 0 and below 1, got {ratio}; change it")
    pattern.require(weight.shape[1], name)
    _require_finite(weight, "weight", name)


def _require_finite(tensor: torch.Tensor, what: str, name: str) -> None:
    # Minimum and maximum propagate NaN and need no mask as large as the tensor.
    if not all(bound.isfinite() for bound in tensor.aminmax()):
        raise LoramError(
            f"the {what} of {name} must be finite, got NaN or infinity; check the base model and "
            "the calibration data"
        )
