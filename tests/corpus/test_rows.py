"""Rows of files that others wrote: what is lost or ambiguous is refused with its line."""

from __future__ import annotations

import csv
import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import tiny
from loram_ray.config import TextSource
from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.read import BadRow, documents, identify, list_units
from loram_ray.corpus.rows import identify_rows, read_rows
from loram_ray.errors import LoramError
from loram_ray.models.tokenizer import read_template

MARK = b"\xef\xbb\xbf"
COLUMNS = ("prompt", "completion", "text")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[dict[str, Any] | BadRow]:
    [file] = list_files(str(path), "key", EXAMPLES)
    return [row if isinstance(row, BadRow) else row[1] for row in read_rows(file, COLUMNS)]


def refusal(path: Path) -> str:
    with pytest.raises(LoramError) as caught:
        rows_of(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def sums(count: int, delimiter: str) -> list[str]:
    return [f"prompt{delimiter}completion"] + [f"{i}+{i}={delimiter}{2 * i}" for i in range(count)]


# -- quotes


@pytest.mark.parametrize(("suffix", "delimiter"), [("tsv", "\t"), ("csv", ",")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("closing", "said"),
    [
        (None, "close the quote that opens a field, it is not closed"),
        (
            (100, '6 feet 2"'),
            "close the quote that opens a field, but the quoted text runs to line",
        ),
        (
            (8, '6 feet 2"'),
            "close the quote that opens a field, but the quoted text runs to line",
        ),
        (
            (100, '"quoted"'),
            "close a quote where its field ends, it closes within text in line 101",
        ),
        ((100, '6" tall'), "close a quote where its field ends, it closes within text in line 101"),
        ((100, '""'), "close the quote that opens a field, it is not closed"),
        ((7, '"13 inches'), "close a quote where its field ends, it closes within text in line 8"),
    ],
)
def test_a_quote_opened_by_mistake_swallows_no_rows(
    tmp_path: Path,
    suffix: str,
    delimiter: str,
    end: str,
    closing: tuple[int, str] | None,
    said: str,
) -> None:
    lines = sums(200, delimiter)
    lines[6] = f'How long is a foot?{delimiter}"12 inches'
    if closing is not None:
        lines[closing[0]] = f"How tall?{delimiter}{closing[1]}"
    path = write(tmp_path / f"data.{suffix}", end.join(lines) + end)
    assert refusal(path).startswith(f"{path}:7 must {said}")
    with pytest.raises(LoramError, match=r":7 must"):  # before a stage looks for what is complete
        identify_rows(list_files(str(path), "key", EXAMPLES)[0])


@pytest.mark.parametrize(("suffix", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_a_quote_that_closes_in_another_column_swallows_no_rows(
    tmp_path: Path, suffix: str, delimiter: str
) -> None:
    lines = sums(50, delimiter)
    lines[6] = f'How long?{delimiter}"12 inches'
    lines[30] = f'How tall is 6 feet 2"{delimiter}74 inches'
    path = write(tmp_path / f"data.{suffix}", "\n".join(lines))
    assert refusal(path).startswith(
        f"{path}:7 must close the quote that opens a field, but the quoted text runs"
    )


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_a_csv_writer_writes_is_read_back(tmp_path: Path, suffix: str, quoting: Any) -> None:
    draw = random.Random(0)
    words = [
        "one",
        "two,",
        'a "quoted" word',
        "\n",
        "\r\n",
        "\t",
        "- flour, 200 g\n",
        ", ",
        '"',
        "ü",
    ]
    rows = [
        {name: "x" + "".join(draw.choices(words, k=draw.randrange(6))) for name in COLUMNS}
        for _ in range(500)
    ]
    path = tmp_path / f"data.{suffix}"
    with open(path, "w", newline="") as file:
        dialect = {"delimiter": "\t" if suffix == "tsv" else ",", "quoting": quoting}
        writer = csv.DictWriter(file, COLUMNS, **dialect)
        writer.writeheader()
        writer.writerows(rows)
    assert rows_of(path) == rows


@pytest.mark.parametrize(
    "answer",
    [
        "Take:\n- flour, 200 g\n- sugar, 100 g\n- butter, 50 g",
        "line one\nline two",
        "a\n\nb\n",
        "It costs\n1,000 dollars\nand more",
        "def f(a, b):\n    return a, b\n",
    ],
)
def test_honest_answers_of_several_lines_are_read(tmp_path: Path, answer: str) -> None:
    path = write(tmp_path / "data.csv", f'prompt,completion\nq,"{answer}"\nr,"s, t"\n')
    assert rows_of(path) == [
        {"prompt": "q", "completion": answer},
        {"prompt": "r", "completion": "s, t"},
    ]


def test_two_lines_that_could_be_rows_are_a_field_where_quotes_are_used_on_purpose(
    tmp_path: Path,
) -> None:
    ambiguous = 'prompt,completion\nq,"print\nf(1,2)"\n'
    assert "the quoted text runs to line 3" in refusal(write(tmp_path / "a.csv", ambiguous))
    [row, _] = rows_of(write(tmp_path / "b.csv", f'{ambiguous}r,"s, t"\n'))
    assert isinstance(row, dict)
    assert row["completion"] == "print\nf(1,2)"


def test_a_long_line_is_looked_through_for_quotes_in_little_time(tmp_path: Path) -> None:
    long = f'r,"s\nt"{"x," * 200_000}\n'  # by backtracking: minutes
    path = write(tmp_path / "a.csv", f'prompt,completion\nq,"print\nf(1,2)"\n{long}')
    started = time.process_time()
    assert "must close the quote" in refusal(path)
    assert time.process_time() - started < 5


def test_code_that_begins_its_lines_with_tabs_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tsv", 'prompt\tcompletion\nq\t"if a:\n\tb"\nr\ts\n')
    assert rows_of(path)[0] == {"prompt": "q", "completion": "if a:\n\tb"}


def test_quotes_inside_a_field_without_quotes_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tsv", 'prompt\tcompletion\n6" tall\tsay "hi"\n')
    assert rows_of(path) == [{"prompt": '6" tall', "completion": 'say "hi"'}]


def test_a_field_that_never_ends_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loram_ray.corpus import separated

    monkeypatch.setattr(separated, "LONGEST_FIELD", 1000)
    path = write(tmp_path / "data.csv", 'prompt,completion\na,"b\n' + "c\n" * 10_000)
    assert refusal(path).startswith(f"{path}:2 must close the quote that opens a field, it takes")
    path = write(tmp_path / "data.csv", "prompt,completion\na," + "b" * 2000)
    assert f"{path}:2 must" in refusal(path)


def test_ragged_rows_are_bad_at_their_lines(tmp_path: Path) -> None:
    content = 'prompt,completion\na,b\nc\n\nd,e,f\n"g\nh",i\nj,"k\nl",m\n,\n'
    found = rows_of(write(tmp_path / "data.csv", content))
    assert [str(row) for row in found if isinstance(row, BadRow)] == [
        f"{tmp_path}/data.csv:3: it has 1 columns, the header has 2",
        f"{tmp_path}/data.csv:5: it has 3 columns, the header has 2",
        f"{tmp_path}/data.csv:8: it has 3 columns, the header has 2",
    ]
    assert {"prompt": "g\nh", "completion": "i"} in found


# -- headers


def test_headers_without_names_or_with_one_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    for header in (",", '" ",""'):
        assert refusal(write(path, f"{header}\na,b\n")) == (
            f"{path}:1 must name the columns, but is empty; add a header"
        )
    assert rows_of(write(path, "prompt,completion\n")) == []
    assert rows_of(write(path, "")) == []
    # a table's index has no name
    assert rows_of(write(path, ",prompt,completion,\n0,a,b,\n")) == [
        {"": "", "prompt": "a", "completion": "b"}
    ]
    assert refusal(write(path, b"pr\xe9mpt,completion\na,b\n")).startswith(
        f"{path}:1 must be UTF-8"
    )


def test_a_column_twice_is_refused_by_name_in_every_form(tmp_path: Path) -> None:
    names = ["prompt", "completion", "completion"]
    table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"]), pa.array(["b"])], names=names)
    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    nested = pa.table({"messages": pa.ListArray.from_arrays([0, 1], inner)})
    paths = {
        "a.csv": ("prompt,completion,completion\n1+1=,2,two\n", ":1"),
        "a.tsv": ("prompt\tcompletion\tcompletion\n1+1=\t2\ttwo\n", ":1"),
        "marked.csv": (MARK + b"completion,prompt,completion\n2,1+1=,two\n", ":1"),
    }
    for name, (content, line) in paths.items():
        path = write(tmp_path / name, content)
        assert refusal(path) == (
            f"{path}{line} must have one column 'completion', but has several; rename the others"
        )
    for name, column, of in (("a", "completion", table), ("b", "role", nested)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(of, path)
        assert refusal(path).startswith(f"{path} must have one column '{column}', but has several")
        for new in (pa.ipc.new_file, pa.ipc.new_stream):
            path = tmp_path / f"{name}.arrow"
            with pa.OSFile(str(path), "wb") as sink, new(sink, of.schema) as writer:
                writer.write_table(of)
            assert refusal(path).startswith(f"{path} must have one column '{column}'")
    pq.write_table(table.rename_columns(["a", "text", "text"]), tmp_path / "c.parquet")
    with pytest.raises(LoramError, match=r"c.parquet must have one column 'text'"):
        list_units([TextSource(path=str(tmp_path / "c.parquet"))])


def test_a_key_twice_in_an_object_of_json_is_told(tmp_path: Path) -> None:
    twice = '{"prompt": "a", "completion": "b", "completion": "c"}'
    deep = '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}'
    path = write(tmp_path / "data.jsonl", f'{twice}\n{deep}\n{{"text": "a"}}\n')
    assert [str(row) for row in rows_of(path)[:2]] == [
        f"{path}:1: it has the key 'completion' twice",
        f"{path}:2: it has the key 'role' twice",
    ]
    units = list_units([TextSource(path=str(path))])
    assert [type(d) for unit in units for d in documents(unit)] == [BadRow, BadRow, str]
    path = write(tmp_path / "data.json", f'[{{"text": "a"}},\n{twice}]')
    assert refusal(path).startswith(f"{path} must not repeat keys, got 'completion'")


# -- encodings

CONTENTS = {
    "jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n',
    "json": '[{"prompt": "a", "completion": "b"},\n{"prompt": "c", "completion": "d"}]\n',
    "csv": "prompt,completion\na,b\nc,d\n",
    "tsv": "prompt\tcompletion\na\tb\nc\td\n",
    "txt": "Hello.\nAnd good bye.\n",
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("coding", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str, coding: str) -> None:
    if coding and kind not in ("jsonl", "txt"):
        return
    compress = gzip.compress if coding else bytes
    content = CONTENTS[kind].encode()
    plain = write(tmp_path / f"plain.{kind}{coding}", compress(content))
    marked = write(tmp_path / f"marked.{kind}{coding}", compress(MARK + content))
    assert rows_of(plain) == rows_of(marked) != []
    if kind == "txt":
        found = [list_units([TextSource(path=str(path))]) for path in (plain, marked)]
        texts = [[d for unit in units for d in documents(unit)] for units in found]
        assert texts[0] == texts[1] == [CONTENTS["txt"]]


def test_a_text_with_a_mark_is_another_than_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", MARK + b"Hello.")
    [entry] = identify([TextSource(path=str(path))])
    assert str(entry[3]).endswith(" without its byte order mark")
    [file] = list_files(str(path), "key")
    assert identify_rows(file) == entry[3]
    write(path, "Hello.")
    [entry] = identify([TextSource(path=str(path))])
    assert len(str(entry[3])) == 64


def test_a_mark_before_a_chat_template_is_no_token(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jinja", MARK + tiny.CHAT_TEMPLATE.encode())
    assert read_template(path, "train.chat_template") == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_other_encodings_are_refused(tmp_path: Path, kind: str, encoding: str) -> None:
    path = write(tmp_path / f"data.{kind}", CONTENTS[kind].encode(encoding))
    assert refusal(path).startswith(f"{path} must be UTF-8 text, but begins with")
    if kind in ("jsonl", "txt"):
        with pytest.raises(LoramError, match="must be UTF-8 text"):
            [list(documents(unit)) for unit in list_units([TextSource(path=str(path))])]
        path = write(tmp_path / f"data.{kind}.gz", gzip.compress(CONTENTS[kind].encode(encoding)))
        assert refusal(path).startswith(f"{path} must be UTF-8 text, but begins with")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_line_ends_of_old_macs_are_refused(tmp_path: Path, kind: str) -> None:
    content = CONTENTS[kind].replace("\n", "\r")
    path = write(tmp_path / f"data.{kind}", content)
    assert refusal(path).startswith(
        f"{path} must have lines that end in LF or CRLF, but they end in CR"
    )
    expected = rows_of(write(tmp_path / f"lf.{kind}", CONTENTS[kind]))
    windows = write(tmp_path / f"crlf.{kind}", CONTENTS[kind].replace("\n", "\r\n"))
    if kind != "txt":
        assert rows_of(windows) == expected


def test_any_line_ends_are_white_space_in_json(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", CONTENTS["json"].replace("\n", "\r"))
    assert len(rows_of(path)) == 2


def test_a_lone_carriage_return_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "prompt,completion\na,b\nc\rd,e\n")
    assert refusal(path).startswith(f"{path}:3 must end in LF or CRLF, but contains a lone CR")
    path = write(tmp_path / "data.csv", 'prompt,completion\na,"b\rc"\n')
    assert rows_of(path) == [{"prompt": "a", "completion": "b\rc"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("byte", [b"\0", b"\xe9"])
def test_bytes_that_are_no_text_are_bad_at_their_line(
    tmp_path: Path, kind: str, byte: bytes
) -> None:
    lines = (CONTENTS[kind] * 5).encode().splitlines(keepends=True)
    lines[2] = lines[2][:-4] + byte + lines[2][-4:]
    path = write(tmp_path / f"data.{kind}", b"".join(lines))
    [bad] = [row for row in rows_of(path) if isinstance(row, BadRow)]
    assert bad.place == f"{path}:3"


@pytest.mark.parametrize("coding", ["gz", "zst"])
def test_archives_of_several_members_are_read_to_their_end(tmp_path: Path, coding: str) -> None:
    compress = gzip.compress if coding == "gz" else zstd

    def part(*numbers: int) -> bytes:
        rows = [{"prompt": str(number), "completion": str(number)} for number in numbers]
        return compress("".join(json.dumps(row) + "\n" for row in rows).encode())

    path = write(tmp_path / f"a.jsonl.{coding}", part(1, 2, 3) + part(4, 5, 6))
    assert [row["prompt"] for row in rows_of(path) if isinstance(row, dict)] == list("123456")
