"""Perplexity of answers and of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from loram_ray.config import EvaluateConfig, TextConfig
from loram_ray.corpus.conversations import Conversation, Document
from loram_ray.corpus.examples import Example, Spans, labels_of, load_examples
from loram_ray.corpus.isolation import openings
from loram_ray.corpus.pack import pack, tokenise
from loram_ray.corpus.read import BadRow, documents, list_units, refuse_bad_rows
from loram_ray.errors import LoramError
from loram_ray.evaluation.benchmark import Benchmark, Found, Scores
from loram_ray.evaluation.engine import Engine
from loram_ray.evaluation.likelihood import nlls_of_rows
from loram_ray.evaluation.uncertainty import perplexity_and_error
from loram_ray.models.tokenizer import frame_of


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens, some of which carry loss.

    Attributes:
        ids: Token ids, int32.
        learnt: Spans of the tokens that carry loss.
    """

    ids: numpy.ndarray[Any, Any]
    learnt: Spans

    @classmethod
    def of(cls, example: Example) -> ScoredTokens:
        """Create the scored tokens of an example."""
        return cls(numpy.array(example.input_ids, dtype=numpy.int32), example.learnt)


@dataclass
class Perplexity(Benchmark):
    """Perplexity of the tokens that carry loss.

    Attributes:
        of: ``answer`` or ``text``, the prefix in the names of the scores.
    """

    of: str

    @property
    def title(self) -> str:
        """The benchmark's name, or ``answer`` or ``text`` if it has none."""
        return self.name or self.of

    def cost(self, item: ScoredTokens) -> int:
        """Return the number of tokens."""
        return len(item.ids)

    def score(self, engine: Engine, items: Sequence[ScoredTokens], seed: int) -> list[Found]:
        """Return each item's summed negative log-likelihood and its number of scored tokens."""
        rows = [
            {"input_ids": ids, "labels": labels_of(ids, item.learnt)}
            for item in items
            for ids in [item.ids.tolist()]
        ]
        return [{"nll": nll, "tokens": count} for nll, count in nlls_of_rows(engine, rows)]

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Return the perplexity, its standard error, and the numbers of tokens and examples."""
        tokens = [one["tokens"] for one in found]
        perplexity, error = perplexity_and_error([one["nll"] for one in found], tokens)
        scores: Scores = {
            f"{self.of}_perplexity": perplexity,
            f"{self.of}_perplexity_stderr": error,
            f"{self.of}_tokens": sum(tokens),
        }
        return scores | ({"examples": len(found)} if self.of == "answer" else {})


def perplexity_of_answers(
    name: str, tokenizer: Any, config: EvaluateConfig, data: str, key: str, limit: int | None
) -> tuple[Perplexity, list[Conversation | Document]]:
    """Read data as for training; the second result is the rows, without repetitions."""
    found = load_examples(tokenizer, data, config.max_length, config.max_bad_share, key, limit)
    items = []
    rows: list[Conversation | Document] = []
    for row, example in found:
        items.append(ScoredTokens.of(example))
        if not rows or rows[-1] is not row:
            rows.append(row)
    return Perplexity(name, items, "answer"), rows


def perplexity_of_text(name: str, tokenizer: Any, corpus: TextConfig, key: str) -> Perplexity:
    """Read plain text, packed into sequences.

    Documents' tokens and end tokens are predicted. A document's opening token is not, nor is the
    first token of a sequence if the tokenizer adds no opening token.

    Raises:
        LoramError: There is no text, or too many unusable rows.
    """
    bad: list[BadRow] = []
    good = 0

    def texts() -> Iterator[str]:
        nonlocal good
        for unit in list_units(corpus.sources, f"{key}.sources"):
            for document in documents(unit):
                if isinstance(document, BadRow):
                    bad.append(document)
                else:
                    good += 1
                    yield document

    frame = frame_of(tokenizer)
    sequences, lengths = pack(
        tokenise(tokenizer, texts()), corpus.sequence_length, frame.end, frame.opening
    )
    refuse_bad_rows(bad, good + len(bad), corpus.max_bad_share, f"{key}.max_bad_share")
    if not len(sequences):
        raise LoramError(f"{key}.sources must contain text, got no document; add some")
    predicted = ~openings(torch.from_numpy(sequences), frame).numpy()
    predicted[:, 0] = False
    items = [
        ScoredTokens(ids[:length], spans)
        for ids, length, mask in zip(sequences, lengths.tolist(), predicted, strict=True)
        if (spans := _runs(mask[:length]))
    ]
    return Perplexity(name, items, "text")


def _runs(mask: numpy.ndarray[Any, Any]) -> Spans:
    """Return the start and the end (exclusive) of each run of true values."""
    edges = numpy.flatnonzero(numpy.diff(mask, prepend=False, append=False))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
