"""Documents packed into one sequence that do not see each other.

transformers' decoders take position ids that begin anew as a sign of packed sequences: their masks
become block-diagonal, or their kernels work on sequences of varying length.
"""

from __future__ import annotations

import torch


def document_positions(input_ids: torch.Tensor, closing: int) -> torch.Tensor:
    """Positions that begin at 0 with every document.

    Args:
        input_ids: int64 ``[batch, seq]``.
        closing: id of the token that ends a document.

    Returns:
        Int64 ``[batch, seq]``.
    """
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == closing
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return places - places.where(begins, 0).cummax(dim=1).values
