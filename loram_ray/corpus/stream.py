"""Packed sequences in a seeded order, streamed to a worker by Ray Data from any position.

The order is a pure function of the seed, so a resumed run asks for the position where it stopped,
and one worker or several see the same global batches. Blocks (row groups) are permuted, then rows
within a block, anew in every epoch: reading stays sequential within a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Block:
    """A row group of a prepared corpus."""

    path: str
    group: int
    rows: int


Beside = Callable[[Block, np.ndarray], dict[str, np.ndarray]]
"""Reads, for some rows of a block, what is kept beside the corpus."""


@dataclass(frozen=True)
class Span:
    """A block at its place in the order: positions ``[start, start + rows)`` over all epochs."""

    path: str
    group: int
    rows: int
    start: int
    shuffle_seed: int


def list_blocks(corpus: Path) -> list[Block]:
    """Return the blocks of a prepared corpus, in the order of their row ids."""
    blocks = []
    for path in sorted(corpus.glob("unit-*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                blocks.append(Block(str(path), group, rows))
    return blocks


def spans(blocks: list[Block], seed: int, start: int, end: int) -> Iterator[Span]:
    """Yield the blocks that hold positions ``[start, end)``, in order, over as many epochs."""
    total = sum(block.rows for block in blocks)
    for epoch in itertools.count(start // total):
        position = epoch * total
        order = np.random.default_rng([seed, epoch])
        for number in order.permutation(len(blocks)):
            if position >= end:
                return
            block = blocks[number]
            if position + block.rows > start:
                shuffle_seed = int(
                    np.random.default_rng([seed, epoch, int(number)]).integers(2**62)
                )
                yield Span(block.path, block.group, block.rows, position, shuffle_seed)
            position += block.rows


@dataclass(frozen=True)
class Share:
    """Which positions a worker takes: its part of each global batch from ``start`` to ``end``."""

    start: int
    end: int
    batch_size: int
    worker: int
    workers: int

    def takes(self, positions: np.ndarray) -> np.ndarray:
        """Mask of the positions that are this worker's."""
        part = self.batch_size // self.workers
        mine = (positions % self.batch_size) // part == self.worker
        return mine & (positions >= self.start) & (positions < self.end)


def read_span(span: Span, share: Share, beside: Beside | None = None) -> dict[str, np.ndarray]:
    """Read a worker's rows of one block, in order.

    Returns:
        ``row_id`` int64 ``[rows]``, ``input_ids`` int32 ``[rows, seq]`` and ``length`` int32
        ``[rows]``; and what is beside them.
    """
    permutation = np.random.default_rng(span.shuffle_seed).permutation(span.rows)
    rows = permutation[share.takes(span.start + np.arange(span.rows))]
    table = pq.ParquetFile(span.path).read_row_group(span.group)
    tokens = table["input_ids"].combine_chunks().flatten().to_numpy()
    return {
        "row_id": table["row_id"].to_numpy()[rows],
        "input_ids": tokens.reshape(span.rows, -1)[rows],
        "length": table["length"].to_numpy()[rows],
        **(beside(Block(span.path, span.group, span.rows), rows) if beside else {}),
    }


def stream(
    blocks: list[Block],
    seed: int,
    share: Share,
    micro_batch_size: int,
    beside: Beside | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Stream a worker's share in micro-batches through Ray Data.

    Args:
        blocks: of the prepared corpus.
        seed: of the order.
        share: the worker's positions.
        micro_batch_size: rows in each yielded batch; divides the worker's part of a global batch.
        beside: reads what else is wanted of the rows.

    Yields:
        Batches as `read_span` describes.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    wanted = [vars(span) for span in spans(blocks, seed, share.start, share.end)]
    dataset = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
        _read_batch, fn_args=(share, beside), batch_size=1
    )
    yield from dataset.iter_batches(
        batch_size=micro_batch_size, prefetch_batches=2, batch_format="numpy"
    )


def _read_batch(
    batch: dict[str, np.ndarray], share: Share, beside: Beside | None
) -> dict[str, np.ndarray]:
    span = Span(
        path=str(batch["path"][0]),
        group=int(batch["group"][0]),
        rows=int(batch["rows"][0]),
        start=int(batch["start"][0]),
        shuffle_seed=int(batch["shuffle_seed"][0]),
    )
    return read_span(span, share, beside)
