"""Collate the examples of one forward pass, padded or packed.

Packed examples do not attend to each other (see `isolation`): position ids restart with each
example, and its first token has no label. Padding and packing give the same summed loss and the
same optimizer step; packing only avoids padding.
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
        padding: Token id to pad with.

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
    """Pack examples into sequences as long as the longest example.

    Args:
        rows: ``input_ids`` and ``labels`` of each example.
        padding: Token id that fills the end of a sequence; the filler counts as an example of its
            own.
        in_one: Pack all examples into a single sequence without padding, as variable-length
            attention kernels expect.

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
    """Assign items to bins, longest first, each to the first bin with room.

    Args:
        lengths: Item lengths, none greater than `capacity`.
        capacity: Capacity of each bin.

    Returns:
        Item indices of each bin.
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
    """Yield batches of items of similar length, to minimise padding.

    Args:
        items: Items to batch.
        length: Function that returns the length of an item.
        size: Number of items per batch.
    """
    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
