"""Sources of text, and a corpus made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import Section
from loram_ray.utils.names import is_control
from loram_ray.utils.patterns import fault_of_expression


class TextSource(Section):
    """Files of text."""

    path: str = Field(
        min_length=1,
        description="a file, a directory or a glob of .jsonl, .txt (both also .gz, .zst), "
        ".json.gz, .json.zst, .parquet or .arrow, or a dataset saved by save_to_disk: a local "
        "path, s3://, gs:// or hf://datasets/org/name",
    )
    text_field: str = Field("text", description="field that holds a document; unused for .txt")

    def resolved(self) -> Self:
        """Return the source with an absolute path; addresses of object stores stay."""
        if "://" in self.path:
            return self
        return self.model_copy(update={"path": str(Path(self.path).resolve())})


class FilterConfig(Section):
    """Which documents of a source are kept."""

    min_characters: int = Field(0, ge=0, description="shorter documents are left out")
    max_characters: int | None = Field(None, ge=1, description="longer documents are left out")
    keep: str | None = Field(
        None, description="regular expression; documents in which it is not found are left out"
    )
    drop: str | None = Field(
        None, description="regular expression; documents in which it is found are left out"
    )

    @field_validator("keep", "drop")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        fault = fault_of_expression(pattern or "")
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
        """Whether a document's length is one of those that are kept."""
        longest = len(text) if self.max_characters is None else self.max_characters
        return self.min_characters <= len(text) <= longest


class SourceConfig(TextSource):
    """One source of a corpus that is trained on."""

    name: str | None = Field(
        None, min_length=1, description="name in logs and metrics; default: from the path"
    )
    weight: float | None = Field(
        None,
        allow_inf_nan=False,
        description="share of the training rows, relative to the other sources' (the paper: 0.5 "
        "web text, 0.25 code, 0.25 mathematics); default: by the sources' sizes",
    )
    filters: FilterConfig = Field(default=FilterConfig(), description="documents that are kept")
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the documents that is evaluated and not trained on; a document's "
        "content and the corpus's seed decide (deduplicate, and no copy in another source is "
        "trained on)",
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
            raise ValueError(f"must be greater than 0, got {weight:g}; leave the source out")
        return weight


class TextConfig(Section):
    """Text, cut into sequences."""

    sources: tuple[TextSource, ...] = Field(min_length=1, description="where the text is")
    sequence_length: int = Field(512, ge=8, description="tokens in a packed sequence")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable rows that is skipped; more is refused"
    )

    def resolved(self) -> Self:
        """Return the text with absolute paths, for a worker in another directory."""
        sources = tuple(source.resolved() for source in self.sources)
        return self.model_copy(update={"sources": sources})


class CorpusConfig(TextConfig):
    """The text that alignment learns from."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the text is")
    deduplicate: bool = Field(
        False, description="keep the first of equal documents over all sources; reads them twice"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the draw of held-out documents")

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Self:
        named = [source.name for source in self.sources if source.name is not None]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"sources must have names of their own, got '{name}' twice")
        missing = [i for i, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(missing) < len(self.sources):
            raise ValueError(
                f"sources.{missing[0]}.weight must be given where other sources have one; "
                "give every source a weight or none"
            )
        return self

    def names(self) -> list[str]:
        """Return the sources' names, each another; those not given are made from the paths."""
        taken = {source.name for source in self.sources}
        names: list[str] = []
        for source in self.sources:
            name = source.name or _free_name(_stem(source.path), taken)
            taken.add(name)
            names.append(name)
        return names


def _stem(path: str) -> str:
    """Last part of a path that is no pattern, without what follows the first dot."""
    parts = path.partition("://")[2] or path
    plain = [part for part in parts.partition("?")[0].split("/") if not set(part) & set("*?[")]
    return next((stem for part in reversed(plain) if (stem := part.partition(".")[0])), "text")


def _free_name(stem: str, taken: Sequence[str | None] | set[str | None]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
