"""Documents out of files: units of work, and the rows that cannot be read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow.lib import ArrowException

from loram_ray.config import SourceConfig
from loram_ray.errors import LoramError
from loram_ray.progress import say

CORPUS_KEY = "align.corpus.sources"
_UNIT_BYTES = 8 * 2**20
_SUFFIXES = (".jsonl", ".txt", ".parquet")
_HASHED_WHOLE = 2**28
_HASHED_ENDS = 2**20
_NAMED_BAD_ROWS = 5


@dataclass(frozen=True)
class Unit:
    """A piece of a file that one task reads: a span of bytes, or a row group of Parquet.

    Attributes:
        index: position among all units of the corpus.
        path: the file.
        field: name of the text field.
        start: first byte (a line belongs to the unit in which it starts), or the row group.
        end: one past the last byte; unused for Parquet.
    """

    index: int
    path: str
    field: str
    start: int
    end: int


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


def list_files(source: SourceConfig, key: str) -> list[Path]:
    """Return a source's files, sorted.

    Raises:
        LoramError: there are none, or a kind of file that is not read.
    """
    path = Path(source.path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
    else:
        files = sorted(Path(p) for p in glob.glob(source.path, recursive=True))
    if not files:
        raise LoramError(
            f"{key} must name files of {', '.join(_SUFFIXES)}, {source.path} has none; check it"
        )
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise LoramError(
                f"{key} must name files of {', '.join(_SUFFIXES)}, got {file}; convert it"
            )
    return files


def list_units(sources: Sequence[SourceConfig], key: str = CORPUS_KEY) -> list[Unit]:
    """Cut every file of a corpus into units, in a fixed order.

    ``key`` is the configuration key of the sources, for messages.
    """
    units: list[Unit] = []
    for number, source in enumerate(sources):
        for file in list_files(source, f"{key}.{number}.path"):
            for start, end in _spans(file):
                units.append(Unit(len(units), str(file), source.text_field, start, end))
    return units


def _spans(file: Path) -> list[tuple[int, int]]:
    if file.suffix == ".parquet":
        try:
            return [(group, 0) for group in range(pq.ParquetFile(file).num_row_groups)]
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise LoramError(f"{file} is not a Parquet file ({reason}); restore it") from error
    size = file.stat().st_size
    return [(s, min(s + _UNIT_BYTES, size)) for s in range(0, size, _UNIT_BYTES)]


def identify(sources: Sequence[SourceConfig], key: str = CORPUS_KEY) -> list[list[object]]:
    """What tells one corpus from another: name, size, field and a hash of each file.

    Of files over 256 MiB the hash covers both ends alone.
    """
    found: list[list[object]] = []
    for number, source in enumerate(sources):
        for file in list_files(source, f"{key}.{number}.path"):
            size = file.stat().st_size
            with open(file, "rb") as stream:
                if size <= _HASHED_WHOLE:
                    digest = hashlib.file_digest(stream, "sha256")
                else:
                    digest = hashlib.sha256(stream.read(_HASHED_ENDS))
                    stream.seek(size - _HASHED_ENDS)
                    digest.update(stream.read(_HASHED_ENDS))
            found.append([file.name, size, source.text_field, digest.hexdigest()])
    return found


def documents(unit: Unit) -> Iterator[str | BadRow]:
    """Yield the documents of a unit, and the rows that cannot be read."""
    match Path(unit.path).suffix:
        case ".parquet":
            yield from _parquet_documents(unit)
        case ".txt":
            yield from _text_documents(unit)
        case _:
            yield from _json_documents(unit)


def lines_of(unit: Unit) -> Iterator[bytes]:
    """Yield each line that starts in the unit."""
    with open(unit.path, "rb") as file:
        if unit.start > 0:
            file.seek(unit.start - 1)
            file.readline()  # the rest of the line before, or just its newline
        while file.tell() < unit.end:
            yield file.readline()


def first_line_number(unit: Unit) -> int:
    """Number (from 1) of the first line that starts in the unit; reads the file up to there."""
    if unit.start == 0:
        return 1
    with open(unit.path, "rb") as file:
        return 2 + _count_newlines(file, unit.start - 1)


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
        row = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not JSON ({error})")
    return row if isinstance(row, dict) else BadRow(place, "not a JSON object")


def refuse_bad_rows(bad: Sequence[BadRow], total: int, max_share: float, key: str) -> None:
    """Say how many rows were skipped, or refuse when they are too many.

    Args:
        bad: rows that could not be used.
        total: rows in all.
        max_share: largest share of bad rows that is skipped.
        key: the configuration key of ``max_share``.

    Raises:
        LoramError: the share is exceeded; the message names the first rows.
    """
    if not bad:
        return
    named = "; ".join(str(row) for row in bad[:_NAMED_BAD_ROWS])
    more = f"; and {len(bad) - _NAMED_BAD_ROWS} more" if len(bad) > _NAMED_BAD_ROWS else ""
    if len(bad) > max_share * total:
        raise LoramError(
            f"{key} must be at least the share of bad rows, got {max_share} with {len(bad)} bad of "
            f"{total}: {named}{more}; mend the rows or raise it"
        )
    say("warning", f"skipped {len(bad)} bad rows of {total}: {named}{more}")


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


def _text_documents(unit: Unit) -> Iterator[str | BadRow]:
    try:
        text = b"".join(lines_of(unit)).decode()
    except UnicodeDecodeError as error:
        yield BadRow(f"{unit.path}:{first_line_number(unit)}", f"not UTF-8 ({error})")
        return
    if text.strip():
        yield text


def _parquet_documents(unit: Unit) -> Iterator[str | BadRow]:
    file = pq.ParquetFile(unit.path)
    if unit.field not in file.schema_arrow.names:
        yield BadRow(f"{unit.path}:group {unit.start}", f"column '{unit.field}' is not there")
        return
    try:
        column = file.read_row_group(unit.start, columns=[unit.field])[unit.field]
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        yield BadRow(f"{unit.path}:group {unit.start}", f"cannot be read ({reason})")
        return
    for number, value in enumerate(column, start=1):
        text = value.as_py()
        if isinstance(text, str) and text.strip():
            yield text
        else:
            yield BadRow(f"{unit.path}:group {unit.start} row {number}", "holds no text")


def _count_newlines(file: object, end: int) -> int:
    descriptor, count, position = file.fileno(), 0, 0  # type: ignore[attr-defined]
    while position < end:
        piece = os.pread(descriptor, min(2**20, end - position), position)
        count += piece.count(b"\n")
        position += len(piece)
    return count
