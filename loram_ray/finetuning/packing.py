"""Where the sequences of several batches lie in one pass: packed into rows, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loram_ray.corpus.batches import first_fit_decreasing

Inputs = dict[str, torch.Tensor]

_ATTENTION_WIDTH = 2048
"""Tokens of a row in which attention costs about as much as the linears."""
_SLACKS = (1.0, 1.05, 1.1, 1.2)
"""Of the width that rows would have without filling, those to try."""


def laid_out(batches: Sequence[Inputs]) -> tuple[Inputs, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pack the sequences of batches into rows, those of all batches and without their padding.

    Args:
        batches: ``input_ids`` and either ``attention_mask`` or ``positions``, int64
            ``[rows, seq]`` of one batch each, as `corpus.batches` makes them.

    Returns:
        ``input_ids`` and ``position_ids`` of the pass, int64 ``[rows, longest]``, in which filled
        places are sequences of their own; for each batch ``[rows, seq]`` the place of each token,
        counted through all rows, and whether it is none of padding.
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
    """Which sequences share a row, so that a pass costs little.

    A row's places cost what they cost a linear, and in attention as much again in a row of
    `_ATTENTION_WIDTH`.

    Args:
        lengths: of the sequences, in tokens.

    Returns:
        Indices of each row's sequences.
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
    """Tokens in each row."""
    return [sum(lengths[piece] for piece in row) for row in rows]
