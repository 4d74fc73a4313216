"""Benchmarks: items that are read and tokenised, then scored in batches, then aggregated."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loram_ray.corpus.batches import longest_first
from loram_ray.errors import LoramError
from loram_ray.evaluation.engine import Engine

Found = dict[str, Any]
"""Result of one item, as it is written to JSON."""
Scores = dict[str, float | int]


@dataclass
class Benchmark(ABC):
    """Items of one benchmark.

    Attributes:
        name: Prefix of the scores; empty for ``evaluate.data`` and ``evaluate.text``.
        items: Tokenised items. An item's score does not depend on the other items of its batch.
    """

    name: str
    items: list[Any] = field(repr=False)

    def without_items(self) -> Benchmark:
        """Return a copy without items, which is cheap to send."""
        found = copy.copy(self)
        found.items = []
        return found

    def batches(self, size: int) -> Iterator[list[int]]:
        """Yield the indices of each batch's items; items of similar cost share a batch."""
        return longest_first(range(len(self.items)), lambda n: self.cost(self.items[n]), size)

    @property
    @abstractmethod
    def title(self) -> str:
        """The benchmark's name, or a description if it has none."""

    @abstractmethod
    def cost(self, item: Any) -> int:
        """Return the number of tokens of an item."""

    def span(self, item: Any) -> int:
        """Return the longest sequence of an item in tokens, including generated ones."""
        return self.cost(item)

    @abstractmethod
    def score(self, engine: Engine, items: Sequence[Any], seed: int) -> list[Found]:
        """Score a batch.

        Args:
            engine: Model to score with.
            items: Items of this benchmark.
            seed: Seed of sampling.
        """

    @abstractmethod
    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Aggregate results into scores with standard errors, without the benchmark's name."""

    def scores(self, found: Sequence[Found]) -> Scores:
        """Return the scores, prefixed by the benchmark's name, without those that are NaN."""
        begin = f"{self.name}/" if self.name else ""
        scores = self.summed_up(found).items()
        return {f"{begin}{key}": value for key, value in scores if not math.isnan(value)}


def require_items(items: Sequence[Any], key: str, data: str) -> None:
    """Raise an error if there are no items.

    Raises:
        LoramError: There is no item.
    """
    if not items:
        raise LoramError(f"{key} must contain items, but {data} has none; use a file with rows")
