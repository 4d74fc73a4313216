"""Documents out of files: units of work, and the rows that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
from pyarrow.lib import ArrowException

from loram_ray.config import TextSource
from loram_ray.corpus.columnar import arrow_batches, open_parquet
from loram_ray.corpus.encoding import BYTE_ORDER_MARK, refuse_other_encodings
from loram_ray.corpus.files import (
    DataFile,
    form_of,
    identify_file,
    list_files,
    open_at,
    open_random,
    read_lines,
)
from loram_ray.errors import LoramError
from loram_ray.runtime.progress import say

CORPUS_KEY = "align.corpus.sources"
_UNIT_BYTES = 8 * 2**20
_ROWS_AT_ONCE = 256
_FILES_AT_ONCE = 16
NAMED_BAD_ROWS = 5


@dataclass(frozen=True)
class Unit:
    """A piece of a file that one task reads: a span of bytes, a row group, or all of it.

    Attributes:
        index: position among all units of the corpus.
        path: the file.
        field: name of the text field.
        start: first byte (a line belongs to the unit in which it starts), or the row group of
            Parquet; 0 in a compressed file and in one of Arrow, which are one unit each.
        end: one past the last byte, where ``start`` is a byte.
        source: position of its source in the corpus.
    """

    index: int
    path: str
    field: str
    start: int
    end: int
    source: int = 0


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used.

    Attributes:
        place: ``file:line``.
        reason: why.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def list_units(sources: Sequence[TextSource], key: str = CORPUS_KEY) -> list[Unit]:
    """Cut every file of a corpus into units, in a fixed order.

    ``key`` is the configuration key of the sources, for messages.
    """
    units: list[Unit] = []
    for number, source in enumerate(sources):
        files = list_files(source.path, f"{key}.{number}.path")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:  # a far file's footer is a round trip
            for file, spans in zip(files, pool.map(_spans, files), strict=True):
                for start, end in spans:
                    units.append(Unit(len(units), file.path, source.text_field, start, end, number))
    return units


def _spans(file: DataFile) -> list[tuple[int, int]]:
    if file.form.kind == ".parquet":
        with open_random(file.path) as stream:
            return [(group, 0) for group in range(open_parquet(stream, file.path).num_row_groups)]
    if file.form.codec is not None or file.form.kind == ".arrow":
        return [(0, file.size)] if file.size else []
    return [(s, min(s + _UNIT_BYTES, file.size)) for s in range(0, file.size, _UNIT_BYTES)]


def identify(sources: Sequence[TextSource], key: str = CORPUS_KEY) -> list[list[object]]:
    """What tells one corpus from another: name, size, field and identity of each file."""
    found: list[list[object]] = []
    for number, source in enumerate(sources):
        files = list_files(source.path, f"{key}.{number}.path")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for file, identity in zip(files, pool.map(identify_file, files), strict=True):
                found.append([file.name, file.size, source.text_field, identity + note_on(file)])
    return found


def note_on(file: DataFile) -> str:
    """What an identity says beside the content: a text's byte order mark is no longer read."""
    if file.form.kind != ".txt":
        return ""
    marked = next(read_lines(file.path), b"").startswith(BYTE_ORDER_MARK.encode())
    return " without its byte order mark" if marked else ""


def documents(unit: Unit) -> Iterator[str | BadRow]:
    """Yield the documents of a unit, and the rows that cannot be read.

    Raises:
        LoramError: a file that can only be read from its beginning is cut or damaged.
    """
    form = form_of(unit.path)
    assert form is not None
    match form.kind:
        case ".parquet":
            yield from _parquet_documents(unit)
        case ".arrow":
            yield from _arrow_documents(unit)
        case ".txt":
            yield from _text_documents(unit, cut=form.codec is not None)
        case _:
            yield from _json_documents(unit)


def documents_of(file: DataFile) -> Iterator[str | BadRow]:
    """Yield the documents of one file, as `documents` does; its text field is ``text``."""
    for start, end in _spans(file):
        yield from documents(Unit(0, file.path, "text", start, end))


def lines_of(unit: Unit) -> Iterator[bytes]:
    """Yield each line that starts in the unit."""
    form = form_of(unit.path)
    if form is not None and form.codec is not None:
        yield from read_lines(unit.path)
        return
    with open_at(unit.path, max(unit.start - 1, 0)) as file:
        position = unit.start
        if unit.start > 0:
            position += len(file.readline()) - 1  # the rest of the line before, or its newline
        else:
            refuse_other_encodings(file.peek(), unit.path)
        while position < unit.end:
            line = file.readline()
            if not line:
                return
            position += len(line)
            yield line


def first_line_number(unit: Unit) -> int:
    """Number (from 1) of the first line that starts in the unit; reads the file up to there."""
    if unit.start == 0:
        return 1
    count, left = 0, unit.start - 1
    with open_random(unit.path) as file:
        while left and (piece := file.read(min(2**20, left))):
            count += piece.count(b"\n")
            left -= len(piece)
    return 2 + count


