"""Define the order of training sequences: sources mixed by weight, each in its own seeded epochs.

The order is a pure function of the sources and the seed. A resumed run therefore asks for the
position at which it stopped, and any number of workers sees the same global batches. The source at
each position is drawn by weight. Within a source, blocks (row groups) are shuffled, then the rows
of consecutive blocks are shuffled together, differently in every epoch: no sequence repeats within
an epoch of its source, and a short training run still samples the whole corpus. A source that ends
starts its next epoch while the others continue; training ends with its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK = 512
WINDOW = 8
_MIXING = 2**32


@dataclass(frozen=True)
class Block:
    """Row group of a prepared corpus."""

    path: str
    group: int
    rows: int


@dataclass(frozen=True)
class MixedSource:
    """Source in a mixture.

    Attributes:
        name: Name for error messages.
        weight: Relative weight; only the ratios between sources matter.
        blocks: Blocks that hold the source's sequences.
    """

    name: str
    weight: float
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Chunk:
    """Range of consecutive positions.

    Attributes:
        number: Index of the chunk, which holds positions ``[number * chunk, (number + 1) *
            chunk)``.
        before: Number of sequences of each source in earlier chunks.
    """

    number: int
    before: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a block and their positions.

    Attributes:
        block: Block that holds the rows.
        rows: Row indices in the block, int64 ``[n]``.
        positions: Position of each row, int64 ``[n]``.
    """

    block: Block
    rows: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Order:
    """Mapping from positions, starting at 0, to rows.

    Attributes:
        sources: Sources to mix.
        seed: Seed of all random draws.
        chunk: Number of positions read together.
        window: Number of blocks of a source whose rows are shuffled together.
    """

    sources: tuple[MixedSource, ...]
    seed: int
    chunk: int = CHUNK
    window: int = WINDOW

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        """Yield the chunks that hold positions ``[start, end)``."""
        before = np.zeros(len(self.sources), dtype=np.int64)
        for number in range(-(-end // self.chunk)):
            if (number + 1) * self.chunk > start:
                yield Chunk(number, tuple(before.tolist()))
            before += np.bincount(self.drawn(number), minlength=len(self.sources))

    def positions(self, chunk: Chunk) -> np.ndarray:
        """Return the positions of a chunk, int64 ``[chunk]``."""
        return np.arange(chunk.number * self.chunk, (chunk.number + 1) * self.chunk)

    def drawn(self, chunk: int) -> np.ndarray:
        """Return the index of the source at each position of a chunk, ``[chunk]``."""
        if len(self.sources) == 1:
            return np.zeros(self.chunk, dtype=np.int64)
        weights = np.array([source.weight for source in self.sources])
        generator = np.random.default_rng([self.seed, _MIXING, chunk])
        return generator.choice(len(weights), self.chunk, p=weights / weights.sum())

    def pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """Yield the pieces of a chunk; positions ascend within a piece."""
        drawn = self.drawn(chunk.number)
        for number, before in enumerate(chunk.before):
            positions = self.positions(chunk)[drawn == number]
            for block, rows, places in self._rows(number, before, before + len(positions)):
                yield Piece(block, rows, positions[places])

    def visited(self, end: int) -> set[tuple[str, int]]:
        """Return path and group of each block with a row at a position below ``end``."""
        return {
            (piece.block.path, piece.block.group)
            for chunk in self.chunks(0, end)
            for piece in self.pieces(chunk)
            if (piece.positions < end).any()
        }

    def _rows(
        self, number: int, start: int, end: int
    ) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
        """Yield rows ``[start, end)`` of a source, counted over all epochs, and their places."""
        blocks = self.sources[number].blocks
        sizes = np.array([block.rows for block in blocks])
        total = int(sizes.sum())
        for epoch in range(start // total, -(-end // total)):
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(blocks))
            lasts = np.minimum(np.arange(len(blocks), step=self.window) + self.window, len(blocks))
            ends = epoch * total + np.cumsum(sizes[order])[lasts - 1]
            for window in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
                which = order[window * self.window : (window + 1) * self.window]
                owners = np.repeat(which, sizes[which])
                first = int(ends[window]) - len(owners)
                if first >= end:
                    break
                shuffled = np.random.default_rng([self.seed, number, epoch, window])
                taken = shuffled.permutation(len(owners))[max(start - first, 0) : end - first]
                rows = np.concatenate([np.arange(size) for size in sizes[which]])[taken]
                owners = owners[taken]
                for block in np.unique(owners):
                    mine = np.flatnonzero(owners == block)
                    yield blocks[block], rows[mine], max(first - start, 0) + mine
