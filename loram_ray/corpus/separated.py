"""Read rows of CSV and TSV files (RFC 4180); quoted fields may hold line ends and delimiters.

A stray quote turns the lines up to the next quote into a single field. A file in which this is
visible is refused, because rows would be lost silently.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from loram_ray.corpus.columnar import refuse_repeated
from loram_ray.corpus.encoding import BYTE_ORDER_MARK
from loram_ray.corpus.files import DataFile, read_lines
from loram_ray.corpus.read import BadRow
from loram_ray.errors import LoramError
from loram_ray.utils.parsing import is_unicode

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 64 * 2**20
_REMEDY = 'remove the quote, or quote the field and double each quote inside it ("")'


def separated_rows(file: DataFile) -> Iterator[tuple[str, dict[str, str]] | BadRow]:
    """Yield the rows of a CSV or TSV file, and its bad rows.

    Raises:
        LoramError: If the header lacks or repeats names, or a quote is not closed at the end of its
            field.
    """
    records = _Records(file.path, _DELIMITERS[file.form.kind])
    header: list[str] | None = None
    for line, fields in records:
        place = f"{file.path}:{line}"
        if not fields:  # a blank line
            continue
        if header is None:
            header = _checked_header(fields, place)
            continue
        records.refuse_swallowed(len(fields), len(header))
        content = "".join(fields)
        if len(fields) != len(header):
            yield BadRow(place, f"it has {len(fields)} columns, the header has {len(header)}")
        elif not is_unicode(content):
            yield BadRow(place, "not UTF-8")
        elif "\0" in content:
            yield BadRow(place, "it contains a NUL byte")
        else:
            yield place, dict(zip(header, fields, strict=True))


class _Records:
    """Records of a file, each with the number of its first line."""

    def __init__(self, path: str, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        self._first = 0
        self._taken: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(LONGEST_FIELD)
        reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        while True:
            self._first, self._taken = reader.line_num + 1, []
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._refuse(error)
            yield self._first, fields

    def _lines(self) -> Iterator[str]:
        for number, raw in enumerate(read_lines(self._path)):
            line = raw.decode("utf-8", "surrogateescape")
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
            self._taken.append(line)
            yield line

    def _refuse(self, error: csv.Error) -> NoReturn:
        message, last = str(error), self._first + len(self._taken) - 1
        if "end of data" in message or "field limit" in message:
            rule = "close the quote that opens a field"
            got = "it is not closed" if "end" in message else f"it takes {LONGEST_FIELD:,} bytes"
        elif "new-line" in message:
            raise LoramError(
                f"{self._path}:{self._first} must end in LF or CRLF, but contains a lone CR "
                "outside quotes; convert the line endings, or quote the field"
            ) from error
        else:
            rule = "close a quote where its field ends"
            got = f"it closes within text in line {last}" if last > self._first else "text follows"
        raise LoramError(f"{self._path}:{self._first} must {rule}, {got}; {_REMEDY}") from error

    def refuse_swallowed(self, fields: int, columns: int) -> None:
        """Refuse a multi-line record whose lines look like rows of their own.

        A stray quote that meets another one in a later row is valid CSV. It shows in the lines:
        each has the header's number of columns when quotes are read as text.

        Args:
            fields: Number of fields in the record.
            columns: Number of columns in the header.
        """
        lines = self._taken
        if len(lines) < 2 or columns < 2:
            return
        looked_at = lines if fields == columns else lines[1:-1]
        if not looked_at or not all(self._is_row(line, columns) for line in looked_at):
            return
        if len(lines) == 2 and self._quotes_on_purpose():
            return
        raise LoramError(
            f"{self._path}:{self._first} must close the quote that opens a field, but the quoted "
            f"text runs to line {self._first + len(lines) - 1}; {_REMEDY}"
        )

    def _is_row(self, line: str, columns: int) -> bool:
        parts = line.rstrip("\r\n").split(self._delimiter)
        of_prose = self._delimiter == "," and any(part.startswith(" ") for part in parts[1:])
        return len(parts) == columns and parts[0].strip() != "" and not of_prose

    def _quotes_on_purpose(self) -> bool:
        """Whether some field of the file has quotes that are needed and correctly placed."""
        mark = re.escape(self._delimiter)
        field = re.compile(rf'(?:^|{mark})(?="((?:[^"]|"")*+)"(?:{mark}|\s*+$))')
        return any(
            self._delimiter in content or '""' in content
            for raw in read_lines(self._path)
            for content in field.findall(raw.decode("utf-8", "replace"))
        )


def _checked_header(names: Sequence[str], place: str) -> list[str]:
    if not is_unicode("".join(names)):
        raise LoramError(f"{place} must be UTF-8 text, but the header is not; convert the file")
    if not any(name.strip() for name in names):
        raise LoramError(f"{place} must name the columns, but is empty; add a header")
    refuse_repeated(names, place)
    return list(names)
