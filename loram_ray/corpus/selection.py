"""Decide which documents of a source are trained on, held out or dropped.

Every decision follows from the content of a document, so it depends neither on the order of the
files nor on the number of tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from loram_ray.config import CorpusConfig, FilterConfig
from loram_ray.corpus.read import CORPUS_KEY, BadRow, Unit, documents
from loram_ray.utils.patterns import Search

_HASH_BYTES = 16


@dataclass(frozen=True)
class Selection:
    """Selection rules for the documents of one source.

    Attributes:
        filters: Filters that a document must pass.
        held_out: Share of the documents to hold out.
        seed: Seed of the held-out draw.
    """

    filters: FilterConfig = field(default_factory=FilterConfig)
    held_out: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: CorpusConfig, source: int) -> Selection:
        """Return the rules for one source of a corpus."""
        chosen = config.sources[source]
        return cls(chosen.filters, chosen.held_out, config.seed)

    def holds_out(self, text: str) -> bool:
        """Whether a document is held out."""
        return below_share(text, self.held_out, self.seed)

    def documents(self, unit: Unit) -> Iterator[str | BadRow | None]:
        """Yield a unit's documents and bad rows, and None for each filtered document.

        Raises:
            LoramError: If the file is truncated or damaged, or a filter's pattern takes too long.
        """
        with ExitStack() as stack:
            patterns = {"keep": self.filters.keep, "drop": self.filters.drop}
            searches = {
                key: stack.enter_context(
                    Search(pattern, f"{CORPUS_KEY}.{unit.source}.filters.{key}")
                )
                for key, pattern in patterns.items()
                if pattern is not None
            }

            def kept(text: str) -> bool:
                return self.filters.has_length(text) and all(
                    search.found(text, unit.path) == (key == "keep")
                    for key, search in searches.items()
                )

            for document in documents(unit):
                yield document if isinstance(document, BadRow) or kept(document) else None


def content_hash(text: str) -> bytes:
    """Return the 128-bit BLAKE2b hash of a document's UTF-8 bytes, its identity."""
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()


def below_share(text: str, share: float, seed: int) -> bool:
    """Whether a text's seeded hash falls in the lowest ``share`` of all hashes."""
    if share == 0.0:
        return False
    keyed = hashlib.blake2b(content_hash(text), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(keyed.digest(), "little") < share * 2.0**64
