"""Files of every form and place, and what is kept of a corpus of several sources."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny
from loram_ray.config import CorpusConfig, FilterConfig, SourceConfig, TextSource, validate
from loram_ray.corpus import duplicates, pack, read
from loram_ray.corpus.conversations import conversations
from loram_ray.corpus.duplicates import (
    count_parts,
    duplicates_of,
    find_duplicates,
    write_hashes,
)
from loram_ray.corpus.files import list_files
from loram_ray.corpus.prepare import QUARANTINE_FILE, prepare_corpus, prepare_unit
from loram_ray.corpus.read import BadRow, documents, list_units
from loram_ray.corpus.selection import Selection
from loram_ray.corpus.sources import Counts, list_sources
from loram_ray.errors import LoramError

LENGTH = 16


def read_all(path: Path | str, field: str = "text") -> list[str | BadRow]:
    units = list_units([TextSource(path=str(path), text_field=field)])
    return [document for unit in units for document in documents(unit)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": zstd}


def save_to_disk(folder: Path, texts: list[str], shards: int = 2) -> Path:
    """Lay out a dataset as ``datasets.Dataset.save_to_disk`` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    for number, name in enumerate(names):
        part = texts[len(texts) * number // shards : len(texts) * (number + 1) // shards]
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, len(part), 7):
                rows = part[start : start + 7]
                writer.write_batch(pa.record_batch([list(range(len(rows))), rows], schema=schema))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


TEXTS = [row["text"] for row in tiny.texts(40)] + ["ünïcödé – 日本語 😀", "two\nlines"]


