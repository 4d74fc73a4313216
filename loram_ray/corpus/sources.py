"""What a prepared corpus says of its sources."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from loram_ray.artifacts.manifest import write_json
from loram_ray.errors import LoramError
from loram_ray.utils.names import is_plain

SOURCES_FILE = "sources.json"


@dataclass(frozen=True)
class Counts:
    """What the rows of a unit, a source or a corpus became.

    Attributes:
        documents: trained on.
        sequences: training rows.
        tokens: in them, padding excepted.
        held_out_documents: held out.
        held_out_sequences: rows in the held-out files.
        held_out_tokens: in them, padding excepted.
        filtered: documents that did not pass the filters.
        duplicates: documents equal to an earlier one.
        bad_rows: rows that could not be read.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    held_out_documents: int = 0
    held_out_sequences: int = 0
    held_out_tokens: int = 0
    filtered: int = 0
    duplicates: int = 0
    bad_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows read."""
        kept = self.documents + self.held_out_documents
        return kept + self.filtered + self.duplicates + self.bad_rows

    @classmethod
    def sum(cls, counts: Iterable[Counts]) -> Counts:
        """Return the sums of each."""
        listed = list(counts)
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(entry, name) for entry in listed) for name in names})


@dataclass(frozen=True, kw_only=True)
class SourceInfo(Counts):
    """One source of a prepared corpus, with its `Counts`.

    Attributes:
        name: unique in the corpus.
        weight: as configured; None where no source has one.
        share: of the training rows: the weight over the sum of weights, or the source's sequences
            over all. The shares of a corpus add to 1.
        unit_files: Parquet files of training rows, in the order of their row ids.
        held_out_files: Parquet files of held-out rows, of the same columns; no row id is a
            training row's.
    """

    name: str
    weight: float | None
    share: float
    unit_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]


def list_sources(corpus: Path) -> list[SourceInfo]:
    """Return the sources of a prepared corpus, in the order of its configuration.

    Raises:
        LoramError: the directory is no prepared corpus, or of an earlier version.
    """
    from loram_ray.utils.parsing.documents import read_as

    path, again = corpus / SOURCES_FILE, "move the corpus away to have it made again"
    if not os.path.lexists(path):
        raise LoramError(
            f"{corpus} must be a prepared corpus, it holds no {SOURCES_FILE}; move it away to have "
            "it made again"
        )
    found = read_as(path, list[SourceInfo], remedy=again)
    if not found:
        raise LoramError(f"{path} must name a source, it names none; {again}")
    return [
        replace(
            source,
            unit_files=_beside(path, source.unit_files),
            held_out_files=_beside(path, source.held_out_files),
        )
        for source in found
    ]


def _beside(path: Path, names: Iterable[Path]) -> tuple[Path, ...]:
    """Files in the directory of a file that names them."""
    for name in names:
        if not is_plain(str(name)):
            raise LoramError(
                f"{path} must name files beside it, got {str(name)!r:.80}; move the corpus away to "
                "have it made again"
            )
    return tuple(path.parent / name for name in names)


def write_sources(corpus: Path, sources: Sequence[SourceInfo]) -> None:
    """Write what `list_sources` reads; files are named relative to the directory."""
    entries = []
    for source in sources:
        entry = asdict(source)
        entry["unit_files"] = [path.name for path in source.unit_files]
        entry["held_out_files"] = [path.name for path in source.held_out_files]
        entries.append(entry)
    write_json(corpus / SOURCES_FILE, entries)
