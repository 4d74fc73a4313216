"""Packs the sequences of several batches into the rows of one pass, without their padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loram_ray.corpus.batches import first_fit_decreasing

Inputs = dict[str, torch.Tensor]

_ATTENTION_WIDTH = 2048
"""Row length in tokens at which attention costs about as much as the linears."""
_SLACKS = (1.0, 1.05, 1.1, 1.2)
"""Row widths to try, relative to the width without gaps."""


def laid_out(batches: Sequence[Inputs]) -> tuple[Inputs, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pack the sequences of several batches into rows, without their padding.

    Args:
        batches: Inputs of each batch, as made by `corpus.batches`: ``input_ids`` and either
            ``attention_mask`` or ``positions``, int64 ``[rows, seq]``.

    Returns:
        ``input_ids`` and ``position_ids`` of the pass, int64 ``[rows, longest]``, in which gaps at
        the ends of rows are separate sequences. For each batch, the place of each token, counted
        through all rows, int64 ``[rows, seq]``, and whether the token is not padding, bool
        ``[rows, seq]``.
    """
    seen = [
        batch["attention_mask"].bool()
        if "attention_mask" in batch
        else torch.ones_like(batch["input_ids"], dtype=torch.bool)
        for batch in batches
    ]
    lengths = [int(length) for mask in seen for length in mask.sum(dim=1).tolist()]
    rows = rows_of(lengths)
    loads = _loads(rows, lengths)
    width = max(loads)
    begins = [0] * len(lengths)
    for number, row in enumerate(rows):
        begin = number * width
        for piece in row:
            begins[piece] = begin
            begin += lengths[piece]
    device = batches[0]["input_ids"].device
    ids = torch.zeros(len(rows) * width, dtype=torch.int64, device=device)
    along = torch.arange(width, device=device).repeat(len(rows), 1)
    filled = torch.tensor(loads, device=device)[:, None]
    positions = torch.where(along < filled, along, along - filled).flatten()
    parts = []
    first = 0
    for batch, mask in zip(batches, seen, strict=True):
        height, length = mask.shape
        steps = torch.arange(length, device=device)
        starts = torch.tensor(begins[first : first + height], device=device)[:, None]
        places = torch.where(mask, starts + steps, starts)
        ids[places[mask]] = batch["input_ids"][mask]
        own = batch["positions"] if "positions" in batch else steps.expand(height, length)
        positions[places[mask]] = own[mask]
        parts.append((places, mask))
        first += height
    shape = len(rows), width
    return {"input_ids": ids.view(shape), "position_ids": positions.view(shape)}, parts


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Choose which sequences share a row, minimising the cost of a pass.

    In the linears, each place of a row has the same cost. In attention, a place costs as much again
    in a row of `_ATTENTION_WIDTH` tokens, and in proportion in other rows.

    Args:
        lengths: Length of each sequence in tokens.

    Returns:
        The indices of each row's sequences.
    """
    widest, total = max(lengths), sum(lengths)
    widths = {widest}
    for count in range(1, len(lengths) + 1):
        if total / count <= widest:
            break
        widths |= {int(total / count * slack) + 1 for slack in _SLACKS}

    def cost(rows: list[list[int]]) -> float:
        width = max(_loads(rows, lengths))
        return len(rows) * width * (1 + width / _ATTENTION_WIDTH)

    return min((first_fit_decreasing(lengths, width) for width in sorted(widths)), key=cost)


def _loads(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """Return the number of tokens in each row."""
    return [sum(lengths[piece] for piece in row) for row in rows]
