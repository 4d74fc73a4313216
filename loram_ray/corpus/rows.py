"""Read the rows of tables in any supported file format."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
from pyarrow.lib import ArrowException

from loram_ray.corpus.columnar import arrow_batches, open_parquet
from loram_ray.corpus.encoding import refuse_other_encodings
from loram_ray.corpus.files import DataFile, hash_content, open_at, open_random, read_lines
from loram_ray.corpus.read import BadRow, byte_order_mark_note, documents_of, parse_object
from loram_ray.corpus.separated import separated_rows
from loram_ray.errors import LoramError
from loram_ray.utils.parsing import parse_json

_ROWS_AT_ONCE = 256

_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"

Row = tuple[str, dict[str, Any]]
"""Origin of a row, and its values by column name."""


def read_rows(file: DataFile, columns: Collection[str]) -> Iterator[Row | BadRow]:
    """Yield the rows of a file, and its bad rows.

    All formats except ``.json`` are streamed. Rows of a text file have the single column ``text``.

    Args:
        file: File in one of the formats of `files.EXAMPLES`.
        columns: Names of the columns to read; other columns of Parquet and Arrow files are skipped.

    Raises:
        LoramError: If the file is truncated or damaged, is not UTF-8 text, repeats a column name,
            or has a quote that is not closed at the end of its field.
    """
    match file.form.kind:
        case ".jsonl":
            yield from _json_lines(file)
        case ".json":
            yield from _json_array(file) if _is_array(file) else _json_lines(file)
        case ".csv" | ".tsv":
            yield from separated_rows(file)
        case ".txt":
            for number, text in enumerate(documents_of(file), start=1):
                place = f"{file.path} part {number}"
                yield text if isinstance(text, BadRow) else (place, {"text": text})
        case _:
            yield from _columns(file, columns)


def identify_rows(file: DataFile) -> str:
    """Return an identifier of a file's rows; reads the whole file.

    Raises:
        LoramError: If `read_rows` would refuse the CSV or TSV file.
    """
    if file.form.kind in (".csv", ".tsv"):
        for _ in separated_rows(file):
            pass
    return hash_content(file.path) + byte_order_mark_note(file)


def _json_lines(file: DataFile) -> Iterator[Row | BadRow]:
    for line, raw in enumerate(read_lines(file.path), start=1):
        if raw.strip():
            place = f"{file.path}:{line}"
            row = parse_object(raw, place)
            yield row if isinstance(row, BadRow) else (place, row)


def _is_array(file: DataFile) -> bool:
    with open_at(file.path) as stream:
        head = stream.read(4096)
        if not head.lstrip(_BEFORE_JSON).startswith(b"["):
            return False
        refuse_other_encodings(head.replace(b"\r", b"\n"), file.path)  # JSON allows any line ending
        return True


def _json_array(file: DataFile) -> Iterator[Row | BadRow]:
    with open_at(file.path) as stream:
        content = stream.read()
    rows: list[Any] = parse_json(content, file.path, kind=list, remedy="fix it", constants=True)
    for number, row in enumerate(rows, start=1):
        place = f"{file.path} row {number}"
        yield (place, row) if isinstance(row, dict) else BadRow(place, "not a JSON object")


def _columns(file: DataFile, columns: Collection[str]) -> Iterator[Row | BadRow]:
    number = 0
    with open_random(file.path) as stream:
        try:
            for batch in _batches(file, stream, columns):
                names = [name for name in batch.schema.names if name in columns]
                if not names:
                    yield BadRow(file.path, f"it has none of the columns {', '.join(columns)}")
                    return
                for row in batch.select(names).to_pylist():
                    number += 1
                    yield f"{file.path} row {number}", row
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise LoramError(
                f"{file.path} cannot be read past row {number} ({' '.join(str(error).split())}); "
                "download it again or remove it"
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
