"""A corpus from files to a stream of packed sequences: nothing lost, nothing twice, same order."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny
from loram_ray.artifacts.manifest import require_stage
from loram_ray.config import CorpusConfig, SourceConfig
from loram_ray.corpus import read
from loram_ray.corpus.files import list_files
from loram_ray.corpus.pack import pack, tokenise
from loram_ray.corpus.prepare import QUARANTINE_FILE, prepare_corpus, prepare_unit
from loram_ray.corpus.read import (
    BadRow,
    Unit,
    documents,
    first_line_number,
    identify,
    lines_of,
    list_units,
    refuse_bad_rows,
)
from loram_ray.errors import LoramError

LENGTH = 16


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def units_of(*paths: Path, field: str = "text") -> list[Unit]:
    return list_units([SourceConfig(path=str(path), text_field=field) for path in paths])


def read_all(units: list[Unit]) -> list[str | BadRow]:
    return [document for unit in units for document in documents(unit)]


LINES = [
    b'{"text": "first"}\n',
    b"\n",
    b'{"text": "a longer line that spans several of the smaller units"}\n',
    '{"text": "ünïcödé – 日本語"}\n'.encode(),
    b'{"text": "windows"}\r\n',
    b"\n",
    b"\n",
    b'{"text": "x"}\n',
    b'{"text": "the last"}',
]


@pytest.mark.parametrize("last_newline", [False, True])
@pytest.mark.parametrize("unit_bytes", [1, 2, 3, 7, 16, 17, 18, 40, 64, 1000])
def test_units_give_every_line_once_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, last_newline: bool
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
    lines = [*LINES[:-1], LINES[-1] + b"\n"] if last_newline else LINES
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(lines))
    units = units_of(path)
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    found = []
    for unit in units:
        number = first_line_number(unit)
        for position, line in enumerate(lines_of(unit)):
            found.append((number + position, line))
    assert found == list(enumerate(lines, start=1))


def test_units_give_every_line_once_for_random_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    path = tmp_path / "data.jsonl"
    for _ in range(100):
        content = bytes(draw.choices(b"ab\n", k=draw.randrange(1, 60)))
        path.write_bytes(content)
        monkeypatch.setattr(read, "UNIT_BYTES", draw.randrange(1, 20))
        units = units_of(path)
        assert b"".join(line for unit in units for line in lines_of(unit)) == content
        for unit in units:
            for position, line in enumerate(lines_of(unit)):
                number = first_line_number(unit) + position
                assert content.splitlines(keepends=True)[number - 1] == line


def test_units_are_numbered_over_all_sources_in_a_fixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 100)
    for name in ("b.jsonl", "a.jsonl"):
        tiny.write_jsonl(tmp_path / name, tiny.texts(10))
    units = units_of(tmp_path / "b.jsonl", tmp_path)
    assert [unit.index for unit in units] == list(range(len(units)))
    names = [Path(unit.path).name for unit in units]
    per_file = len(names) // 3
    assert names == ["b.jsonl"] * per_file + ["a.jsonl"] * per_file + ["b.jsonl"] * per_file
    assert units == units_of(tmp_path / "b.jsonl", tmp_path)


@pytest.mark.parametrize("unit_bytes", [10, 50, 10_000])
def test_bad_json_lines_are_told_with_their_line_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
    lines = [json.dumps(row).encode() for row in tiny.texts(12)]
    bad = {
        3: (lines[2][: len(lines[2]) // 2], "not JSON"),
        4: (b'["text"]', "not a JSON object"),
        7: (b'{"body": "x"}', "field 'text' contains no text"),
        8: (b'{"text": 5}', "field 'text' contains no text"),
        9: (b'{"text": "  "}', "field 'text' contains no text"),
        10: (b'{"text": "\xff"}', "not JSON"),
        11: (b'{"text": "half \\ud83d of a pair"}', "not JSON"),
        12: (lines[11][:-4], "not JSON"),
    }
    for number, (line, _) in bad.items():
        lines[number - 1] = line
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read_all(units_of(path))
    told = {d.place: d.reason for d in found if isinstance(d, BadRow)}
    assert list(told) == [f"{path}:{number}" for number in bad]
    for number, (_, reason) in bad.items():
        assert told[f"{path}:{number}"].startswith(reason)
    good = [row["text"] for i, row in enumerate(tiny.texts(12), start=1) if i not in bad]
    assert [d for d in found if isinstance(d, str)] == good


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_all(units_of(path)) == ["😀"]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n  \n{"text": "b"}\n\n{\n')
    found = read_all(units_of(path))
    assert found[:2] == ["a", "b"]
    assert isinstance(found[2], BadRow)
    assert found[2].place == f"{path}:6"
    assert len(found) == 3


def test_bad_rows_are_skipped_up_to_the_share_and_refused_above(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = [BadRow(f"data.jsonl:{i}", "not JSON") for i in range(1, 8)]
    refuse_bad_rows(bad, 70, 0.1, "align.corpus.max_bad_share")
    told = capsys.readouterr().err
    assert "skipped 7 bad rows of 70" in told
    assert "data.jsonl:5: not JSON; and 2 more" in told
    with pytest.raises(LoramError) as caught:
        refuse_bad_rows(bad, 69, 0.1, "align.corpus.max_bad_share")
    assert str(caught.value) == (
        "align.corpus.max_bad_share must be at least the share of bad rows, got 0.1 with 7 bad of "
        "69: data.jsonl:1: not JSON; data.jsonl:2: not JSON; data.jsonl:3: not JSON; "
        "data.jsonl:4: not JSON; data.jsonl:5: not JSON; and 2 more; fix the rows or raise it"
    )
    with pytest.raises(LoramError):
        refuse_bad_rows(bad[:1], 1000, 0.0, "key")
    refuse_bad_rows([], 0, 0.0, "key")
    assert capsys.readouterr().err == ""


def test_a_text_file_is_a_document_a_unit_cut_between_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "".join(f"Zeile {i}: größer.\n" for i in range(20))
    path = tmp_path / "story.txt"
    path.write_text(content)
    assert read_all(units_of(path)) == [content]
    monkeypatch.setattr(read, "UNIT_BYTES", 50)
    parts = read_all(units_of(path))
    assert len(parts) > 3
    assert all(isinstance(part, str) and part.endswith(".\n") for part in parts)
    assert "".join(str(part) for part in parts) == content


def test_a_text_file_that_is_no_utf8_is_bad_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "UNIT_BYTES", 4)
    path = tmp_path / "story.txt"
    path.write_bytes(b"one\ntwo\nth\xff\nfour")
    found = read_all(units_of(path))
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [row.place for row in bad] == [f"{path}:3"]
    assert [text for text in found if isinstance(text, str)] == ["one\n", "two\n", "four"]


def test_parquet_gives_every_row_group_once(tmp_path: Path) -> None:
    rows = [row["text"] for row in tiny.texts(10)]
    path = tmp_path / "data.parquet"
    table = pa.table({"id": list(range(10)), "body": rows})
    pq.write_table(table, path, row_group_size=3)
    units = units_of(path, field="body")
    assert len(units) == 4
    assert read_all(units) == rows


def test_parquet_rows_without_text_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a", None, " ", "b"]}), path, row_group_size=2)
    found = read_all(units_of(path))
    places = [row.place for row in found if isinstance(row, BadRow)]
    assert places == [f"{path}:group 0 row 2", f"{path}:group 1 row 1"]
    [bad] = read_all(units_of(path, field="body"))[:1]
    assert isinstance(bad, BadRow)
    assert "column 'body' is missing" in bad.reason


def test_a_file_that_only_says_it_is_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 no, it is not PAR1")
    with pytest.raises(LoramError, match=r"data.parquet is not a Parquet file") as caught:
        units_of(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_row_group_is_bad_and_the_others_are_read(tmp_path: Path) -> None:
    rows = [str(i) * 300 for i in range(4)]
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"text": rows}), path, row_group_size=2, compression="gzip", use_dictionary=False
    )
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    found = read_all(units_of(path))
    assert isinstance(found[0], BadRow)
    assert "cannot be read" in found[0].reason
    assert found[1:] == rows[2:]


def test_directories_and_globs_name_files_and_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.jsonl", "deep/c.jsonl", "notes.md"):
        (tmp_path / name).write_text("x")

    def names(path: str) -> list[str]:
        files = list_files(str(tmp_path / path), "key")
        return [str(Path(file.path).relative_to(tmp_path)) for file in files]

    assert names("") == ["a.jsonl", "b.txt", "deep/c.jsonl"]
    assert names("*.jsonl") == ["a.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "deep/c.jsonl"]
    with pytest.raises(LoramError, match=r"key must name files in the formats .*absent.* has none"):
        names("absent/*.jsonl")
    with pytest.raises(
        LoramError, match=r"key must name files in the formats .*got .*notes.md; convert it"
    ):
        names("*.md")


def test_identity_sees_names_sizes_and_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    content = b"a" * 200_000
    seen = []
    for variant in (content, b"b" + content[1:], content[:-1] + b"b", content + b"a"):
        path.write_bytes(variant)
        seen.append(identify([SourceConfig(path=str(path))]))
    path.rename(tmp_path / "other.txt")
    seen.append(identify([SourceConfig(path=str(tmp_path / "other.txt"))]))
    seen.append(identify([SourceConfig(path=str(tmp_path / "other.txt"), text_field="b")]))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.parametrize("sizes", [[], [1], [4], [3, 5], [8, 8], [1] * 13, [40], [7, 0, 9]])
def test_packing_is_that_of_one_long_list(sizes: list[int]) -> None:
    documents = [list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    sequences, lengths = pack(documents, 4, padding=-1)
    tokens = [token for document in documents for token in document]
    expected = [tokens[start : start + 4] for start in range(0, len(tokens), 4)]
    assert lengths.tolist() == [len(row) for row in expected]
    assert sequences.tolist() == [row + [-1] * (4 - len(row)) for row in expected]
    assert sequences.dtype == lengths.dtype == np.int32
    assert sequences.shape == (len(expected), 4)


def test_tokenising_closes_each_document_and_adds_nothing_else(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [row["text"] for row in tiny.texts(600)]  # more than one batch of documents
    found = list(tokenise(tokenizer, texts))
    assert len(found) == 600
    for text, ids in zip(texts, found, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text
        assert len(ids) == len(text.encode()) + 1  # the tokenizer knows bytes only


def test_a_tokenizer_without_an_end_of_text_token_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(LoramError, match="must have an end-of-text token"):
        list(tokenise(tokenizer, ["text"]))


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """Three kinds of files in four units: each may be another worker's, which takes seconds."""
    monkeypatch.setattr(read, "UNIT_BYTES", 3000)
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(60))
    (tmp_path / "b.txt").write_text("A story.\n" * 130)
    rows = [row["text"] for row in tiny.texts(9)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "c.parquet")
    names = ("a.jsonl", "b.txt", "c.parquet")
    sources = tuple(SourceConfig(path=str(tmp_path / name)) for name in names)
    return CorpusConfig(sources=sources, sequence_length=LENGTH)


