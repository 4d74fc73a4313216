"""Selection of the kept units from scores: how many in each layer, and which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from loram_ray.architectures import Geometry
from loram_ray.errors import LoramError
from loram_ray.plan import KeptUnits, kept_kv_head_count, kept_neuron_count
from loram_ray.pruning.criteria import LayerScores

Allocation = Literal["uniform", "global"]

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
            f"prune.layers must satisfy 0 <= first < end <= {num_layers} (the model's layers), "
            f"got [{first}, {end}]; set prune.layers within the model"
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
                f"prune.ratios.{number} must be at least 0 and below 1, got {listed}; choose the "
                "share to prune"
            )
    return dict(zip(numbers, ratios or [ratio] * len(numbers), strict=True))


def kept_counts(
    geometry: Geometry, ratios: Mapping[int, float], multiple: int = 1
) -> dict[int, tuple[int, int]]:
    """Return the number of KV heads and neurons that each layer keeps at its ratio.

    Args:
        geometry: Sizes of the base.
        ratios: Ratio of each pruned layer.
        multiple: Number to whose nearest multiple kept neurons are rounded, with at least one
            multiple.

    Raises:
        LoramError: If a ratio leaves a layer without KV heads or without neurons.
    """
    counts = {}
    for layer, ratio in ratios.items():
        heads = kept_kv_head_count(geometry.num_heads, geometry.num_kv_heads, ratio)
        neurons = kept_neuron_count(geometry.intermediate_size, ratio)
        if heads < 1 or neurons < 1:
            raise LoramError(
                f"prune.ratio must leave at least one of {geometry.num_kv_heads} KV heads and one "
                f"of {geometry.intermediate_size} neurons, {ratio} leaves {heads} and {neurons}; "
                "lower it"
            )
        counts[layer] = heads, round_to_multiple(neurons, multiple, geometry.intermediate_size)
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
    does), and the lowest are pruned. KV heads and neurons have separate budgets, and every layer
    keeps at least one of each. Of equal scores, those with lower indices are kept first.

    Args:
        scores: Scores of each pruned layer.
        geometry: Sizes of the base.
        ratios: Ratio of each pruned layer.
        allocation: Distribution of the budget over layers.
        multiple: Number of which each layer's kept neurons are a multiple.

    Raises:
        LoramError: If a ratio leaves a layer without KV heads or without neurons.
    """
    counts = kept_counts(geometry, ratios, multiple)
    if allocation == "global":
        counts = _allocated(scores, kept_counts(geometry, ratios), geometry, multiple)
    return {
        layer: KeptUnits(
            kv_heads=_highest(scores[layer].kv_heads, heads),
            neurons=_highest(scores[layer].neurons, neurons),
        )
        for layer, (heads, neurons) in counts.items()
    }


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending indices of the ``count`` highest scores along the last dimension."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _allocated(
    scores: Mapping[int, LayerScores],
    uniform: Mapping[int, tuple[int, int]],
    geometry: Geometry,
    multiple: int,
) -> dict[int, tuple[int, int]]:
    heads = _share_out([s.kv_heads for s in scores.values()], sum(h for h, _ in uniform.values()))
    experts = max(geometry.num_experts, 1)
    budget = experts * sum(n for _, n in uniform.values())
    neurons = _share_out([s.neurons.flatten() for s in scores.values()], budget)
    most = geometry.intermediate_size
    return {
        layer: (
            heads[i],
            round_to_multiple(min(max(round(neurons[i] / experts), 1), most), multiple, most),
        )
        for i, layer in enumerate(scores)
    }


def _share_out(layers: list[torch.Tensor], kept: int) -> list[int]:
    """Return how many of ``kept`` units each layer keeps, by standardised scores."""
    standardised = []
    for scores in layers:
        spread = scores.std(correction=0)
        z = (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
        z[scores.argmax()] = torch.inf  # every layer keeps one
        standardised.append(z)
    owner = torch.cat([torch.full((len(z),), i) for i, z in enumerate(standardised)])
    best = torch.cat(standardised).sort(descending=True, stable=True).indices[:kept]
    return torch.bincount(owner[best], minlength=len(layers)).tolist()
