"""JSON and YAML from outside: what is read, and that nothing else takes time or a traceback."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from loram_ray.errors import LoramError
from loram_ray.utils import parsing
from loram_ray.utils.parsing import documents

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}], k{i}: 1}}\n" for i in range(1, 40)
)


def refusal(text: str, read: object) -> str:
    """The one line that refuses a text, within a second."""
    start = time.process_time()
    with pytest.raises(LoramError) as caught:
        read(text, "FILE")  # type: ignore[operator]
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.startswith("FILE") and len(message.splitlines()) == 1 and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a": 1}{', "not valid JSON"),
        ("[1]", "must contain a JSON object, got [1]"),
        ("3", "must contain a JSON object"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": %s}' % ("9" * 5000), "5,000 digits"),
        ('{"a": "\\ud800"}', "Unicode"),
        ('{"\\udfff": 1}', "Unicode"),
        ('{\n"a": 1,\n"b": {"a": 1},\n"a": 2}', "'a' in lines 2 and 4"),
        ('{"x": [{"b": 1,\n"\\u0062": 2}]}', "'b' in lines 1 and 2"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested at most 64 levels deep"),
        ('{"a": "\x01"}', "not valid JSON"),
    ],
    ids=range(17),
)
def test_what_is_no_json_document_is_refused(text: str, said: str) -> None:
    assert said in refusal(text, parsing.parse_json)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("a: b: c", "line 1"),
        ("a: \x00", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "got 'a' in lines 1 and 3"),
        ("t:\n  - {x: 1, y: 2, x: 3}\n", "got 'x' in lines 2 and 2"),
        ("a: 1\n'a': 2", "got 'a' in lines 1 and 2"),
        ("1: a\n'1': b", "'1' in lines 1 and 2"),
        ("? [a]\n: b", "text as keys, got a list"),
        ("a: &x [*x]", "must not contain itself"),
        ("a: *nowhere", "not valid YAML"),
        (BOMB, "aliases that add"),
        (MERGED, "aliases that add"),
        ("a: &s '" + "x" * 60_000 + "'\nb: [" + "*s, " * 10_000 + "]", "aliases that add"),
        ("[" * 500_000, "nested"),
        ("- " * 400_000, "nested"),
        ("a: 1.0e+999", "fit into 64 bits"),
        ("a: " + "9" * 5000, "fit into 64 bits"),
        ("a: 0x" + "f" * 5000, "fit into 64 bits"),
        ("a: !!python/object/apply:os.system [true]", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!set {x}", "tag"),
        ("a: !!timestamp 2024-01-01", "tag"),
        ("a: !!int x", "tag"),
        ("a: !!bool x", "tag"),
        ("a: !mine x", "tag"),
        ('a: "\\0"', "NUL"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: 1\n" + "# x\n" * 300_000, "at most"),
    ],
    ids=range(28),
)
def test_what_is_no_yaml_document_is_refused(text: str, said: str) -> None:
    assert said in refusal(text, parsing.parse_yaml)


def test_ordinary_yaml_is_read_as_pyyaml_reads_it() -> None:
    text = """
    base: &b {r: 8, on: [1, 2.5, -3, .inf, 1e3, 1.5e-5, 0x1f, 1_000, true, no, ~, null, '']}
    other: {<<: *b, r: 16}
    list:
      - *b
      - text: |
          two
          lines # and no comment
    """
    assert parsing.parse_yaml(text.replace(" on:", ' "on":'), "FILE") == yaml.safe_load(
        text.replace(" on:", ' "on":')
    )


def test_dates_patterns_and_keys_stay_text() -> None:
    read = parsing.parse_yaml("a: 2024-01-01\nb: 2001-12-14 21:59:43.10\nc: 4:8\nd: 1:30.5", "FILE")
    assert parsing.parse_yaml("1: a\nyes: b\n~: c\n1.5: d", "FILE") == {
        "1": "a",
        "yes": "b",
        "~": "c",
        "1.5": "d",
    }
    assert read == {"a": "2024-01-01", "b": "2001-12-14 21:59:43.10", "c": "4:8", "d": "1:30.5"}


def test_json_is_read_as_the_library_reads_it() -> None:
    values = {"a": [1, -2.5, 1e300, 10**30, True, None, "ü\U0001f600\u0000"], "b": {"a": {}}}
    for ascii_only in (True, False):
        text = json.dumps(values, ensure_ascii=ascii_only)
        assert parsing.parse_json(text, "FILE") == values
        assert parsing.parse_json(b"\xef\xbb\xbf" + text.encode(), "FILE") == values
    assert parsing.parse_json("[Infinity]", "FILE", kind=list, constants=True) == [float("inf")]
    wide = json.dumps([{"a": [i]} for i in range(10_000)])
    assert len(parsing.parse_json(wide, "FILE", kind=list)) == 10_000


def _directory(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist"),
        (_directory, "must be a regular file, got a directory"),
        (os.mkfifo, "must be a regular file, got a FIFO"),
        (_loop, "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "got a device"),
        (lambda path: path.symlink_to(path.with_name("missing")), "does not exist"),
        (lambda path: path.write_bytes(b"{}\n\xff"), "line 2 is not UTF-8"),
        (lambda path: path.write_text("{}").__class__ and os.truncate(path, 2**40), "at most"),
    ],
    ids=["missing", "directory", "pipe", "loop", "device", "dangling", "bytes", "huge"],
)
def test_what_is_no_file_of_text_is_refused(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "file"
    make(path)  # type: ignore[operator]
    for read in (parsing.read_json, parsing.read_yaml, parsing.read_text):
        start = time.process_time()
        with pytest.raises(LoramError) as caught:
            read(path, "some.key")  # type: ignore[operator]
        assert time.process_time() - start < 1
        assert str(caught.value).startswith(f"some.key {path}") and said in str(caught.value)


@pytest.mark.parametrize("path", ["nul\0", "half\ud800", "x" * 300, "f/" * 3000])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(LoramError, match="cannot be read|must be the path"):
        parsing.read_bytes(path, "some.key")


@pytest.mark.parametrize(
    ("text", "comment"),
    [
        ("a #b", "#b"),
        ("#b", "#b"),
        ("[a, b#c, 'd #e'] # f", "# f"),
        ("a#b", None),
        ("'a #b'", None),
        ("ü: 'ü # ü'", None),
        ("{a: 1, # two\n b: 2}", "# two\n b: 2}"),
    ],
)
def test_comments_are_found(text: str, comment: str | None) -> None:
    assert parsing.comment_in(text) == comment


class Example(documents.Document):
    """A document with one bounded number."""

    layers: int = documents.bounded(1, 100)


@pytest.mark.parametrize("value", [True, "3", 3.0, None, 0, 101, 10**30, [3], {"a": 1}], ids=str)
def test_a_documents_values_have_the_types_that_are_written(value: object) -> None:
    with pytest.raises(LoramError, match=r"^FILE: layers must .*, got .*; restore it$"):
        documents.checked(Example, {"layers": value}, "FILE", remedy="restore it")
    assert documents.checked(Example, {"layers": 3, "more": 1}, "FILE").layers == 3
