"""Describe the sources of a prepared corpus."""

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
    """Document, sequence and token counts of a unit, a source or a corpus.

    Attributes:
        documents: Number of training documents.
        sequences: Number of training sequences.
        tokens: Number of training tokens, without padding.
        held_out_documents: Number of held-out documents.
        held_out_sequences: Number of held-out sequences.
        held_out_tokens: Number of held-out tokens, without padding.
        filtered: Number of documents that did not pass the filters.
        duplicates: Number of documents equal to an earlier one.
        bad_rows: Number of rows that could not be read.
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
        """Number of rows read."""
        kept = self.documents + self.held_out_documents
        return kept + self.filtered + self.duplicates + self.bad_rows

    @classmethod
    def sum(cls, counts: Iterable[Counts]) -> Counts:
        """Return the sum of several counts, field by field."""
        listed = list(counts)
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(entry, name) for entry in listed) for name in names})


@dataclass(frozen=True, kw_only=True)
class SourceInfo(Counts):
    """Source of a prepared corpus, with its counts.

    Attributes:
        name: Name, unique in the corpus.
        weight: Configured weight; None if no source has one.
        share: Share of the training sequences: the weight over the sum of weights, or the source's
            sequences over all sequences. The shares of a corpus add up to 1.
        unit_files: Parquet files of training sequences, in the order of their row ids.
        held_out_files: Parquet files of held-out sequences, with the same columns and distinct row
            ids.
    """

    name: str
    weight: float | None
    share: float
    unit_files: tuple[Path, ...]
    held_out_files: tuple[Path, ...]


def list_sources(corpus: Path) -> list[SourceInfo]:
    """Return the sources of a prepared corpus, in the order of its configuration.

    Raises:
        LoramError: If the directory is not a prepared corpus, or was written by an earlier version.
    """
    from loram_ray.utils.parsing.documents import read_as

    path, again = corpus / SOURCES_FILE, "move the corpus away to prepare it again"
    if not os.path.lexists(path):
        raise LoramError(
            f"{corpus} must be a prepared corpus, but contains no {SOURCES_FILE}; move it away to "
            "prepare it again"
        )
    found = read_as(path, list[SourceInfo], remedy=again)
    if not found:
        raise LoramError(f"{path} must name at least one source, but names none; {again}")
    return [
        replace(
            source,
            unit_files=_beside(path, source.unit_files),
            held_out_files=_beside(path, source.held_out_files),
        )
        for source in found
    ]


def _beside(path: Path, names: Iterable[Path]) -> tuple[Path, ...]:
    """Resolve file names relative to the directory of the file that lists them."""
    for name in names:
        if not is_plain(str(name)):
            raise LoramError(
                f"{path} must name files next to it, got {str(name)!r:.80}; move the corpus away "
                "to prepare it again"
            )
    return tuple(path.parent / name for name in names)


def write_sources(corpus: Path, sources: Sequence[SourceInfo]) -> None:
    """Write the file that `list_sources` reads, with file names relative to the directory."""
    entries = []
    for source in sources:
        entry = asdict(source)
        entry["unit_files"] = [path.name for path in source.unit_files]
        entry["held_out_files"] = [path.name for path in source.held_out_files]
        entries.append(entry)
    write_json(corpus / SOURCES_FILE, entries)
