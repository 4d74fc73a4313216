"""LoRAM-Rand: random scores of GQA groups and neurons."""

from __future__ import annotations

import torch

from loram_ray.architectures import Geometry
from loram_ray.pruning.criteria import LayerScores


def random_scores(geometry: Geometry, layers: tuple[int, int], seed: int) -> dict[int, LayerScores]:
    """Return scores that order the units of each layer randomly, seeded per layer.

    Each layer, and each expert in it, has its own order.
    """
    scores = {}
    for layer in range(*layers):
        generator = torch.Generator().manual_seed((seed << 16) + layer)
        kv_heads = _shuffled(geometry.num_kv_heads, generator)
        experts = [
            _shuffled(geometry.intermediate_size, generator)
            for _ in range(max(geometry.num_experts, 1))
        ]
        neurons = torch.stack(experts) if geometry.num_experts else experts[0]
        scores[layer] = LayerScores(kv_heads, neurons)
    return scores


def _shuffled(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return the numbers from 0 down to ``1 - count`` in random order, float32."""
    scores = torch.empty(count)
    scores[torch.randperm(count, generator=generator)] = -torch.arange(count, dtype=torch.float32)
    return scores
