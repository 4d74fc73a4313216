"""The order of a corpus: weights hold, no row comes twice, any position can be gone on from."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loram_ray.corpus.order import Block, MixedSource, Order
from loram_ray.corpus.sources import SourceInfo, list_sources, write_sources
from loram_ray.corpus.stream import Share, list_blocks, open_order, read_chunk, stream

LENGTH = 4
SIZES = {"web": (7, 7, 3, 5), "mathematics": (6, 2), "code": (9, 9, 9)}
WEIGHTS = {"web": 0.5, "mathematics": 0.25, "code": 0.25}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus: a file a source, a row group a block; tokens say whose row they are."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, sizes in enumerate(SIZES.values()):
        first = number << 32
        with pq.ParquetWriter(folder / f"unit-{number:06d}.parquet", schema()) as writer:
            for size in sizes:
                ids = np.arange(first, first + size)
                within = np.repeat(ids - (number << 32), LENGTH) + 1000 * number
                tokens = pa.array(within.astype(np.int32))
                columns = [ids, pa.FixedSizeListArray.from_arrays(tokens, LENGTH), lengths(size)]
                writer.write_table(pa.table(columns, schema=schema()))
                first += size
    described = [
        SourceInfo(
            name=name,
            weight=None,
            share=sum(sizes) / sum(map(sum, SIZES.values())),
            sequences=sum(sizes),
            unit_files=(folder / f"unit-{number:06d}.parquet",),
            held_out_files=(),
        )
        for number, (name, sizes) in enumerate(SIZES.items())
    ]
    write_sources(folder, described)
    return folder


def schema() -> pa.Schema:
    return pa.schema(
        {"row_id": pa.int64(), "input_ids": pa.list_(pa.int32(), LENGTH), "length": pa.int32()}
    )


def lengths(rows: int) -> pa.Array:
    return pa.array(np.full(rows, LENGTH, dtype=np.int32))


@pytest.fixture(scope="module")
def weighted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same corpus with weights."""
    folder = tmp_path_factory.mktemp("weighted")
    for path in corpus.glob("unit-*.parquet"):
        (folder / path.name).write_bytes(path.read_bytes())
    described = [
        dataclasses.replace(
            source,
            weight=WEIGHTS[source.name],
            share=WEIGHTS[source.name],
            unit_files=tuple(folder / path.name for path in source.unit_files),
        )
        for source in list_sources(corpus)
    ]
    write_sources(folder, described)
    return folder


def mixture(corpus: Path, seed: int = 0, chunk: int = 16) -> Order:
    blocks = list_blocks(corpus)
    sources = tuple(
        MixedSource(name, weight, tuple(b for b in blocks if f"-{number:06d}." in b.path))
        for number, (name, weight) in enumerate(WEIGHTS.items())
    )
    return Order(sources, seed, chunk)


def test_a_prepared_corpus_is_mixed_by_its_weights_or_is_one_where_it_has_none(
    corpus: Path, weighted: Path
) -> None:
    order = open_order(weighted, 3)
    assert [(s.name, s.weight) for s in order.sources] == list(WEIGHTS.items())
    expected = row_ids(mixture(corpus, 3, order.chunk), 2000)
    assert row_ids(order, 2000) == expected
    [only] = open_order(corpus, 3).sources
    assert list(only.blocks) == list_blocks(corpus)


def alone(corpus: Path, seed: int = 0, chunk: int = 16) -> Order:
    return Order(open_order(corpus, seed).sources, seed, chunk)


def row_ids(
    order: Order,
    end: int,
    start: int = 0,
    batch_size: int = 8,
    worker: int = 0,
    workers: int = 1,
) -> list[int]:
    """Row ids that a worker sees, without Ray."""
    share = Share(start, end, batch_size, worker, workers)
    found: list[int] = []
    for chunk in order.chunks(start, end):
        batch = read_chunk(order, chunk, share)
        found += batch["row_id"].tolist() if batch else []
    return found


def source_of(row_id: int) -> int:
    return row_id >> 32


