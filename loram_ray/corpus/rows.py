"""Rows of a table, whatever kind of file it is kept in."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
from pyarrow.lib import ArrowException

from loram_ray.columnar import arrow_batches, open_parquet
from loram_ray.corpus.files import DataFile, open_at, open_random, read_lines
from loram_ray.corpus.read import BadRow, documents_of, parse_object
from loram_ray.errors import LoramError

_ROWS_AT_ONCE = 256
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

Row = tuple[str, dict[str, Any]]
"""Where a row is, and its values by the names of their columns."""


def read_rows(file: DataFile, columns: Collection[str]) -> Iterator[Row | BadRow]:
    """Yield the rows of a file, and what is none.

    All but ``.json`` is read piece by piece. A text file's rows have one column, ``text``.

    Args:
        file: any that `files.EXAMPLES` has.
        columns: those that are wanted; of files of columns no others are read.

    Raises:
        LoramError: a file that can only be read from its beginning is cut or damaged.
    """
    match file.form.kind:
        case ".jsonl":
            yield from _json_lines(file)
        case ".json":
            yield from _json_array(file) if _is_array(file) else _json_lines(file)
        case ".csv" | ".tsv":
            yield from _separated(file)
        case ".txt":
            for number, text in enumerate(documents_of(file), start=1):
                place = f"{file.path} part {number}"
                yield text if isinstance(text, BadRow) else (place, {"text": text})
        case _:
            yield from _columns(file, columns)


def _json_lines(file: DataFile) -> Iterator[Row | BadRow]:
    for line, raw in enumerate(read_lines(file.path), start=1):
        if raw.strip():
            place = f"{file.path}:{line}"
            row = parse_object(raw, place)
            yield row if isinstance(row, BadRow) else (place, row)


def _is_array(file: DataFile) -> bool:
    with open_at(file.path) as stream:
        return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _json_array(file: DataFile) -> Iterator[Row | BadRow]:
    with open_at(file.path) as stream:
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise LoramError(f"{file.path} is not JSON ({error}); mend it") from error
    for number, row in enumerate(rows, start=1):
        place = f"{file.path} row {number}"
        yield (place, row) if isinstance(row, dict) else BadRow(place, "not a JSON object")


def _separated(file: DataFile) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)  # an answer may be long
    lines = (raw.decode("utf-8", "surrogateescape") for raw in read_lines(file.path))
    without_mark = (line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(lines))
    reader = csv.DictReader(without_mark, delimiter=_DELIMITERS[file.form.kind])
    begins = 2
    for row in reader:
        place, begins = f"{file.path}:{begins}", reader.line_num + 1
        if None in row or None in row.values():
            yield BadRow(place, f"it has not the header's {len(reader.fieldnames or ())} columns")
        elif not _is_text("".join(row.values())):
            yield BadRow(place, "not UTF-8")
        else:
            yield place, dict(row)


def _is_text(found: str) -> bool:
    """Whether bytes that were decoded with ``surrogateescape`` were UTF-8."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(file: DataFile, columns: Collection[str]) -> Iterator[Row | BadRow]:
    number = 0
    with open_random(file.path) as stream:
        try:
            for batch in _batches(file, stream, columns):
                names = [name for name in batch.schema.names if name in columns]
                if not names:
                    yield BadRow(file.path, f"it has no column of {', '.join(columns)}")
                    return
                for row in batch.select(names).to_pylist():
                    number += 1
                    yield f"{file.path} row {number}", row
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise LoramError(
                f"{file.path} cannot be read past row {number} ({' '.join(str(error).split())}); "
                "get the file again, or leave it out"
            ) from error


def _batches(
    file: DataFile, stream: pa.NativeFile, columns: Collection[str]
) -> Iterator[pa.RecordBatch]:
    if file.form.kind == ".arrow":
        for batch in arrow_batches(stream, file.path):
            for start in range(0, len(batch), _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)
        return
    parquet = open_parquet(stream, file.path, 2**20)
    wanted = [name for name in parquet.schema_arrow.names if name in columns]
    yield from parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted)
