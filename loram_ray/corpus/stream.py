"""Stream packed sequences to a worker, in order and from any position, with Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from loram_ray.corpus.columnar import open_parquet
from loram_ray.corpus.order import Block, Chunk, MixedSource, Order
from loram_ray.corpus.sources import list_sources

ExtraColumns = Callable[[Block, np.ndarray], dict[str, np.ndarray]]
"""Function that reads additional columns for some rows of a block."""


def open_order(corpus: Path, seed: int) -> Order:
    """Return the order of a prepared corpus.

    Weighted sources are mixed by weight. Sources without weights are treated as one, with all their
    sequences in each epoch.
    """
    sources = list_sources(corpus)
    mixed = [
        MixedSource(source.name, source.share, tuple(_blocks_of(source.unit_files)))
        for source in sources
    ]
    if sources[0].weight is None:
        together = tuple(block for source in mixed for block in source.blocks)
        mixed = [MixedSource("corpus", 1.0, together)]
    return Order(tuple(mixed), seed)


def list_blocks(corpus: Path) -> list[Block]:
    """Return the blocks of a prepared corpus, in the order of their row ids."""
    sources = list_sources(corpus)
    return [block for source in sources for block in _blocks_of(source.unit_files)]


def _blocks_of(files: Sequence[Path]) -> Iterator[Block]:
    for path in files:
        metadata = open_parquet(path, str(path)).metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                yield Block(str(path), group, rows)


@dataclass(frozen=True)
class Share:
    """Positions that a worker takes: its part of each global batch between ``start`` and ``end``.

    Parts are equal multiples of ``multiple`` rows; the last workers get fewer rows if the batch
    does not divide evenly.
    """

    start: int
    end: int
    batch_size: int
    worker: int
    workers: int
    multiple: int = 1

    @property
    def _part(self) -> int:
        return -(-self.batch_size // (self.workers * self.multiple)) * self.multiple

    @property
    def rows(self) -> int:
        """Number of this worker's rows in each global batch."""
        return min(max(self.batch_size - self.worker * self._part, 0), self._part)

    def takes(self, positions: np.ndarray) -> np.ndarray:
        """Return a mask of this worker's positions."""
        mine = (positions % self.batch_size) // self._part == self.worker
        return mine & (positions >= self.start) & (positions < self.end)


def read_chunk(
    order: Order, chunk: Chunk, share: Share, extra_columns: ExtraColumns | None = None
) -> dict[str, np.ndarray]:
    """Read a worker's rows of one chunk, in order.

    Returns:
        ``row_id`` int64 ``[rows]``, ``input_ids`` int32 ``[rows, seq]``, ``length`` int32
        ``[rows]`` and any additional columns; an empty dictionary if the worker has no rows in the
        chunk.
    """
    parts: list[dict[str, np.ndarray]] = []
    positions: list[np.ndarray] = []
    for piece in order.pieces(chunk):
        mine = share.takes(piece.positions)
        if mine.any():
            parts.append(_read(piece.block, piece.rows[mine], extra_columns))
            positions.append(piece.positions[mine])
    if not parts:
        return {}
    places = np.concatenate(positions).argsort()
    return {name: np.concatenate([part[name] for part in parts])[places] for name in parts[0]}


def read_block(block: Block) -> pa.Table:
    """Read all rows of a block."""
    return open_parquet(Path(block.path), block.path).read_row_group(block.group)


def _read(
    block: Block, rows: np.ndarray, extra_columns: ExtraColumns | None
) -> dict[str, np.ndarray]:
    table = read_block(block)
    return {
        **{name: column[rows] for name, column in columns_of(table).items()},
        **(extra_columns(block, rows) if extra_columns is not None else {}),
    }


def columns_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Return the columns of packed sequences, as described in `read_chunk`."""
    return {
        "row_id": table["row_id"].to_numpy(),
        "input_ids": matrix_of(table["input_ids"]),
        "length": table["length"].to_numpy(),
    }


def matrix_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of fixed-size lists as an array ``[rows, size]``."""
    found: Any = column.combine_chunks()
    return found.flatten().to_numpy().reshape(len(found), -1)


def stream(
    order: Order, share: Share, micro_batch_size: int, extra_columns: ExtraColumns | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Stream a worker's share in micro-batches through Ray Data.

    Args:
        order: Order of the prepared corpus.
        share: Positions of the worker.
        micro_batch_size: Rows per yielded batch; must divide the worker's part of a global batch.
        extra_columns: Function that reads additional columns.

    Yields:
        Batches in the form described in `read_chunk`.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    wanted = [
        {"number": chunk.number, "before": list(chunk.before)}
        for chunk in order.chunks(share.start, share.end)
        if share.takes(order.positions(chunk)).any()
    ]
    dataset = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
        _read_batch, fn_args=(order, share, extra_columns), batch_size=1
    )
    yield from dataset.iter_batches(
        batch_size=micro_batch_size, prefetch_batches=2, batch_format="numpy"
    )


def _read_batch(
    batch: dict[str, np.ndarray], order: Order, share: Share, extra_columns: ExtraColumns | None
) -> dict[str, np.ndarray]:
    before = tuple(int(count) for count in batch["before"][0])
    return read_chunk(order, Chunk(int(batch["number"][0]), before), share, extra_columns)