def test_an_epoch_of_one_source_holds_every_row_once_in_an_order_of_its_own(corpus: Path) -> None:
    total = sum(map(sum, SIZES.values()))
    seen = row_ids(alone(corpus), 3 * total)
    epochs = [seen[i * total : (i + 1) * total] for i in range(3)]
    everything = sorted(epochs[0])
    assert len(set(everything)) == total
    assert all(sorted(epoch) == everything != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_no_row_comes_twice_in_an_epoch_of_its_source(corpus: Path) -> None:
    seen = row_ids(mixture(corpus), 1000)
    for number, sizes in enumerate(SIZES.values()):
        mine, total = [r for r in seen if source_of(r) == number], sum(sizes)
        assert len(mine) > 3 * total
        for start in range(0, len(mine) - total, total):
            assert sorted(mine[start : start + total]) == [(number << 32) + i for i in range(total)]


def test_weights_hold_within_the_error_of_sampling(corpus: Path) -> None:
    end = 4000
    counts = Counter(source_of(row) for row in row_ids(mixture(corpus, chunk=64), end))
    for number, weight in enumerate(WEIGHTS.values()):
        error = math.sqrt(end * weight * (1 - weight))
        assert abs(counts[number] - end * weight) < 4 * error
    first, second = ([source_of(r) for r in row_ids(mixture(corpus, s), 64)] for s in (0, 1))
    assert first != second
    runs = 1 + sum(a != b for a, b in zip(first, first[1:], strict=False))
    assert runs > 20  # sources are mixed within a batch, not one after another


def test_only_ratios_of_weights_matter(corpus: Path) -> None:
    order = mixture(corpus)
    larger = tuple(MixedSource(s.name, 40 * s.weight, s.blocks) for s in order.sources)
    assert row_ids(Order(larger, 0, 16), 200) == row_ids(order, 200)


@pytest.mark.parametrize("kind", [alone, mixture])
def test_the_order_follows_from_the_seed_alone(kind: object, corpus: Path) -> None:
    first = row_ids(kind(corpus, 7), 300)  # type: ignore[operator]
    assert row_ids(kind(corpus, 7), 300) == first  # type: ignore[operator]
    assert row_ids(kind(corpus, 8), 300) != first  # type: ignore[operator]


def test_rows_of_a_block_are_not_left_in_their_order(corpus: Path) -> None:
    seen = row_ids(alone(corpus), sum(map(sum, SIZES.values())))
    assert (np.diff(seen) == 1).mean() < 0.4


def test_a_short_training_sees_several_places_of_the_corpus(corpus: Path) -> None:
    """Whole blocks one after another would give few kinds of text to a training of few rows."""
    order = alone(corpus)
    assert len(order.visited(4 * 5)) >= 7  # of nine; the sum of the four smallest holds 16 rows
    total = sum(map(sum, SIZES.values()))
    seen = row_ids(dataclasses.replace(order, window=3), total)
    places = np.searchsorted(np.cumsum([0, *sum(SIZES.values(), ())]), positions_of(seen), "right")
    assert (np.diff(places) != 0).sum() > 20  # blocks mix: one after another, it would be 8
    spans = sorted((f[0], f[-1]) for b in range(1, 10) if len(f := np.flatnonzero(places == b)))
    for before, after in ((spans[:3], spans[3:6]), (spans[3:6], spans[6:])):
        assert max(last for _, last in before) < min(first for first, _ in after)


def positions_of(row_ids: list[int]) -> list[int]:
    """Row ids without gaps between the sources."""
    before = np.cumsum([0, *map(sum, SIZES.values())])
    return [int(before[source_of(row)]) + row % 2**32 for row in row_ids]


@pytest.mark.parametrize("kind", [alone, mixture])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 24, 64])
def test_workers_together_see_the_batches_of_one_worker(
    kind: object, workers: int, batch_size: int, corpus: Path
) -> None:
    order = kind(corpus)  # type: ignore[operator]
    steps = 12
    whole = row_ids(order, steps * batch_size, batch_size=batch_size)
    assert len(whole) == steps * batch_size
    shares = [
        row_ids(order, steps * batch_size, batch_size=batch_size, worker=w, workers=workers)
        for w in range(workers)
    ]
    part = batch_size // workers
    for step in range(steps):
        together = [row for s in shares for row in s[step * part : (step + 1) * part]]
        assert together == whole[step * batch_size : (step + 1) * batch_size]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_position_continues_the_same_sequence(workers: int, corpus: Path) -> None:
    order, end = mixture(corpus), 200
    for worker in range(workers):
        whole = row_ids(order, end, worker=worker, workers=workers)
        for start in range(0, end, 8):
            rest = row_ids(order, end, start, worker=worker, workers=workers)
            assert rest == whole[start // workers :]
    for start in (1, 5, 37, 199):
        assert row_ids(order, end, start) == row_ids(order, end)[start:]


def test_rows_come_with_their_own_tokens_and_what_is_beside_them(corpus: Path) -> None:
    def beside(block: Block, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"group": np.full(len(rows), block.group), "row": rows}

    order = mixture(corpus)
    share = Share(0, 100, 10, 0, 1)
    for chunk in order.chunks(0, 100):
        for row_id, ids, length, group, row in zip(
            *read_chunk(order, chunk, share, beside).values(), strict=True
        ):
            source = source_of(row_id)
            assert ids.tolist() == [row_id % 2**32 + 1000 * source] * LENGTH
            assert length == LENGTH
            sizes = list(SIZES.values())[source]
            assert row_id % 2**32 == sum(sizes[:group]) + row


def test_visited_blocks_are_those_that_rows_come_from(corpus: Path) -> None:
    order = mixture(corpus)
    for end in (1, 9, 30):
        places = set()
        share = Share(0, end, end, 0, 1)
        for chunk in order.chunks(0, end):
            for piece in order.pieces(chunk):
                if share.takes(piece.positions).any():
                    places.add((piece.block.path, piece.block.group))
        assert order.visited(end) == places
    assert len(order.visited(1)) == 1
    assert len(order.visited(3000)) == len(list_blocks(corpus))


@pytest.mark.timeout(300)
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("worker", "workers", "batch_size", "start"), [(0, 1, 8, 0), (1, 2, 8, 24), (3, 4, 64, 64)]
)
def test_ray_data_streams_what_reading_the_chunks_gives(
    embedded_ray: None, corpus: Path, worker: int, workers: int, batch_size: int, start: int
) -> None:
    """With batches larger than chunks, some chunks hold nothing for a worker."""
    order = mixture(corpus)
    share = Share(start, 256, batch_size, worker, workers)
    expected = [read_chunk(order, chunk, share) for chunk in order.chunks(start, 256)]
    found = list(stream(order, share, 2))
    assert [len(batch["row_id"]) for batch in found] == [2] * ((256 - start) // workers // 2)
    for key in ("row_id", "input_ids", "length"):
        together = np.concatenate([batch[key] for batch in found])
        np.testing.assert_array_equal(together, np.concatenate([e[key] for e in expected if e]))
