"""LoRAM-Rand: kept units drawn uniformly, GQA group by group and neuron by neuron.

The draws of a layer's experts are independent.
"""

from __future__ import annotations

import torch

from loram_ray.architectures import Architecture, Geometry
from loram_ray.errors import LoramError
from loram_ray.plan import KeptUnits, PruningPlan, kept_kv_head_count, kept_neuron_count

_LEFT_WHOLE_FIRST, _LEFT_WHOLE_LAST = 4, 2


def layer_range(layers: tuple[int, int] | None, num_layers: int) -> tuple[int, int]:
    """Return the pruned layers ``[first, end)``; by default all but the first 4 and last 2.

    That default gives the reference's [4, 78) of LLaMA-70B's 80 layers.

    Raises:
        LoramError: the range is empty or reaches outside the model.
    """
    first, end = layers if layers else (_LEFT_WHOLE_FIRST, num_layers - _LEFT_WHOLE_LAST)
    if not 0 <= first < end <= num_layers:
        raise LoramError(
            f"prune.layers must satisfy 0 <= first < end <= {num_layers} (the model's layers), "
            f"got [{first}, {end}]; set prune.layers within the model"
        )
    return first, end


def random_plan(
    architecture: Architecture,
    geometry: Geometry,
    ratio: float,
    layers: tuple[int, int],
    seed: int,
    base_fingerprint: str,
) -> PruningPlan:
    """Draw a structured plan, seeded layer by layer (the choice in a layer is its own).

    Raises:
        LoramError: the ratio leaves a layer no KV head or no neuron.
    """
    heads = kept_kv_head_count(geometry.num_heads, geometry.num_kv_heads, ratio)
    neurons = kept_neuron_count(geometry.intermediate_size, ratio)
    if heads < 1 or neurons < 1:
        raise LoramError(
            f"prune.ratio must leave at least one of {geometry.num_kv_heads} KV heads and one of "
            f"{geometry.intermediate_size} neurons, {ratio} leaves {heads} and {neurons}; lower it"
        )
    kept = {}
    for layer in range(*layers):
        generator = torch.Generator().manual_seed((seed << 16) + layer)
        kept[layer] = KeptUnits(
            kv_heads=_draw(geometry.num_kv_heads, heads, generator),
            neurons=_draw_neurons(geometry, neurons, generator),
        )
    return PruningPlan(
        architecture.model_type, geometry, "random", ratio, seed, layers, base_fingerprint, kept
    )


def _draw_neurons(geometry: Geometry, count: int, generator: torch.Generator) -> torch.Tensor:
    """Kept neurons ``[count]``, or ``[experts, count]``."""
    total = geometry.intermediate_size
    if not geometry.num_experts:
        return _draw(total, count, generator)
    return torch.stack([_draw(total, count, generator) for _ in range(geometry.num_experts)])


def _draw(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(total, generator=generator)[:count].sort().values
