"""Configuration of text sources and corpora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import Free, Identified, Section
from loram_ray.utils.names import is_control
from loram_ray.utils.patterns import expression_error


class TextSource(Section):
    """Text files of one source."""

    path: Free[str] = Field(
        min_length=1,
        description="Path of a file, a directory, a glob pattern or a dataset saved with "
        "save_to_disk: local, s3://, gs:// or hf://datasets/org/name. Formats: .jsonl and .txt "
        "(also .gz and .zst), .json.gz, .json.zst, .parquet and .arrow.",
    )
    text_field: Free[str] = Field(
        "text", description="Name of the field with the document's text; not used for .txt."
    )

    def resolved(self) -> Self:
        """Return a copy with an absolute path; remote addresses stay unchanged."""
        if "://" in self.path:
            return self
        return self.model_copy(update={"path": str(Path(self.path).resolve())})


class FilterConfig(Section):
    """Filters that select the documents of a source."""

    min_characters: Identified[int] = Field(
        0, ge=0, description="Minimum length of a document in characters."
    )
    max_characters: Identified[int | None] = Field(
        None, ge=1, description="Maximum length of a document in characters. Default: unlimited."
    )
    keep: Identified[str | None] = Field(
        None, description="Regular expression; documents that do not match are dropped."
    )
    drop: Identified[str | None] = Field(
        None, description="Regular expression; documents that match are dropped."
    )

    @field_validator("keep", "drop")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        fault = expression_error(pattern or "")
        if fault is not None:
            raise ValueError(f"must be {fault}")
        return pattern

    @model_validator(mode="after")
    def _some_length_is_kept(self) -> Self:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters must be at least min_characters = {self.min_characters}, got "
                f"{self.max_characters}; raise it"
            )
        return self

    def has_length(self, text: str) -> bool:
        """Return whether a document's length is within the limits."""
        longest = len(text) if self.max_characters is None else self.max_characters
        return self.min_characters <= len(text) <= longest


class SourceConfig(TextSource):
    """One source of a training corpus."""

    name: Identified[str | None] = Field(
        None,
        min_length=1,
        description="Name of the source in logs and metrics. Default: derived from the path.",
    )
    weight: Identified[float | None] = Field(
        None,
        allow_inf_nan=False,
        description="Weight of the source relative to the other sources' (the paper: 0.5 web "
        "text, 0.25 code, 0.25 mathematics). Default: proportional to the sources' "
        "sizes.",
    )
    filters: Identified[FilterConfig] = Field(
        default=FilterConfig(), description="Filters that select documents."
    )
    held_out: Identified[float] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the documents to hold out for evaluation, from 0 to below 1. "
        "Documents are chosen by their content and the corpus's seed; with "
        "deduplicate, copies in other sources are not trained on either.",
    )

    @field_validator("name")
    @classmethod
    def _can_be_shown(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or any(map(is_control, name))):
            raise ValueError(
                f"must be text without control characters, got {name!r:.80}; rename the source"
            )
        return name

    @field_validator("weight")
    @classmethod
    def _weighs_something(cls, weight: float | None) -> float | None:
        if weight is not None and weight <= 0:
            raise ValueError(
                f"must be greater than 0, got {weight:g}; raise it or remove the source"
            )
        return weight


class TextConfig(Section):
    """Text that is packed into sequences."""

    sources: Free[tuple[TextSource, ...]] = Field(min_length=1, description="Sources of the text.")
    sequence_length: Identified[int] = Field(
        512, ge=8, description="Length of a packed sequence in tokens."
    )
    max_bad_share: Identified[float] = Field(
        0.01,
        ge=0,
        le=1,
        description="Maximum share of unreadable rows to skip, from 0 to 1; a larger share is an "
        "error.",
    )

    def resolved(self) -> Self:
        """Return a copy with absolute paths, for workers in another directory."""
        sources = tuple(source.resolved() for source in self.sources)
        return self.model_copy(update={"sources": sources})


class CorpusConfig(TextConfig):
    """Training corpus of alignment."""

    sources: Free[tuple[SourceConfig, ...]] = Field(
        min_length=1, description="Sources of the text."
    )
    deduplicate: Identified[bool] = Field(
        False,
        description="Keep only the first of identical documents across all sources; reads the "
        "sources twice.",
    )
    seed: Identified[int] = Field(
        0, ge=0, lt=2**63, description="Seed of the selection of held-out documents."
    )

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Self:
        named = [source.name for source in self.sources if source.name is not None]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"sources must have unique names, got '{name}' twice; rename one")
        missing = [i for i, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(missing) < len(self.sources):
            raise ValueError(
                f"sources.{missing[0]}.weight must be given if other sources have one; set a "
                "weight for all sources or for none"
            )
        return self

    def names(self) -> list[str]:
        """Return a unique name for each source; missing names are derived from the paths."""
        taken = {source.name for source in self.sources}
        names: list[str] = []
        for source in self.sources:
            name = source.name or _free_name(_stem(source.path), taken)
            taken.add(name)
            names.append(name)
        return names


def _stem(path: str) -> str:
    """Return the last part of a path that is not a pattern, up to its first dot."""
    parts = path.partition("://")[2] or path
    plain = [part for part in parts.partition("?")[0].split("/") if not set(part) & set("*?[")]
    return next((stem for part in reversed(plain) if (stem := part.partition(".")[0])), "text")


def _free_name(stem: str, taken: Sequence[str | None] | set[str | None]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
