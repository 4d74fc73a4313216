"""The order of sequences in training: sources mixed by weight, each in seeded epochs of its own.

The order is a pure function of the sources and the seed, so a resumed run asks for the position
where it stopped, and one worker or several see the same global batches. Which source a position
takes is drawn by the weights. Within a source, blocks (row groups) are permuted, then the rows of
some consecutive ones together, anew in every epoch: no sequence comes twice in an epoch of its
source, and a short training sees several places of the corpus. A source that ends begins its next
epoch while the others go on; training ends with its budget.
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
    """A row group of a prepared corpus."""

    path: str
    group: int
    rows: int


@dataclass(frozen=True)
class MixedSource:
    """A source in a mixture.

    Attributes:
        name: for messages.
        weight: share of the positions, up to a factor that all sources have in common.
        blocks: its sequences.
    """

    name: str
    weight: float
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions.

    Attributes:
        number: which; the chunk holds positions ``[number * chunk, (number + 1) * chunk)``.
        before: sequences that each source gave to earlier chunks.
    """

    number: int
    before: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a block, and the positions that they are at.

    Attributes:
        block: the block.
        rows: numbers of its rows, int64 ``[n]``.
        positions: int64 ``[n]``.
    """

    block: Block
    rows: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Order:
    """Positions from 0 on, and the rows at them.

    Attributes:
        sources: what is mixed.
        seed: of everything that is drawn.
        chunk: positions that are read together.
        window: blocks of a source whose rows are shuffled together.
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
        """Positions of a chunk, int64 ``[chunk]``."""
        return np.arange(chunk.number * self.chunk, (chunk.number + 1) * self.chunk)

    def drawn(self, chunk: int) -> np.ndarray:
        """Number of the source at each position of a chunk, ``[chunk]``."""
        if len(self.sources) == 1:
            return np.zeros(self.chunk, dtype=np.int64)
        weights = np.array([source.weight for source in self.sources])
        generator = np.random.default_rng([self.seed, _MIXING, chunk])
        return generator.choice(len(weights), self.chunk, p=weights / weights.sum())

    def pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """Yield what a chunk is made of; positions ascend within a piece."""
        drawn = self.drawn(chunk.number)
        for number, before in enumerate(chunk.before):
            positions = self.positions(chunk)[drawn == number]
            for block, rows, places in self._rows(number, before, before + len(positions)):
                yield Piece(block, rows, positions[places])

    def visited(self, end: int) -> set[tuple[str, int]]:
        """Path and group of each block with a row at positions below ``end``."""
        return {
            (piece.block.path, piece.block.group)
            for chunk in self.chunks(0, end)
            for piece in self.pieces(chunk)
            if (piece.positions < end).any()
        }

    def _rows(
        self, number: int, start: int, end: int
    ) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
        """Yield the rows ``[start, end)`` of a source over all its epochs, and their places."""
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
