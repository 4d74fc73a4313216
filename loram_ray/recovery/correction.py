"""The LoRA correction: adjust an adapter that was trained on weights other than the base's.

After EMLoC (https://arxiv.org/abs/2506.12015, section 3.3 and the authors' code). Alignment and NF4
change the kept block of a linear: the adapter is trained with ``W_E`` but runs with ``W_0``. With A
``[r, in]``, B ``[out, r]`` and LoRA's scale s, training yields the function ``(W_E + s B A) x``.
The adapter only sees the component of x in the row space of A, so the base must compute the same
function there. Let ``A = P S Q`` be the singular value decomposition. The same product is given by
``A' = Q``, with orthonormal rows, and ``B' = B P S``. An input in the row space of A is ``x = Q^T
z``, for which ``A' x = z``. The correction looks for a ``B_c`` with

    W_0 Q^T z + s B_c z = W_E Q^T z + s B' z    for all z,

which is solved by ``B_c = B' - D``, ``D = (W_0 - W_E) Q^T / s``. On inputs orthogonal to the rows
of A, the adapter has no effect before or after.

D may be larger than B'. Each column of D, one for each direction in A, is scaled down if its mean
magnitude exceeds lambda times that of the same column of B'. The rank of the adapter does not
change. Where nothing was learnt, B is zero and so is the correction.

The authors write ``x A B``, so their U is ``Q^T`` here and their rows of D are columns here. They
have no scale s; it is folded into their B.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthonormal(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A' and B' with the product of A and B, where A' has orthonormal rows.

    If the rank of A is lower than r, the missing directions are zero rows of A' and zero columns of
    B'.

    Args:
        a: A ``[r, in]``.
        b: B ``[out, r]``.

    Returns:
        A' ``[r, in]`` and B' ``[out, r]``, float32.
    """
    left, sizes, rows = torch.linalg.svd(a.double(), full_matrices=False)
    noise = torch.finfo(torch.float32).eps * len(sizes) * sizes[0]
    there = sizes > noise
    new_a, new_b = (
        torch.zeros_like(a, dtype=torch.float32),
        torch.zeros_like(b, dtype=torch.float32),
    )
    new_a[: len(sizes)] = rows.float() * there.unsqueeze(1)
    new_b[:, : len(sizes)] = (b.double() @ (left * (sizes * there))).float()
    return new_a, new_b


def projected(differences: Iterable[torch.Tensor], a: torch.Tensor) -> torch.Tensor | None:
    """Compute ``(W_0 - W_E) A'^T`` from blocks of rows of the difference.

    Args:
        differences: Blocks of rows that together form ``W_0 - W_E``, each float32 ``[n, in]``; one
            block is in memory at a time.
        a: A' of `orthonormal`, ``[r, in]``.

    Returns:
        The product, float32 ``[out, r]``, or None if the difference is zero.
    """
    found, differs = [], False
    for block in differences:
        differs = differs or bool(block.any())
        found.append(block @ a.t())
    return torch.cat(found) if differs else None


def limited(change: torch.Tensor, b: torch.Tensor, limit: float) -> torch.Tensor:
    """Scale columns of D down to a mean magnitude of at most ``limit`` times that of B's columns.

    Args:
        change: D ``[out, r]``.
        b: B' ``[out, r]``.
        limit: The limit lambda.
    """
    size, most = change.abs().mean(0), limit * b.abs().mean(0)
    return change * torch.where(size > most, most / size, 1.0)
