"""Recovery of LoRA matrices, and merging: the mathematics of LoRAM's steps 4 and 5.

Structured pruning. For a linear with kept indices K: rows pruned, ``B_full[K, :] = B_pruned`` and A
is unchanged; columns pruned, ``A_full[:, K] = A_pruned`` and B is unchanged; everything else is
zero. Then ``B_full A_full = S_out^T (B_pruned A_pruned) S_in`` exactly, S being the selection
matrices.

Non-structured pruning. What was trained is ``s (B A) * M``, which has not A's rank: it is recovered
as it is, or as the nearest product of two matrices of some rank.
"""

from __future__ import annotations

import torch

from loram_ray.plan import KeptIndices

_OVERSAMPLING, _POWER_ITERATIONS = 16, 4


def is_scattered(side: str, kept: KeptIndices | None) -> bool:
    """True where this matrix has the pruned dimension: B of pruned rows, A of pruned columns."""
    return kept is not None and (side == "B") == (kept.axis == 0)


def recover_tensor(
    tensor: torch.Tensor, side: str, kept: KeptIndices | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Scatter one LoRA matrix to the base's shape.

    Args:
        tensor: A ``[r, in]`` or B ``[out, r]``.
        side: ``A`` or ``B``.
        kept: kept rows or columns of the linear, or None where it is whole.
        out: a tensor of the result's shape and dtype to fill and return, instead of a new one.

    Returns:
        A ``[r, full in]`` or B ``[full out, r]`` of the same dtype; the tensor itself where its
        side was not pruned.
    """
    if not is_scattered(side, kept):
        return tensor
    assert kept is not None
    axis = 0 if side == "B" else 1
    if out is None:
        shape = list(tensor.shape)
        shape[axis] = kept.full_size
        out = tensor.new_empty(shape)
    return out.zero_().index_copy_(axis, kept.index, tensor)


def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """``weight + scale * b @ a`` formed in float32, in the weight's dtype.

    Args:
        weight: ``[out, in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: LoRA's alpha / r, or alpha / sqrt(r).
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def dense_delta(
    a: torch.Tensor, b: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """``scale * (b @ a) * mask``: what an adapter adds to a weight, float32 ``[out, in]``.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: LoRA's alpha / r, or alpha / sqrt(r).
        mask: bool ``[out, in]``, or None where every weight was kept.
    """
    delta = (b.float() @ a.float()).mul_(scale)
    return delta if mask is None else delta.mul_(mask)


def truncated(
    delta: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest product of the given rank, by randomised SVD (Halko et al. 2011), seeded.

    Args:
        delta: float32 ``[out, in]``.
        rank: at most ``min(out, in)``.
        dtype: of A and B.

    Returns:
        A ``[rank, in]`` and B ``[out, rank]``, with the singular values shared out between them,
        and the squared Frobenius norm of what ``B A``, rounded to their dtype, misses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampled = min(rank + max(rank, _OVERSAMPLING), *delta.shape)
        u, sizes, v = torch.svd_lowrank(delta, q=sampled, niter=_POWER_ITERATIONS)
    roots = sizes[:rank].sqrt()
    a = (v[:, :rank] * roots).t().contiguous().to(dtype)
    b = (u[:, :rank] * roots).contiguous().to(dtype)
    missed = torch.addmm(delta, b.float(), a.float(), alpha=-1)
    return a, b, squared_norm(missed)


def squared_norm(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
