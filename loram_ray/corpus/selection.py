"""Which documents of a source are trained on, held out or left out.

All of it follows from a document's content, so neither the order of the files nor the number of
tasks changes it.
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
    """The rules for the documents of one source.

    Attributes:
        filters: those that do not pass are left out.
        held_out: share of the documents that is held out.
        seed: of the draw of held-out documents.
    """

    filters: FilterConfig = field(default_factory=FilterConfig)
    held_out: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: CorpusConfig, source: int) -> Selection:
        """Return the rules for a source of a corpus."""
        chosen = config.sources[source]
        return cls(chosen.filters, chosen.held_out, config.seed)

    def holds_out(self, text: str) -> bool:
        """Whether a document is held out."""
        return below_share(text, self.held_out, self.seed)

    def documents(self, unit: Unit) -> Iterator[str | BadRow | None]:
        """Yield a unit's documents and bad rows, and None for each that does not pass the filters.

        Raises:
            LoramError: the file is cut or damaged, or a filter's pattern takes too long.
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
    """128-bit BLAKE2b of a document's UTF-8, by which documents are told apart."""
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()


def below_share(text: str, share: float, seed: int) -> bool:
    """Whether a text's hash with a seed is among the lowest share of all hashes."""
    if share == 0.0:
        return False
    keyed = hashlib.blake2b(content_hash(text), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(keyed.digest(), "little") < share * 2.0**64