def tokens_of(file: Path) -> list[int]:
    """The tokens of one prepared file, without the padding of its last sequence."""
    table = pq.read_table(file)
    rows = zip(table["input_ids"].to_pylist(), table["length"].to_pylist(), strict=True)
    return [token for ids, length in rows for token in ids[:length]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_preparation_keeps_every_token_of_every_document_once(
    embedded_ray: None, base: Path, tmp_path: Path, mixed: CorpusConfig
) -> None:
    tokenizer = tiny.tokenizer()
    result = prepare_corpus(mixed, base, tmp_path / "prepared")
    assert not result.skipped
    # what each unit holds, from the files alone: a line belongs where its first byte is
    expected: list[list[str]] = []
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    starts = np.cumsum([0, *(len(line) for line in lines)])
    for start in range(0, int(starts[-1]), 3000):
        inside = [x for x, s in zip(lines, starts, strict=False) if start <= s < start + 3000]
        expected.append([json.loads(line)["text"] for line in inside])
    assert len(expected) == 2
    expected += [["A story.\n" * 130], [row["text"] for row in tiny.texts(9)]]

    files = sorted(result.output.glob("unit-*.parquet"))
    assert len(files) == len(expected)
    row_ids: list[int] = []
    for file, texts in zip(files, expected, strict=True):
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        assert tokens_of(file) == [token for document in ids for token in document]
        lengths = pq.read_table(file)["length"].to_pylist()
        assert set(lengths[:-1]) <= {LENGTH}
        row_ids += pq.read_table(file)["row_id"].to_pylist()
    assert row_ids == sorted(set(row_ids))
    details = result.manifest.details
    assert details["documents"] == sum(len(texts) for texts in expected)
    assert details["tokens"] == sum(len(tokens_of(file)) for file in files)
    assert details["sequences"] == len(row_ids)
    assert details["bad_rows"] == 0
    assert not (result.output / QUARANTINE_FILE).exists()
    require_stage(result.output, ("corpus",), "key")


@pytest.mark.timeout(300)
def test_preparation_is_repeatable_reused_and_continued(
    embedded_ray: None, base: Path, tmp_path: Path, mixed: CorpusConfig
) -> None:
    one = prepare_corpus(mixed, base, tmp_path / "one")
    two = prepare_corpus(mixed, base, tmp_path / "two")
    assert not two.skipped
    assert two.manifest.files == one.manifest.files
    before = tiny.tree(one.output)
    assert prepare_corpus(mixed, base, tmp_path / "one").skipped
    assert tiny.tree(one.output) == before

    # what a killed preparation leaves: some units, and one that is not whole
    units = list_units(mixed.sources)
    work = tmp_path / ".three.work"
    work.mkdir()
    (work / "identity").write_text(one.manifest.identity)
    done = units[1::2]
    for unit in done:
        prepare_unit(unit, work, LENGTH, tiny.tokenizer())
    kept = {f"unit-{u.index:06d}.parquet" for u in done}
    inodes = {name: (work / name).stat().st_ino for name in kept}
    (work / "unit-000000.tmp").write_bytes(b"half")
    (work / "unit-000002.parquet").write_bytes(b"half")

    three = prepare_corpus(mixed, base, tmp_path / "three")
    assert three.manifest.files == one.manifest.files
    assert {name: (three.output / name).stat().st_ino for name in kept} == inodes
    assert not work.exists()


@pytest.mark.timeout(300)
def test_another_corpus_or_tokenizer_is_not_taken_for_the_prepared_one(
    embedded_ray: None, base: Path, tmp_path: Path, mixed: CorpusConfig
) -> None:
    source = CorpusConfig(sources=mixed.sources[1:2], sequence_length=LENGTH)
    prepare_corpus(source, base, tmp_path / "out")
    longer = source.model_copy(update={"sequence_length": LENGTH * 2})
    with pytest.raises(LoramError, match="corpus.output must be a new or empty directory"):
        prepare_corpus(longer, base, tmp_path / "out")
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|im_end|>"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LoramError, match="out must be tokenised with .*other .* contains a corpus"):
        prepare_corpus(source, other, tmp_path / "out")


@pytest.mark.timeout(300)
def test_bad_rows_are_put_aside_or_the_corpus_is_refused(
    embedded_ray: None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(18))
    with open(path, "a") as file:
        file.write('{"text": "cut in the mid\n{"title": "no text"}\n')
    config = CorpusConfig(
        sources=(SourceConfig(path=str(path)),), sequence_length=LENGTH, max_bad_share=0.1
    )
    result = prepare_corpus(config, base, tmp_path / "out")
    assert (result.manifest.details["documents"], result.manifest.details["bad_rows"]) == (18, 2)
    rows = [json.loads(x) for x in (result.output / QUARANTINE_FILE).read_text().splitlines()]
    assert [row["place"] for row in rows] == [f"{path}:19", f"{path}:20"]
    assert rows[0]["reason"].startswith("not JSON")
    assert "skipped 2 bad rows of 20" in capsys.readouterr().err

    strict = config.model_copy(update={"max_bad_share": 0.09})
    with pytest.raises(LoramError, match=r"got 0.09 with 2 bad of 20: .*data.jsonl:19: not JSON"):
        prepare_corpus(strict, base, tmp_path / "strict")
    assert not (tmp_path / "strict").exists()
    assert not (tmp_path / ".strict.partial").exists()


@pytest.mark.timeout(300)
def test_a_corpus_without_text_is_refused(embedded_ray: None, base: Path, tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "data.jsonl").write_text(content)
        source = SourceConfig(path=str(tmp_path / "data.jsonl"))
        with pytest.raises(
            LoramError, match=r"align.corpus.sources.* must contain text, .* add some"
        ):
            prepare_corpus(CorpusConfig(sources=(source,)), base, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    source = SourceConfig(path=str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.texts(3))))
    with pytest.raises(LoramError, match="has no tokenizer") as caught:
        prepare_corpus(CorpusConfig(sources=(source,)), tmp_path / "model", tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert set(tiny.tree(tmp_path)) == {"data.jsonl", "model"}