def parse_document(raw: bytes, field: str, place: str) -> str | BadRow:
    """Return the text of one JSON line, or why there is none."""
    row = parse_object(raw, place)
    if isinstance(row, BadRow):
        return row
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        return BadRow(place, f"field '{field}' holds no text")
    return text


def parse_object(raw: bytes, place: str) -> dict[str, object] | BadRow:
    """Return the object of one JSON line, or why there is none."""
    try:
        # of bytes json would make half surrogate pairs
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_distinct)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except _Repeated as error:
        return BadRow(place, f"it has the key '{error}' twice")
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not JSON ({error})")
    return row if isinstance(row, dict) else BadRow(place, "not a JSON object")


class _Repeated(ValueError):
    """A key that an object has twice."""


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


def refuse_bad_rows(
    bad: Sequence[BadRow], total: int, max_share: float, key: str, count: int | None = None
) -> None:
    """Say how many rows were skipped, or refuse when they are too many.

    Args:
        bad: rows that could not be used, or the first of them.
        total: rows in all.
        max_share: largest share of bad rows that is skipped.
        key: the configuration key of ``max_share``.
        count: how many could not be used; default: those in ``bad``.

    Raises:
        LoramError: the share is exceeded; the message names the first rows.
    """
    count = len(bad) if count is None else count
    if not count:
        return
    first = bad[:NAMED_BAD_ROWS]
    named = "; ".join(str(row) for row in first)
    more = f"; and {count - len(first)} more" if count > len(first) else ""
    if count > max_share * total:
        raise LoramError(
            f"{key} must be at least the share of bad rows, got {max_share} with {count} bad of "
            f"{total}: {named}{more}; mend the rows or raise it"
        )
    say("warning", f"skipped {count} bad rows of {total}: {named}{more}")


def _json_documents(unit: Unit) -> Iterator[str | BadRow]:
    first: int | None = None
    for position, raw in enumerate(lines_of(unit)):
        if not raw.strip():
            continue
        document = parse_document(raw, unit.field, unit.path)
        if isinstance(document, BadRow):
            # Counted only here: for every unit it would read the file half as often as it has units
            first = first or first_line_number(unit)
            document = BadRow(f"{unit.path}:{first + position}", document.reason)
        yield document


def _text_documents(unit: Unit, cut: bool) -> Iterator[str | BadRow]:
    """A document for each unit; a compressed file is cut where the same file unpacked would be."""
    position = number = 0

    def piece_of(line: bytes) -> int:
        nonlocal position
        start, position = position, position + len(line)
        return start // _UNIT_BYTES if cut else 0

    def bad_at(offset: int, reason: str) -> BadRow:
        line = first_line_number(unit) + number + content.count(b"\n", 0, offset)
        return BadRow(f"{unit.path}:{line}", reason)

    for _, group in groupby(lines_of(unit), key=piece_of):
        lines = list(group)
        content = b"".join(lines)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            yield bad_at(error.start, f"not UTF-8 ({error})")
        else:
            if unit.start == number == 0:
                text = text.removeprefix(BYTE_ORDER_MARK)
            if "\0" in text:
                yield bad_at(content.index(b"\0"), "it holds a NUL byte")
            elif text.strip():
                yield text
        number += len(lines)


def _parquet_documents(unit: Unit) -> Iterator[str | BadRow]:
    place = f"{unit.path}:group {unit.start}"
    with open_random(unit.path) as stream:
        file = open_parquet(stream, unit.path, 2**20)  # pages, not the whole row group
        if unit.field not in file.schema_arrow.names:
            yield BadRow(place, f"column '{unit.field}' is not there")
            return
        batches = file.iter_batches(_ROWS_AT_ONCE, [unit.start], [unit.field])
        try:
            yield from _column_documents(batches, unit.field, place)
        except (ArrowException, OSError) as error:
            yield BadRow(place, f"cannot be read ({' '.join(str(error).split())})")


def _arrow_documents(unit: Unit) -> Iterator[str | BadRow]:
    with open_random(unit.path) as file:
        try:
            yield from _column_documents(arrow_batches(file, unit.path), unit.field, unit.path)
        except (ArrowException, OSError) as error:
            raise LoramError(
                f"{unit.path} is cut or damaged ({' '.join(str(error).split())}); get the file "
                "again, or leave it out"
            ) from error


def _column_documents(
    batches: Iterator[pa.RecordBatch], field: str, place: str
) -> Iterator[str | BadRow]:
    number = 0
    for batch in batches:
        if field not in batch.schema.names:
            yield BadRow(place, f"column '{field}' is not there")
            return
        for value in batch.column(field):
            number += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield BadRow(f"{place} row {number}", f"not UTF-8 ({error})")
                continue
            except (ValueError, OverflowError):  # e.g. a date that Python has not
                text = None
            if isinstance(text, str) and text.strip():
                yield text
            else:
                yield BadRow(f"{place} row {number}", "holds no text")
