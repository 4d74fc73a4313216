"""Recovery of LoRA matrices, and merging: the mathematics of LoRAM's steps 4 and 5.

For a linear with kept indices K: rows pruned, ``B_full[K, :] = B_pruned`` and A is unchanged;
columns pruned, ``A_full[:, K] = A_pruned`` and B is unchanged; everything else is zero. Then
``B_full A_full = S_out^T (B_pruned A_pruned) S_in`` exactly, S being the selection matrices.
"""

from __future__ import annotations

import torch

from loram_ray.plan import KeptIndices


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
