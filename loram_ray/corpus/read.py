"""Read documents from files, in units of work, and report the rows that cannot be read."""

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
UNIT_BYTES = 8 * 2**20
_ROWS_AT_ONCE = 256
_FILES_AT_ONCE = 16
NAMED_BAD_ROWS = 5


@dataclass(frozen=True)
class Unit:
    """Part of a file that one task reads: a byte range, a row group, or the whole file.

    Attributes:
        index: Position among all units of the corpus.
        path: Path of the file.
        field: Name of the text field.
        start: First byte (a line belongs to the unit in which it starts), or the row group of a
            Parquet file; 0 for compressed and Arrow files, which are one unit each.
        end: End of the byte range, exclusive, if ``start`` is a byte.
        source: Position of the unit's source in the corpus.
    """

    index: int
    path: str
    field: str
    start: int
    end: int
    source: int = 0


@dataclass(frozen=True)
class BadRow:
    """Row that cannot be used.

    Attributes:
        place: Origin as ``file:line``.
        reason: Reason for the error message.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def list_units(sources: Sequence[TextSource], key: str = CORPUS_KEY) -> list[Unit]:
    """Split all files of a corpus into units, in a fixed order.

    Args:
        sources: Sources of the corpus.
        key: Configuration key of the sources for error messages.
    """
    units: list[Unit] = []
    for number, source in enumerate(sources):
        files = list_files(source.path, f"{key}.{number}.path")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:  # a round trip per remote file
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
    return [(s, min(s + UNIT_BYTES, file.size)) for s in range(0, file.size, UNIT_BYTES)]


def identify(sources: Sequence[TextSource], key: str = CORPUS_KEY) -> list[list[object]]:
    """Identify a corpus by the name, size, text field and content of each file."""
    found: list[list[object]] = []
    for number, source in enumerate(sources):
        files = list_files(source.path, f"{key}.{number}.path")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for file, identity in zip(files, pool.map(identify_file, files), strict=True):
                found.append(
                    [file.name, file.size, source.text_field, identity + byte_order_mark_note(file)]
                )
    return found


def byte_order_mark_note(file: DataFile) -> str:
    """Return an identity suffix for text with a byte order mark, which older versions kept."""
    if file.form.kind != ".txt":
        return ""
    marked = next(read_lines(file.path), b"").startswith(BYTE_ORDER_MARK.encode())
    return " without its byte order mark" if marked else ""


def documents(unit: Unit) -> Iterator[str | BadRow]:
    """Yield the documents of a unit and its unreadable rows.

    Raises:
        LoramError: If a file that can only be read from its beginning is truncated or damaged.
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
    """Yield the documents of one file as `documents` does; the text field is ``text``."""
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
    """Return the number (from 1) of the first line in the unit, reading the file up to it."""
    if unit.start == 0:
        return 1
    count, left = 0, unit.start - 1
    with open_random(unit.path) as file:
        while left and (piece := file.read(min(2**20, left))):
            count += piece.count(b"\n")
            left -= len(piece)
    return 2 + count


def parse_document(raw: bytes, field: str, place: str) -> str | BadRow:
    """Return the text of one JSON line, or the reason there is none."""
    row = parse_object(raw, place)
    if isinstance(row, BadRow):
        return row
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        return BadRow(place, f"field '{field}' contains no text")
    return text


def parse_object(raw: bytes, place: str) -> dict[str, object] | BadRow:
    """Return the object of one JSON line, or the reason there is none."""
    try:
        # decode first: from bytes, json would let lone surrogates pass
        row = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_distinct)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()  # rejects lone surrogates
    except _Repeated as error:
        return BadRow(place, f"it has the key '{error}' twice")
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not JSON ({error})")
    return row if isinstance(row, dict) else BadRow(place, "not a JSON object")


class _Repeated(ValueError):
    """Repeated key in a JSON object."""


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


def refuse_bad_rows(
    bad: Sequence[BadRow], total: int, max_share: float, key: str, count: int | None = None
) -> None:
    """Warn about the skipped rows, or fail if there are too many.

    Args:
        bad: Bad rows, or the first of them.
        total: Total number of rows.
        max_share: Maximum share of bad rows.
        key: Configuration key of ``max_share``.
        count: Number of bad rows; defaults to the length of ``bad``.

    Raises:
        LoramError: If the share is exceeded; the message lists the first rows.
    """
    count = len(bad) if count is None else count
    if not count:
        return
    first = bad[:NAMED_BAD_ROWS]
    named = "; ".join(str(row) for row in first)
    more = f"; and {count - len(first)} more" if count > len(first) else ""
    if count > max_share * total:
        raise LoramError(
            f"{key} must be at least the share of bad rows, got {max_share} with {count} bad "
            f"of {total}: {named}{more}; fix the rows or raise it"
        )
    say("warning", f"skipped {count} bad rows of {total}: {named}{more}")


def _json_documents(unit: Unit) -> Iterator[str | BadRow]:
    first: int | None = None
    for position, raw in enumerate(lines_of(unit)):
        if not raw.strip():
            continue
        document = parse_document(raw, unit.field, unit.path)
        if isinstance(document, BadRow):
            # Count lines only on demand: counting for every unit would reread the file many times.
            first = first or first_line_number(unit)
            document = BadRow(f"{unit.path}:{first + position}", document.reason)
        yield document


def _text_documents(unit: Unit, cut: bool) -> Iterator[str | BadRow]:
    """Yield one document per unit; compressed files are split like their decompressed content."""
    position = number = 0

    def piece_of(line: bytes) -> int:
        nonlocal position
        start, position = position, position + len(line)
        return start // UNIT_BYTES if cut else 0

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
                yield bad_at(content.index(b"\0"), "it contains a NUL byte")
            elif text.strip():
                yield text
        number += len(lines)


def _parquet_documents(unit: Unit) -> Iterator[str | BadRow]:
    place = f"{unit.path}:group {unit.start}"
    with open_random(unit.path) as stream:
        file = open_parquet(stream, unit.path, 2**20)  # read pages instead of whole row groups
        if unit.field not in file.schema_arrow.names:
            yield BadRow(place, f"column '{unit.field}' is missing")
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
                f"{unit.path} is truncated or damaged ({' '.join(str(error).split())}); download "
                "it again or remove it"
            ) from error


def _column_documents(
    batches: Iterator[pa.RecordBatch], field: str, place: str
) -> Iterator[str | BadRow]:
    number = 0
    for batch in batches:
        if field not in batch.schema.names:
            yield BadRow(place, f"column '{field}' is missing")
            return
        for value in batch.column(field):
            number += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                yield BadRow(f"{place} row {number}", f"not UTF-8 ({error})")
                continue
            except (ValueError, OverflowError):  # for example a date outside of Python's range
                text = None
            if isinstance(text, str) and text.strip():
                yield text
            else:
                yield BadRow(f"{place} row {number}", "contains no text")