def write_form(folder: Path, form: str) -> Path:
    """Write `TEXTS` in one of the forms that are read."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = folder / f"data.{form}"
    kind, _, coding = form.partition(".")
    if coding:
        path.write_bytes(COMPRESS[coding](lines))
    elif kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=11)
    elif kind == "arrow":
        table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        save_to_disk(path, TEXTS)
    return path


FORMS = ["jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "json.zst", "parquet", "arrow", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_documents_in_their_order(tmp_path: Path, form: str) -> None:
    assert read_all(write_form(tmp_path, form)) == TEXTS
    assert read_all(f"file://{tmp_path}") == TEXTS  # a folder, by an address


@pytest.mark.parametrize("coding", ["gz", "zst"])
def test_compressed_text_is_cut_where_plain_text_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str
) -> None:
    draw = random.Random(0)
    for unit_bytes in (1, 7, 40, 300, 10_000):
        monkeypatch.setattr(read, "_UNIT_BYTES", unit_bytes)
        lines = ["ä" * draw.randrange(30) + "\n" for _ in range(30)] + ["the end"]
        content = "".join(lines).encode()
        (tmp_path / "a.txt").write_bytes(content)
        (tmp_path / f"a.txt.{coding}").write_bytes(COMPRESS[coding](content))
        assert read_all(tmp_path / f"a.txt.{coding}") == read_all(tmp_path / "a.txt")
        assert len(list_units([TextSource(path=str(tmp_path / f"a.txt.{coding}"))])) == 1


def test_archives_of_several_members_are_read_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    first, second = b"".join(lines[:13]) + lines[13][:9], lines[13][9:] + b"".join(lines[14:])
    for coding, compress in COMPRESS.items():
        path = tmp_path / f"data.jsonl.{coding}"
        path.write_bytes(compress(first) + compress(second))
        assert read_all(path) == TEXTS


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_rows_have_their_line_numbers_in_every_form(tmp_path: Path, form: str) -> None:
    lines = [
        '{"text": "a"}',
        "",
        "{",
        '{"text": "b"}',
        "   ",
        "[]",
        '{"text": ""}',
        '{"text": "c"}',
    ]
    content = "\n".join(lines).encode()
    coding = form.partition(".")[2]
    path = tmp_path / f"data.{form}"
    path.write_bytes(COMPRESS[coding](content) if coding else content)
    found = read_all(path)
    assert [row for row in found if isinstance(row, str)] == ["a", "b", "c"]
    places = [row.place for row in found if isinstance(row, BadRow)]
    assert places == [f"{path}:{number}" for number in (3, 6, 7)]


def test_text_that_is_no_utf8_is_bad_at_its_line_in_compressed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_UNIT_BYTES", 4)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\nth\xff\nfour"))
    found = read_all(tmp_path / "a.txt.gz")
    assert [row.place for row in found if isinstance(row, BadRow)] == [f"{tmp_path}/a.txt.gz:3"]
    assert [text for text in found if isinstance(text, str)] == ["one\n", "two\n", "four"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_other_kinds_and_broken_text_are_bad_rows(tmp_path: Path, kind: str) -> None:
    broken = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfeb")],
    )
    for name, column, bad in (("text", broken, [2]), ("number", pa.array([1, 2, 3]), [1, 2, 3])):
        path = tmp_path / f"{name}.{kind}"
        table = pa.table({"text": column})
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table)
        found = read_all(path)
        rows = [row.place.rpartition(" ")[2] for row in found if isinstance(row, BadRow)]
        assert rows == [str(number) for number in bad]
        assert [text for text in found if isinstance(text, str)] == ["a", "b"][: 3 - len(bad)]
    [absent] = read_all(tmp_path / f"text.{kind}", field="body")
    assert isinstance(absent, BadRow)
    assert "column 'body' is missing" in absent.reason


@pytest.mark.parametrize("coding", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_cut_archive_is_refused_wherever_it_is_cut(
    tmp_path: Path, kind: str, coding: str
) -> None:
    draw = random.Random(1)
    rows = [{"text": f"{draw.random()} {text}"} for text in TEXTS * 5]
    whole = COMPRESS[coding]("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / f"data.{kind}.{coding}"
    for cut in (1, 2, 7, 9, 100, len(whole) // 2, len(whole) - 20, len(whole) - 4):
        path.write_bytes(whole[:-cut])
        with pytest.raises(
            LoramError, match=rf"{path} is truncated or damaged past line \d+"
        ) as caught:
            read_all(path)
        assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(whole[:200] + b"\x55" * 60 + whole[260:])
    if coding == "gz":  # which has a checksum
        with pytest.raises(LoramError, match="is truncated or damaged"):
            read_all(path)
    path.write_bytes(b"this is no archive")
    with pytest.raises(LoramError, match="is truncated or damaged past line 0"):
        read_all(path)


def test_a_saved_dataset_is_what_its_state_names(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TEXTS, shards=3)
    shards = sorted(folder.glob("*.arrow"))
    (folder / "cache-0123.arrow").write_bytes(shards[0].read_bytes())
    (tmp_path / "state.json").write_text("[1]")  # of something else
    assert read_all(folder) == TEXTS
    assert read_all(tmp_path) == TEXTS
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(
        LoramError, match=r"data-00001-of-00003.arrow is truncated or damaged .*again"
    ):
        read_all(folder)
    shards[1].unlink()
    with pytest.raises(LoramError, match=r"data-00001-of-00003.arrow is missing; copy"):
        read_all(folder)


def test_one_split_of_a_saved_dataset_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    for split in ("train", "test"):
        save_to_disk(folder / split, TEXTS)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(LoramError) as caught:
        list_files(str(folder), "key")
    assert str(caught.value) == (
        f"key must be one split of a dataset, {folder} holds train, test; write {folder}/train"
    )
    assert read_all(folder / "test") == TEXTS


def test_globs_are_those_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    for name in ("a.jsonl", "b1.txt", "b2.txt", "x/a.jsonl", "x/y/b1.txt", ".h.txt", ".h/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    patterns = ["*", "*.txt", "**/*.txt", "b[12].txt", "b?.txt", "x/**/*", "**/y/*", "x/*", "**"]
    for pattern in patterns:
        for prefix in ("", f"{tmp_path}/"):
            expected = [p for p in glob.glob(prefix + pattern, recursive=True) if Path(p).is_file()]
            found = [file.path for file in list_files(prefix + pattern, "key")]
            assert found == sorted(expected), prefix + pattern
        if "?" not in pattern:  # which begins a query in an address
            addressed = list_files(f"file://{tmp_path}/{pattern}", "key")
            assert [file.path for file in addressed] == [f"file://{path}" for path in found]
    (tmp_path / "odd[1].txt").write_text("x")
    assert len(list_files("odd[1].txt", "key")) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://host/a.jsonl", "must be a local path or begin with s3://, gs://, hf://, file://"),
        ("file:///absent/a.jsonl", r"has none; check it$"),
        ("org/name", r"has none; check it \(on the Hub: hf://datasets/org/name\)"),
        (
            "file://host/a.jsonl",
            "must have three slashes after file:, and no host; fix the address",
        ),
        ("hf://datasets/org/name", "cannot be listed .*offline"),
    ],
)
def test_places_that_cannot_be_read_are_told_in_one_line(path: str, message: str) -> None:
    with pytest.raises(LoramError, match=message) as caught:
        list_files(path, "key")
    assert len(str(caught.value).splitlines()) == 1


def test_examples_come_out_of_compressed_files_too(tmp_path: Path) -> None:
    rows = tiny.questions(5)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    found = list(conversations(str(path), "key"))
    assert [c.answer for c in found if not isinstance(c, BadRow)] == [r["completion"] for r in rows]
    assert [c.place for c in found] == [f"{path}:{1 + 2 * i}" for i in range(5)]


# -- settings


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


# -- what is kept


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def tokens_of(file: Path) -> list[int]:
    table = pq.read_table(file)
    rows = zip(table["input_ids"].to_pylist(), table["length"].to_pylist(), strict=True)
    return [token for ids, length in rows for token in ids[:length]]


def texts_of(files: tuple[Path, ...] | list[Path]) -> list[str]:
    """The documents of prepared files."""
    tokenizer = tiny.tokenizer()
    found = []
    for file in files:
        document: list[int] = []
        for token in tokens_of(file):
            if token == tokenizer.eos_token_id:
                found.append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)
        assert not document
    return found


def prepare_here(
    config: CorpusConfig, work: Path, order: random.Random | None = None
) -> list[Counts]:
    """Prepare every unit in this process, in any order."""
    work.mkdir()
    units = list_units(config.sources)
    shuffled = list(units)
    if order:
        order.shuffle(shuffled)
    parts = 0
    if config.deduplicate:
        for unit in shuffled:
            write_hashes(unit, work, Selection.of(config, unit.source))
        parts = count_parts(work, len(units))
        for part in reversed(range(parts)):
            find_duplicates(part, parts, work, len(units))
    counts: dict[int, Counts] = {}
    for unit in shuffled:
        left_out = duplicates_of(unit.index, parts, work) if parts else None
        selection = Selection.of(config, unit.source)
        counts[unit.index] = prepare_unit(unit, work, LENGTH, tiny.tokenizer(), selection, left_out)
    return [counts[unit.index] for unit in units]


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


def repetitive(draw: random.Random, count: int) -> list[dict[str, str]]:
    return [
        {"text": f"text {draw.randrange(40)}" + " word" * draw.randrange(2)} for _ in range(count)
    ]


@pytest.mark.parametrize("part_documents", [5, 50, 10_000])
@pytest.mark.parametrize("unit_bytes", [100, 700, 100_000])
def test_of_equal_documents_the_first_of_all_sources_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, part_documents: int
) -> None:
    monkeypatch.setattr(read, "_UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(duplicates, "_PART_DOCUMENTS", part_documents)
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
        monkeypatch.setattr(read, "_UNIT_BYTES", unit_bytes)
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
    monkeypatch.setattr(pack, "_DOCUMENTS_AT_ONCE", documents_at_once)
    monkeypatch.setattr(pack, "_CHARACTERS_AT_ONCE", characters_at_once)
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


# -- the whole preparation


@pytest.fixture
def several(tmp_path: Path) -> CorpusConfig:
    """Three sources in four units, with copies, short documents and a bad row."""
    draw = random.Random(5)
    web = [*repetitive(draw, 150), *tiny.texts(60)]
    tiny.write_jsonl(tmp_path / "web.jsonl", web)
    code = [{"text": "short"}, *repetitive(draw, 80), *tiny.texts(70)[30:]]
    lines = [json.dumps(row) for row in code]
    lines.insert(17, "{")
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    save_to_disk(tmp_path / "maths", [f"theorem {i} of {i % 9}" for i in range(60)])
    return CorpusConfig(
        sources=(
            SourceConfig(path=str(tmp_path / "web.jsonl"), weight=2, held_out=0.2),
            SourceConfig(
                path=str(tmp_path / "code.jsonl.gz"),
                weight=1,
                filters=FilterConfig(min_characters=6),
                name="programs",
            ),
            SourceConfig(path=str(tmp_path / "maths"), weight=1, held_out=0.3),
        ),
        deduplicate=True,
        sequence_length=LENGTH,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_prepared_corpus_tells_its_sources_apart(
    embedded_ray: None, base: Path, tmp_path: Path, several: CorpusConfig
) -> None:
    result = prepare_corpus(several, base, tmp_path / "out")
    sources = list_sources(result.output)
    assert [(s.name, s.weight, s.share) for s in sources] == [
        ("web", 2, 0.5),
        ("programs", 1, 0.25),
        ("maths", 1, 0.25),
    ]
    web = [json.loads(line)["text"] for line in (tmp_path / "web.jsonl").read_text().splitlines()]
    with gzip.open(tmp_path / "code.jsonl.gz", "rt") as file:
        lines = file.read().splitlines()
    code = [json.loads(line)["text"] for line in lines if line != "{"]
    maths = [f"theorem {i} of {i % 9}" for i in range(60)]
    seen: set[str] = set()
    for source, texts in zip(sources, (web, code, maths), strict=True):
        kept = [text for text in texts if source.name != "programs" or len(text) >= 6]
        unique = []
        for text in kept:
            if text not in seen:
                seen.add(text)
                unique.append(text)
        training, held_out = texts_of(source.unit_files), texts_of(source.held_out_files)
        assert sorted(training + held_out) == sorted(unique)
        assert training == [text for text in unique if text not in held_out]
        assert bool(held_out) == (source.name != "programs")
        assert (source.documents, source.held_out_documents) == (len(training), len(held_out))
        assert source.filtered == len(texts) - len(kept)
        assert source.duplicates == len(kept) - len(unique)
        assert source.tokens == sum(len(tokens_of(file)) for file in source.unit_files)
        rows = [pq.read_metadata(file).num_rows for file in source.unit_files]
        assert source.sequences == sum(rows)
        rows = [pq.read_metadata(file).num_rows for file in source.held_out_files]
        assert source.held_out_sequences == sum(rows)
    assert [s.bad_rows for s in sources] == [0, 1, 0]
    [bad] = (result.output / QUARANTINE_FILE).read_text().splitlines()
    assert json.loads(bad)["place"] == f"{tmp_path}/code.jsonl.gz:18"
    files = [file for source in sources for file in source.unit_files]
    assert files == sorted(result.output.glob("unit-*.parquet"))
    details = result.manifest.details
    for count in ("documents", "sequences", "tokens", "duplicates", "held_out_sequences"):
        assert details[count] == sum(getattr(source, count) for source in sources)

    # one process, one unit at a time, in another order
    prepare_here(several, tmp_path / "alone", order=random.Random(2))
    for file in result.output.glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


@pytest.mark.timeout(300)
def test_whatever_makes_another_corpus_is_seen(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(20))
    config = CorpusConfig(sources=(SourceConfig(path=str(path)),), sequence_length=LENGTH)
    prepare_corpus(config, base, tmp_path / "out")
    assert prepare_corpus(config, base, tmp_path / "out").skipped

    def changed(**source: object) -> CorpusConfig:
        return config.model_copy(update={"sources": (config.sources[0].model_copy(update=source),)})

    variants = [
        changed(weight=1.0),
        changed(name="other"),
        changed(held_out=0.5),
        changed(filters=FilterConfig(min_characters=1)),
        changed(filters=FilterConfig(drop="x")),
        config.model_copy(update={"deduplicate": True}),
        config.model_copy(update={"seed": 1}),
        config.model_copy(update={"sources": config.sources * 2}),
    ]
    for variant in variants:
        with pytest.raises(LoramError, match="must be a new or empty directory"):
            prepare_corpus(variant, base, tmp_path / "out")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"quick", b"quiet", 1))
    with pytest.raises(LoramError, match="must be a new or empty directory"):
        prepare_corpus(config, base, tmp_path / "out")


@pytest.mark.timeout(300)
def test_a_source_of_which_nothing_is_left_is_refused_by_name(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    good = SourceConfig(path=str(tiny.write_jsonl(tmp_path / "good.jsonl", tiny.texts(20))))
    copy = SourceConfig(path=good.path, name="copy")
    strict = SourceConfig(path=good.path, name="strict", filters=FilterConfig(keep="cat"))
    for source, deduplicate, counts in (
        (strict, False, "20 filtered, 0 duplicates"),
        (copy, True, "0 filtered, 20 duplicates"),
    ):
        config = CorpusConfig(
            sources=(good, source), sequence_length=LENGTH, deduplicate=deduplicate
        )
        with pytest.raises(LoramError) as caught:
            prepare_corpus(config, base, tmp_path / "out")
        assert str(caught.value) == (
            f"align.corpus.sources.1 ({source.name}) must hold text, none of its 20 rows is left "
            f"to train on ({counts}, 0 held out, 0 bad); add some or leave the source out"
        )
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").write_text("")
    empty = SourceConfig(path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(
        LoramError, match=r"sources.1 \(empty\) must hold text, every file is empty"
    ):
        prepare_corpus(CorpusConfig(sources=(good, empty)), base, tmp_path / "out")


@pytest.mark.timeout(300)
def test_a_cut_archive_stops_the_preparation_with_one_line(
    embedded_ray: None, base: Path, tmp_path: Path
) -> None:
    path = write_form(tmp_path, "jsonl.gz")
    path.write_bytes(path.read_bytes()[:-30])
    for deduplicate in (False, True):
        config = CorpusConfig(sources=(SourceConfig(path=str(path)),), deduplicate=deduplicate)
        with pytest.raises(
            LoramError, match=rf"^{path} is truncated or damaged past line"
        ) as caught:
            prepare_corpus(config, base, tmp_path / "out")
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()


PREPARE = """
import sys
from pathlib import Path
from loram_ray.runtime.cluster import ray_session
from loram_ray.config import CorpusConfig, RayConfig
from loram_ray.corpus import read
from loram_ray.corpus.prepare import prepare_corpus
read._UNIT_BYTES = 2000
with ray_session(RayConfig(num_cpus=1)):
    config = CorpusConfig.model_validate_json(sys.argv[1])
    prepare_corpus(config, Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_killed_preparation_continues_to_the_same_corpus(
    embedded_ray: None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_UNIT_BYTES", 2000)
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(1200))
    source = SourceConfig(path=str(path), held_out=0.1)
    config = CorpusConfig(sources=(source,), sequence_length=LENGTH, deduplicate=True)
    whole = prepare_corpus(config, base, tmp_path / "whole")

    command = [sys.executable, "-c", PREPARE, config.model_dump_json(), str(base)]
    process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True)
    work = tmp_path / ".out.work"
    deadline = time.monotonic() + 300
    while len(list(work.glob("unit-*.json"))) < 5 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name for path in work.glob("unit-*.json")}
    assert 5 <= len(done) < len(list_units(config.sources))
    assert not (tmp_path / "out").exists()
    name = min(done).replace(".json", ".parquet")
    inode = (work / name).stat().st_ino

    result = prepare_corpus(config, base, tmp_path / "out")
    assert result.manifest.files == whole.manifest.files
    assert (result.output / name).stat().st_ino == inode
    assert result.manifest.digest == whole.manifest.digest


