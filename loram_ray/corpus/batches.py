"""Examples of one forward as tensors: padded, or packed behind each other.

Packed examples do not see each other (`isolation`): positions begin anew with each, and the first
token of each carries no label. A forward's examples are the same either way, so its summed loss and
the step that it is part of are too; only padding is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from loram_ray.losses import IGNORED

Row = dict[str, list[int]]
T = TypeVar("T")


def padded(rows: Sequence[Row], padding: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right.

    Args:
        rows: ``input_ids`` and ``labels`` of each example.
        padding: id to fill with.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[batch, longest]``.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], padding) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([filled([IGNORED, *row["labels"][1:]], IGNORED) for row in rows]),
    }


def packed(rows: Sequence[Row], padding: int, in_one: bool = False) -> dict[str, torch.Tensor]:
    """Put examples behind each other, in sequences that are as long as the longest example.

    Args:
        rows: ``input_ids`` and ``labels`` of each example.
        padding: id to fill the sequences' ends with, which are examples of their own.
        in_one: make one sequence of all, which needs no padding (kernels for sequences of varying
            length take it so).

    Returns:
        ``input_ids``, ``positions`` and ``labels``, int64 ``[sequences, length]``.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    length = sum(lengths) if in_one else max(lengths)
    bins = first_fit_decreasing(lengths, length)
    ids = torch.full((len(bins), length), padding)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, chosen in enumerate(bins):
        begin = 0
        for index in chosen:
            end = begin + lengths[index]
            ids[number, begin:end] = torch.tensor(rows[index]["input_ids"])
            positions[number, begin:end] = torch.arange(lengths[index])
            labels[number, begin + 1 : end] = torch.tensor(rows[index]["labels"][1:])
            begin = end
        positions[number, begin:] = torch.arange(length - begin)
    return {"input_ids": ids, "positions": positions, "labels": labels}


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share items out to bins, the longest first, each into the first bin that has room.

    Args:
        lengths: of the items, at most the capacity.
        capacity: of a bin.

    Returns:
        Indices of each bin's items.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def longest_first(items: Sequence[T], length: Callable[[T], int], size: int) -> Iterator[list[T]]:
    """Yield batches of items of about the same length, which need the least padding.

    Args:
        items: to share out.
        length: of an item.
        size: of a batch.
    """
    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
