"""The kinds of units that pruning keeps or removes as a whole.

To add a kind of unit, add a `Unit` to the end of `UNITS`, with a `Span` for each way in which its
features lie in a linear, and use the spans in the linears of `architectures`. Scores, selection,
plans, estimates and reports follow from the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder that pruning needs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 0
    """Experts per layer of a mixture of experts, of `intermediate_size` each; 0 for a dense MLP."""

    @property
    def group_size(self) -> int:
        """Number of query heads per KV head."""
        return self.num_heads // self.num_kv_heads


class PerUnit(dict[str, "torch.Tensor"]):
    """A tensor for each kind of unit of a layer, by the unit's name, which is also an attribute."""

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(f"no tensor of {name}")
        return self[name]


@dataclass(frozen=True)
class Unit:
    """A kind of unit.

    Attributes:
        name: Name of its tensors in plans and scores.
        title: Its name in messages and reports, in the plural.
        count: Number of units in one layer, or in one expert.
        kept: Number of these that pruning at a ratio keeps.
        per_expert: Whether each expert of a mixture has its own units.
        rounded: Whether ``prune.round_neurons_to`` applies to the kept number.
    """

    name: str
    title: str
    count: Callable[[Geometry], int]
    kept: Callable[[Geometry, float], int]
    per_expert: bool = False
    rounded: bool = False

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Return the shape of a layer's scores, ``[count]`` or ``[experts, count]``."""
        experts = geometry.num_experts if self.per_expert else 0
        return (experts, self.count(geometry)) if experts else (self.count(geometry),)

    def index(self, kept: PerUnit, expert: int | None) -> torch.Tensor:
        """Return a layer's kept units, in one expert if an expert is given, int64 ``[kept]``."""
        return self._of_expert(kept[self.name], expert)

    def add(self, scores: PerUnit, sums: torch.Tensor, expert: int | None) -> None:
        """Add the sums ``[count]`` of one linear to a layer's scores."""
        self._of_expert(scores[self.name], expert).add_(sums)

    def _of_expert(self, values: torch.Tensor, expert: int | None) -> torch.Tensor:
        return values if expert is None or not self.per_expert else values[expert]


@dataclass(frozen=True)
class Span:
    """Part of a linear's pruned dimension, in which each unit has consecutive features.

    Attributes:
        unit: Kind of unit.
        features: What the features are: ``query``, ``kv`` or ``neuron``.
        width: Number of features of one unit.
    """

    unit: Unit
    features: str
    width: Callable[[Geometry], int]

    def size(self, geometry: Geometry) -> int:
        """Return the number of features of all units."""
        return self.unit.count(geometry) * self.width(geometry)


def kept_neuron_count(intermediate_size: int, ratio: float) -> int:
    """Return the number of kept neurons, ``d_ff - ceil(ratio * d_ff)`` (LoRAM's counts).

    The ratio is read as an exact decimal, so 0.35 of 100 is exactly 35.
    """
    return intermediate_size - math.ceil(Fraction(str(ratio)) * intermediate_size)


def kept_kv_head_count(num_heads: int, num_kv_heads: int, ratio: float) -> int:
    """Return the number of kept KV heads.

    It is ``n_kv - int(ratio * n_kv)`` under GQA and ``int(n * (1 - ratio))`` under MHA.
    """
    exact = Fraction(str(ratio))
    if num_kv_heads == num_heads:
        return int(num_heads * (1 - exact))
    return num_kv_heads - int(exact * num_kv_heads)


KV_HEADS = Unit(
    "kv_heads",
    "KV heads",
    count=lambda sizes: sizes.num_kv_heads,
    kept=lambda sizes, ratio: kept_kv_head_count(sizes.num_heads, sizes.num_kv_heads, ratio),
)
"""KV heads, each with the query heads of its group."""
NEURONS = Unit(
    "neurons",
    "neurons",
    count=lambda sizes: sizes.intermediate_size,
    kept=lambda sizes, ratio: kept_neuron_count(sizes.intermediate_size, ratio),
    per_expert=True,
    rounded=True,
)
"""Intermediate neurons of the MLP."""
UNITS = (KV_HEADS, NEURONS)
"""All kinds of units; random scores are drawn in this order."""

QUERY_GROUP = Span(KV_HEADS, "query", lambda sizes: sizes.group_size * sizes.head_dim)
"""The ``g = num_heads / num_kv_heads`` query heads of a KV head: ``g * head_dim`` features."""
KV_HEAD = Span(KV_HEADS, "kv", lambda sizes: sizes.head_dim)
"""One key or value head: ``head_dim`` features."""
NEURON = Span(NEURONS, "neuron", lambda _: 1)
"""One neuron: one feature."""