def test_calibration_draws_the_same_from_a_compressed_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loram_ray.config import CalibrationConfig
    from loram_ray.pruning import text

    def drawn(form: str, samples: int) -> list[list[int]]:
        config = CalibrationConfig.model_validate(
            {
                "sources": [{"path": str(tmp_path / f"data.{form}")}],
                "sequence_length": LENGTH,
                "samples": samples,
            }
        )
        found: list[list[int]] = text.calibration_sequences(config, base, seed=3).tolist()
        return found

    for form in ("jsonl", "jsonl.gz"):
        write_form(tmp_path, form)
    assert drawn("jsonl.gz", 20) == drawn("jsonl", 20)
    whole = drawn("jsonl", 10_000)
    monkeypatch.setattr(text, "_WINDOW_CHARACTERS", 200)  # of a larger piece: in parts, but all
    parts = drawn("jsonl.gz", 10_000)
    assert len(parts) == len(whole)
    assert parts != whole
    texts = tiny.tokenizer().decode([token for row in parts for token in row])
    assert sum(document in texts for document in TEXTS) >= len(TEXTS) - 1


def test_text_that_is_no_unicode_is_a_bad_row_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "half \xed\xa0\x80"}\n{"text": "b"}\n')
    first, bad, last = read_all(path)
    assert (first, last) == ("a", "b")
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:2"
    assert bad.reason.startswith("not JSON")
