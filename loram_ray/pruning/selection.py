"""Selection of the kept units from scores: how many in each layer, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from loram_ray.errors import LoramError
from loram_ray.plan import KeptUnits
from loram_ray.pruning.criteria import LayerScores
from loram_ray.units import UNITS, Geometry, Unit

Allocation = Literal["uniform", "global"]
Counts = dict[str, int]
"""Number of kept units of one layer, or of each of its experts, by the name of their kind."""

_LEFT_WHOLE_FIRST, _LEFT_WHOLE_LAST = 4, 2


def layer_range(layers: tuple[int, int] | None, num_layers: int) -> tuple[int, int]:
    """Return the pruned layers ``[first, end)``; by default all but the first 4 and last 2.

    For the 80 layers of LLaMA-70B, the default is the reference's [4, 78).

    Raises:
        LoramError: If the range is empty or exceeds the model.
    """
    first, end = layers if layers else (_LEFT_WHOLE_FIRST, num_layers - _LEFT_WHOLE_LAST)
    if not 0 <= first < end <= num_layers:
        raise LoramError(
            f"prune.layers must satisfy 0 <= first < end <= {num_layers} (the model's layers), got "
            f"[{first}, {end}]; change prune.layers"
        )
    return first, end


def layer_ratios(
    ratio: float, ratios: tuple[float, ...] | None, layers: tuple[int, int]
) -> dict[int, float]:
    """Return the ratio of each pruned layer, either the common one or its own from a list.

    Raises:
        LoramError: If the list does not have one ratio per pruned layer, or a ratio is not in [0,
            1).
    """
    numbers = range(*layers)
    if ratios is not None and len(ratios) != len(numbers):
        raise LoramError(
            f"prune.ratios must have one ratio for each of the {len(numbers)} layers "
            f"[{layers[0]}, {layers[1]}), got {len(ratios)}; change the list or prune.layers"
        )
    for number, listed in enumerate(ratios or ()):
        if not 0 <= listed < 1:
            raise LoramError(
                f"prune.ratios.{number} must be at least 0 and below 1, got {listed}; change it"
            )
    return dict(zip(numbers, ratios or [ratio] * len(numbers), strict=True))


def kept_counts(
    units: Sequence[Unit], geometry: Geometry, ratios: Mapping[int, float], multiple: int = 1
) -> dict[int, Counts]:
    """Return the number of units that each layer keeps at its ratio.

    Args:
        units: Kinds of units that the family has.
        geometry: Sizes of the base.
        ratios: Ratio of each pruned layer.
        multiple: Number to whose nearest multiple kept neurons are rounded, with at least one
            multiple.

    Raises:
        LoramError: If a ratio leaves a layer without units of some kind.
    """
    most = {unit: unit.count(geometry) for unit in units}
    counts = {}
    for layer, ratio in ratios.items():
        kept = {unit: unit.kept(geometry, ratio) for unit in units}
        if min(kept.values()) < 1:
            each = " and ".join(f"one of {most[unit]} {unit.title}" for unit in units)
            left = " and ".join(map(str, kept.values()))
            raise LoramError(
                f"prune.ratio must keep at least {each}, but {ratio} keeps {left}; lower it"
            )
        counts[layer] = {
            unit.name: round_to_multiple(count, multiple if unit.rounded else 1, most[unit])
            for unit, count in kept.items()
        }
    return counts


def round_to_multiple(count: int, multiple: int, most: int) -> int:
    """Round ``count`` to the nearest multiple, at least one multiple and at most ``most``.

    A count equal to ``most`` is returned unchanged, because nothing of that layer is pruned.
    """
    if count == most:
        return count
    return min(max(round(count / multiple), 1) * multiple, most)


def keep_units(
    scores: Mapping[int, LayerScores],
    geometry: Geometry,
    ratios: Mapping[int, float],
    allocation: Allocation = "uniform",
    multiple: int = 1,
) -> dict[int, KeptUnits]:
    """Keep the units with the highest scores.

    With global allocation, the ratios only set the total budget: the number of units they prune in
    all layers together. The scores of each layer are standardised to mean 0 and variance 1 (as FLAP
    does), and the lowest are pruned. Each kind of unit has its own budget, and every layer keeps at
    least one of each. Of equal scores, those with lower indices are kept first.

    Args:
        scores: Scores of each pruned layer.
        geometry: Sizes of the base.
        ratios: Ratio of each pruned layer.
        allocation: Distribution of the budget over layers.
        multiple: Number of which each layer's kept neurons are a multiple.

    Raises:
        LoramError: If a ratio leaves a layer without units of some kind.
    """
    units = [unit for unit in UNITS if all(unit.name in scored for scored in scores.values())]
    counts = kept_counts(units, geometry, ratios, multiple)
    if allocation == "global":
        uniform = kept_counts(units, geometry, ratios)
        shares = {u.name: _allocated(u, scores, uniform, geometry, multiple) for u in units}
        counts = {n: {name: share[n] for name, share in shares.items()} for n in scores}
    return {
        layer: KeptUnits({name: _highest(scores[layer][name], n) for name, n in kept.items()})
        for layer, kept in counts.items()
    }


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending indices of the ``count`` highest scores along the last dimension."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _allocated(
    unit: Unit,
    scores: Mapping[int, LayerScores],
    uniform: Mapping[int, Counts],
    geometry: Geometry,
    multiple: int,
) -> dict[int, int]:
    """Return the number of one kind of unit that each layer keeps, in each expert if it has any."""
    *experts, most = unit.shape(geometry)
    copies = math.prod(experts)
    budget = copies * sum(counts[unit.name] for counts in uniform.values())
    kept = _share_out([scored[unit.name].flatten() for scored in scores.values()], budget)
    multiple = multiple if unit.rounded else 1
    return {
        layer: round_to_multiple(min(max(round(count / copies), 1), most), multiple, most)
        for layer, count in zip(scores, kept, strict=True)
    }


def _share_out(layers: list[torch.Tensor], kept: int) -> list[int]:
    """Return how many of ``kept`` units each layer keeps, by standardised scores."""
    standardised = []
    for scores in layers:
        spread = scores.std(correction=0)
        z = (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
        z[scores.argmax()] = torch.inf  # every layer keeps at least one
        standardised.append(z)
    owner = torch.cat([torch.full((len(z),), i) for i, z in enumerate(standardised)])
    best = torch.cat(standardised).sort(descending=True, stable=True).indices[:kept]
    return torch.bincount(owner[best], minlength=len(layers)).tolist()
