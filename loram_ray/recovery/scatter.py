"""Recovery of LoRA matrices, and merging: the mathematics of LoRAM's steps 4 and 5.

Structured pruning. For a linear with kept indices K: if rows were pruned, ``B_full[K, :] =
B_pruned`` and A is unchanged; if columns were pruned, ``A_full[:, K] = A_pruned`` and B is
unchanged. All other entries are zero. Then ``B_full A_full = S_out^T (B_pruned A_pruned) S_in``
exactly, where S are the selection matrices.

Non-structured pruning. The trained change is ``s (B A) * M``, whose rank may exceed that of A. It
is recovered exactly as a dense delta, or as the closest product of two matrices of a given rank.
"""

from __future__ import annotations

import torch

from loram_ray.plan import KeptIndices

_OVERSAMPLING, _POWER_ITERATIONS = 16, 4


def is_scattered(side: str, kept: KeptIndices | None) -> bool:
    """Return whether a matrix has the pruned dimension: B for rows, A for columns."""
    return kept is not None and (side == "B") == (kept.axis == 0)


def recover_tensor(
    tensor: torch.Tensor, side: str, kept: KeptIndices | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Scatter one LoRA matrix to the base's shape.

    Args:
        tensor: A ``[r, in]`` or B ``[out, r]``.
        side: Name of the matrix, ``A`` or ``B``.
        kept: Kept rows or columns of the linear, or None if it is unpruned.
        out: Optional output tensor of the result's shape and dtype.

    Returns:
        A ``[r, full in]`` or B ``[full out, r]`` of the same dtype, or the tensor itself if its
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
    """Compute ``weight + scale * b @ a`` in float32 and return it in the weight's dtype.

    Args:
        weight: Weight of the linear, ``[out, in]``.
        a: A ``[r, in]``.
        b: B ``[out, r]``.
        scale: LoRA's alpha / r, or alpha / sqrt(r).
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def dense_delta(
    a: torch.Tensor, b: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Compute an adapter's weight change ``scale * (b @ a) * mask``, float32 ``[out, in]``.

    Args:
        a: A ``[r, in]``.
        b: B ``[out, r]``.
        scale: LoRA's alpha / r, or alpha / sqrt(r).
        mask: Kept weights, bool ``[out, in]``, or None if all were kept.
    """
    delta = (b.float() @ a.float()).mul_(scale)
    return delta if mask is None else delta.mul_(mask)


def truncated(
    delta: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Compute the closest product of a given rank by seeded randomised SVD (Halko et al. 2011).

    Args:
        delta: Weight change, float32 ``[out, in]``.
        rank: Rank of the product, at most ``min(out, in)``.
        dtype: Data type of A and B.

    Returns:
        A ``[rank, in]`` and B ``[out, rank]``, which share the singular values equally, and the
        squared Frobenius norm of the residual ``delta - B A`` after rounding to their dtype.
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
    """Return the squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
