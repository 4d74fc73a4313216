"""The LoRA correction: an adapter that was trained on other weights than the base's, shifted.

After EMLoC (https://arxiv.org/abs/2506.12015, section 3.3 and its authors' code). Alignment and NF4
move a linear's kept block away from the base's: the adapter was trained beside ``W_E``, and runs
beside ``W_0``. With A ``[r, in]``, B ``[out, r]`` and LoRA's scale s, what was trained is the
function ``(W_E + s B A) x``. The adapter sees of x what lies in the rows of A, so there the base is
to do the same. Let ``A = P S Q`` be the singular value decomposition and, for the same product,
``A' = Q`` with orthonormal rows and ``B' = B P S``. An input among the rows of A is ``x = Q^T z``,
for which ``A' x = z``, and a ``B_c`` is wanted with

    W_0 Q^T z + s B_c z = W_E Q^T z + s B' z    for all z,

which is solved by ``B_c = B' - D``, ``D = (W_0 - W_E) Q^T / s``. Inputs orthogonal to the rows of A
see no adapter, before or after.

D may be larger than what was learnt. Each of its columns, one for each direction in A, is scaled
down where its mean magnitude is more than lambda times that of the same column of B'. The adapter
keeps its rank. Where nothing was learnt, B is zero and so is the correction.

The authors write ``x A B``, so that their U is ``Q^T`` and their rows of D are columns here; they
have no scale s, which is folded into B there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthonormal(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A' and B' with the product of A and B, and orthonormal rows of A'.

    Directions that A has not, its rank being lower than r, are zero rows of A' and zero columns of
    B'.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.

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
    """``(W_0 - W_E) A'^T``, from blocks of rows of the difference; None where that is zero.

    Args:
        differences: float32 ``[some rows, in]`` each, together all of ``W_0 - W_E``; one is in
            memory at a time.
        a: A' of `orthonormal`.

    Returns:
        float32 ``[out, r]``.
    """
    found, differs = [], False
    for block in differences:
        differs = differs or bool(block.any())
        found.append(block @ a.t())
    return torch.cat(found) if differs else None


def limited(change: torch.Tensor, b: torch.Tensor, limit: float) -> torch.Tensor:
    """Scale columns of D down to a mean magnitude of at most ``limit`` times that of B's.

    Args:
        change: D ``[out, r]``.
        b: B' ``[out, r]``.
        limit: lambda.
    """
    size, most = change.abs().mean(0), limit * b.abs().mean(0)
    return change * torch.where(size > most, most / size, 1.0)
