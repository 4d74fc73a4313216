"""LoRAM-Rand: random scores of units."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loram_ray.pruning.criteria import LayerScores
from loram_ray.units import Geometry, Unit


def random_scores(
    units: Iterable[Unit], geometry: Geometry, layers: tuple[int, int], seed: int
) -> dict[int, LayerScores]:
    """Return scores that order the units of each layer randomly, seeded per layer.

    Each layer, and each expert in it, has its own order.
    """
    scores = {}
    for layer in range(*layers):
        generator = torch.Generator().manual_seed((seed << 16) + layer)
        scores[layer] = LayerScores(
            {unit.name: _shuffled(unit.shape(geometry), generator) for unit in units}
        )
    return scores


def _shuffled(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return the numbers from 0 down to ``1 - count`` in random order, float32 ``[..., count]``."""
    scores = torch.empty(shape)
    for row in scores.view(-1, shape[-1]):
        order = torch.randperm(shape[-1], generator=generator)
        row[order] = -torch.arange(shape[-1], dtype=torch.float32)
    return scores
