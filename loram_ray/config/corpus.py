"""Sources of text, and a corpus made of them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from loram_ray.config.section import Section


class SourceConfig(Section):
    """One source of a corpus."""

    path: str = Field(description="a file, a directory or a glob of .jsonl, .txt or .parquet")
    text_field: str = Field("text", description="field that holds a document (.jsonl, .parquet)")


class CorpusConfig(Section):
    """The text that alignment learns from."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the text is")
    sequence_length: int = Field(512, ge=8, description="tokens in a packed sequence")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable rows that is skipped; more is refused"
    )

    def resolved(self) -> CorpusConfig:
        """Return the corpus with absolute paths, for a worker in another directory."""
        sources = tuple(
            source.model_copy(update={"path": str(Path(source.path).resolve())})
            for source in self.sources
        )
        return self.model_copy(update={"sources": sources})
