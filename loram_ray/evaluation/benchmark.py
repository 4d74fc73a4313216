"""What is measured: items that are read and tokenised first, scored in batches, then summed up."""

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
"""What was found of one item, as JSON has it."""
Scores = dict[str, float | int]


@dataclass
class Benchmark(ABC):
    """Items of one kind.

    Attributes:
        name: of its scores; empty for those of ``evaluate.data`` and ``evaluate.text``.
        items: tokenised; each is scored on its own, whatever batch it is in.
    """

    name: str
    items: list[Any] = field(repr=False)

    def without_items(self) -> Benchmark:
        """A copy that is cheap to send."""
        found = copy.copy(self)
        found.items = []
        return found

    def batches(self, size: int) -> Iterator[list[int]]:
        """Numbers of the items of each batch, those of about the same cost together."""
        return longest_first(range(len(self.items)), lambda n: self.cost(self.items[n]), size)

    @property
    @abstractmethod
    def title(self) -> str:
        """The name, or what it is where it has none."""

    @abstractmethod
    def cost(self, item: Any) -> int:
        """Tokens of an item."""

    def span(self, item: Any) -> int:
        """Tokens that a model sees of an item in one sequence, generated ones among them."""
        return self.cost(item)

    @abstractmethod
    def score(self, engine: Engine, items: Sequence[Any], seed: int) -> list[Found]:
        """Score a batch.

        Args:
            engine: the model.
            items: of this measurement.
            seed: of what is sampled.
        """

    @abstractmethod
    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Scores with their standard errors, by names without the measurement's."""

    def scores(self, found: Sequence[Found]) -> Scores:
        """Scores of all items, by names with the measurement's, but for what is not a number."""
        begin = f"{self.name}/" if self.name else ""
        scores = self.summed_up(found).items()
        return {f"{begin}{key}": value for key, value in scores if not math.isnan(value)}


def require_items(items: Sequence[Any], key: str, data: str) -> None:
    """Refuse data that hold nothing to ask about.

    Raises:
        LoramError: there is no item.
    """
    if not items:
        raise LoramError(f"{key} must hold items, {data} has none; give a file with rows")
