"""Settings of sources; filters, duplicates and held-out documents against plain loops."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny
from helpers.corpora import LENGTH, TEXTS, prepare_here, repetitive, texts_of
from loram_ray.config import CorpusConfig, FilterConfig, SourceConfig, validate
from loram_ray.corpus import duplicates, pack, read
from loram_ray.corpus.duplicates import (
    count_parts,
)
from loram_ray.corpus.selection import Selection
from loram_ray.corpus.sources import Counts
from loram_ray.errors import LoramError


def refusal(**corpus: object) -> str:
    with pytest.raises(LoramError) as caught:
        validate(CorpusConfig, corpus, source="f.yaml")
    return str(caught.value)


def test_settings_that_make_no_sense_are_refused() -> None:
    def one(**source: object) -> str:
        return refusal(sources=[{"path": "a", **source}])

    assert (
        one(weight=0)
        == "f.yaml: sources.0.weight must be greater than 0, got 0; raise it or remove the source"
    )
    assert "weight must be greater than 0, got -1" in one(weight=-1)
    assert "weight" in one(weight=float("nan"))
    assert "weight" in one(weight=float("inf"))
    assert "held_out must be less than 1, got 1" in one(held_out=1)
    assert "filters.keep must be a regular expression, got '('" in one(filters={"keep": "("})
    assert "max_characters must be at least min_characters = 5, got 4" in one(
        filters={"min_characters": 5, "max_characters": 4}
    )
    secret = one(path="s3://key:hidden@bucket/a")
    assert "must not contain credentials" in secret
    assert "hidden" not in secret
    two = [{"path": "a", "weight": 1}, {"path": "b"}]
    assert "sources.1.weight must be given if other sources have one" in refusal(sources=two)
    two = [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}]
    assert "unique names, got 'x' twice" in refusal(sources=two)


def test_names_come_from_the_paths_and_differ() -> None:
    paths = [
        "data/wiki.jsonl.gz",
        "s3://bucket/code/*.parquet?region=x",
        "other/wiki.txt",
        "hf://datasets/org/mathematics",
        "/data/**/*.jsonl",
        "s3://lake/*.jsonl",
        "*.txt",
    ]
    named = SourceConfig(path="x", name="wiki-2")
    config = CorpusConfig(sources=(*(SourceConfig(path=path) for path in paths), named))
    assert config.names() == [
        "wiki",
        "code",
        "wiki-3",
        "mathematics",
        "data",
        "lake",
        "text",
        "wiki-2",
    ]


def test_the_evaluated_text_has_no_settings_of_a_mix() -> None:
    from loram_ray.config import EvaluateConfig

    text = {"sources": [{"path": "a", "weight": 1.0}]}
    with pytest.raises(LoramError, match="text.sources.0.weight is not a known key"):
        validate(EvaluateConfig, {"model": "m", "output": "o", "text": text}, source="f")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"min_characters": 50},
        {"max_characters": 50},
        {"min_characters": 40, "max_characters": 60},
        {"keep": r"Document \d*[05]:"},
        {"drop": "fox"},
        {"keep": "^Doc", "drop": "[13579]:", "min_characters": 34},
    ],
)
def test_filters_keep_what_a_loop_over_the_documents_keeps(
    tmp_path: Path, filters: dict[str, object]
) -> None:
    import re

    path = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    source = SourceConfig(path=str(path), filters=FilterConfig(**filters))  # type: ignore[arg-type]
    [counts] = prepare_here(CorpusConfig(sources=(source,)), tmp_path / "work")
    expected = [
        text
        for text in TEXTS
        if len(text) >= int(str(filters.get("min_characters", 0)))
        and len(text) <= int(str(filters.get("max_characters", 10**9)))
        and re.search(str(filters.get("keep", "")), text)
        and not ("drop" in filters and re.search(str(filters["drop"]), text))
    ]
    assert texts_of([tmp_path / "work" / "unit-000000.parquet"]) == expected
    assert (counts.documents, counts.filtered) == (len(expected), len(TEXTS) - len(expected))


@pytest.mark.parametrize("key", ["keep", "drop"])
def test_a_filter_that_takes_for_ever_on_a_document_is_refused(tmp_path: Path, key: str) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": "short"}, {"text": "a" * 60}])
    source = SourceConfig(path=str(path), filters=FilterConfig(**{key: "(a|a)*b"}))
    with pytest.raises(LoramError) as refused:
        prepare_here(CorpusConfig(sources=(source,)), tmp_path / "work")
    message = str(refused.value)
    assert message.startswith(f"align.corpus.sources.0.filters.{key} must be matched within 1 s")
    assert str(path) in message


@pytest.mark.parametrize("part_documents", [5, 50, 10_000])
@pytest.mark.parametrize("unit_bytes", [100, 700, 100_000])
def test_of_equal_documents_the_first_of_all_sources_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, part_documents: int
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(duplicates, "PART_DOCUMENTS", part_documents)
    draw = random.Random(unit_bytes)
    rows = [repetitive(draw, 50), repetitive(draw, 30), repetitive(draw, 40)]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows[0])
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows[1])).encode())
    )
    pq.write_table(pa.Table.from_pylist(rows[2]), tmp_path / "c.parquet", row_group_size=9)
    sources = (
        # what a filter leaves out hides no copy in a later source
        SourceConfig(path=str(tmp_path / "a.jsonl"), filters=FilterConfig(drop="text 1")),
        SourceConfig(path=str(tmp_path / "b.jsonl.gz")),
        SourceConfig(path=str(tmp_path / "c.parquet")),
    )
    config = CorpusConfig(sources=sources, deduplicate=True)
    counts = prepare_here(config, tmp_path / "work", order=draw)

    seen: set[str] = set()
    expected: list[str] = []
    repeated = filtered = 0
    for number, source in enumerate(rows):
        for row in source:
            if number == 0 and "text 1" in row["text"]:
                filtered += 1
            elif row["text"] in seen:
                repeated += 1
            else:
                seen.add(row["text"])
                expected.append(row["text"])
    assert texts_of(sorted((tmp_path / "work").glob("unit-*.parquet"))) == expected
    total = Counts.sum(counts)
    assert (total.documents, total.duplicates) == (len(expected), repeated)
    assert total.filtered == filtered
    assert total.rows == 120
    assert (count_parts(tmp_path / "work", len(counts)) > 1) == (part_documents < 100)


def test_which_documents_are_held_out_follows_from_content_and_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"number {i}"} for i in range(2000)]
    held_out = {}
    for name, order, unit_bytes in (("a", 1, 10_000), ("b", -1, 300_000)):
        monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows[::order])
        source = SourceConfig(path=str(path), held_out=0.1)
        counts = prepare_here(CorpusConfig(sources=(source,)), tmp_path / name)
        training = texts_of(sorted((tmp_path / name).glob("unit-*.parquet")))
        held_out[name] = texts_of(sorted((tmp_path / name).glob("held_out-*.parquet")))
        assert sorted(training + held_out[name]) == sorted(row["text"] for row in rows)
        total = Counts.sum(counts)
        assert total.held_out_documents == len(held_out[name])
        ids = [
            row_id
            for file in (tmp_path / name).glob("*.parquet")
            for row_id in pq.read_table(file)["row_id"].to_pylist()
        ]
        assert len(ids) == len(set(ids)) == total.sequences + total.held_out_sequences
    assert sorted(held_out["a"]) == sorted(held_out["b"])
    assert 150 < len(held_out["a"]) < 250  # 200 expected, standard deviation 13
    other = Selection(held_out=0.1, seed=1)
    again = {row["text"] for row in rows if other.holds_out(row["text"])}
    assert 5 < len(again & set(held_out["a"])) < 40  # 20 expected
    more = Selection(held_out=0.3)
    assert all(more.holds_out(text) for text in held_out["a"])


@pytest.mark.parametrize("documents_at_once", [1, 3, 1000])
@pytest.mark.parametrize("characters_at_once", [1, 100, 10**6])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_packed_file_is_the_same_however_the_documents_come(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    documents_at_once: int,
    characters_at_once: int,
    rows: int,
) -> None:
    monkeypatch.setattr(pack, "DOCUMENTS_AT_ONCE", documents_at_once)
    monkeypatch.setattr(pack, "CHARACTERS_AT_ONCE", characters_at_once)
    for count in (0, 1, len(TEXTS)):
        texts = TEXTS[:count]
        file = pack.PackedFile(tmp_path / "x.parquet", tokenizer, LENGTH, rows, first_row_id=70)
        for text in texts:
            file.add(text)
        file.close()
        tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]
        table = pq.read_table(tmp_path / "x.parquet")
        expected = [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]
        lengths = [len(row) for row in expected]
        padded = [row + [0] * (LENGTH - len(row)) for row in expected]
        assert table["input_ids"].to_pylist() == padded
        assert table["length"].to_pylist() == lengths
        assert table["row_id"].to_pylist() == list(range(70, 70 + len(expected)))
        assert (file.sequences, file.tokens) == (len(expected), len(tokens))
        metadata = pq.ParquetFile(tmp_path / "x.parquet").metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert set(groups[:-1]) <= {rows}
