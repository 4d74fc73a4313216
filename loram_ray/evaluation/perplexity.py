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
        ids: int32.
        learnt: those with loss.
    """

    ids: numpy.ndarray[Any, Any]
    learnt: Spans

    @classmethod
    def of(cls, example: Example) -> ScoredTokens:
        """What an example is."""
        return cls(numpy.array(example.input_ids, dtype=numpy.int32), example.learnt)


@dataclass
class Perplexity(Benchmark):
    """Perplexity of the tokens that carry loss.

    Attributes:
        of: ``answer`` or ``text``, for the names of the scores.
    """

    of: str

    @property
    def title(self) -> str:
        """The name, or what it is where it has none."""
        return self.name or self.of

    def cost(self, item: ScoredTokens) -> int:
        """Tokens."""
        return len(item.ids)

    def score(self, engine: Engine, items: Sequence[ScoredTokens], seed: int) -> list[Found]:
        """Summed negative log-likelihood of each item, and its tokens."""
        rows = [
            {"input_ids": ids, "labels": labels_of(ids, item.learnt)}
            for item in items
            for ids in [item.ids.tolist()]
        ]
        return [{"nll": nll, "tokens": count} for nll, count in nlls_of_rows(engine, rows)]

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Perplexity, its standard error and what it is of."""
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
    """Read data as train takes them; the second result is the rows, once each."""
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

    Predicted are the documents' tokens and their ends, but neither what opens a document nor the
    first token of a sequence, where the tokenizer opens none.

    Raises:
        LoramError: no text, or too many bad rows.
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
        raise LoramError(f"{key}.sources must hold text, no document was found; add some")
    predicted = ~openings(torch.from_numpy(sequences), frame).numpy()
    predicted[:, 0] = False
    items = [
        ScoredTokens(ids[:length], spans)
        for ids, length, mask in zip(sequences, lengths.tolist(), predicted, strict=True)
        if (spans := _runs(mask[:length]))
    ]
    return Perplexity(name, items, "text")


def _runs(mask: numpy.ndarray[Any, Any]) -> Spans:
    """First place and the one past the last of each run of true values."""
    edges = numpy.flatnonzero(numpy.diff(mask, prepend=False, append=False))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
