"""Files of every form and place, and what is kept of a corpus of several sources."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import tiny
from helpers.corpora import COMPRESS, FORMS, TEXTS, read_all, save_to_disk, write_form
from loram_ray.config import TextSource
from loram_ray.corpus import read
from loram_ray.corpus.conversations import conversations
from loram_ray.corpus.files import list_files
from loram_ray.corpus.read import BadRow, list_units
from loram_ray.errors import LoramError


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
        monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
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
    monkeypatch.setattr(read, "UNIT_BYTES", 4)
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
        f"key must be one split of a dataset, but {folder} has train, test; use {folder}/train"
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
        ("file:///absent/a.jsonl", r"has none; check the path$"),
        ("org/name", r"has none; check the path \(on the Hub: hf://datasets/org/name\)"),
        (
            "file://host/a.jsonl",
            "must have three slashes after file: and no host; fix the address",
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


def test_text_that_is_no_unicode_is_a_bad_row_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "half \xed\xa0\x80"}\n{"text": "b"}\n')
    first, bad, last = read_all(path)
    assert (first, last) == ("a", "b")
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:2"
    assert bad.reason.startswith("not JSON")
