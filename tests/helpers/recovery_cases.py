"""Bases and adapters to recover, and the kept positions of each module."""

from __future__ import annotations

from pathlib import Path

import loram_ray as lr
from helpers import tiny
from helpers.adapters import (
    LINEARS,
)
from loram_ray.plan import PruningPlan

PREFIX = "base_model.model."


# Sizes of the base and settings of the adapter.
CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "gqa": ({}, {}),
    "mha": ({"heads": 6, "kv_heads": 6, "hidden": 48}, {"r": 3}),
    "heads together wider than hidden": ({"heads": 6, "kv_heads": 2, "hidden": 36}, {}),
    "biases": ({"bias": True}, {"r": 2}),
    "rank 1": ({}, {"r": 1, "lora_alpha": 1}),
    "rank beyond what is kept": ({}, {"r": 40}),
    "rank and alpha patterns": (
        {},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.2\.mlp\.up_proj": 7},
            "alpha_pattern": {"down_proj": 32, r"^model\.layers\.1\.self_attn\.o_proj": 3},
        },
    ),
    "rank-stabilised": ({}, {"use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "attention only": ({}, {"target_modules": ["q_proj", "v_proj"]}),
    "columns only": ({}, {"target_modules": ["o_proj", "down_proj"]}),
    "some layers": ({}, {"layers_to_transform": [0, 2]}),
    "by expression": ({}, {"target_modules": r".*layers\.[12]\.mlp\.(gate|down)_proj"}),
    "with the output head": ({}, {"target_modules": [*LINEARS, "lm_head"]}),
    "tied": ({"tied": True}, {}),
    "tied, with the output head": ({"tied": True}, {"target_modules": [*LINEARS, "lm_head"]}),
}


def make_pruned(folder: Path, ratio: float = 0.5, **sizes: object) -> tuple[Path, Path]:
    """Create a base and its pruned model."""
    base = tiny.write_base(folder / "base", seed=4, **sizes)
    config = lr.PruneConfig(
        base=str(base), output=folder / "pruned", ratio=ratio, layers=(1, 3), seed=2
    )
    return base, lr.prune(config).output


def kept_of(module: str, plan: PruningPlan) -> tuple[list[int] | None, list[int] | None]:
    """Return the kept rows and columns of a module, expanded from the units; None means all."""
    parts = module.split(".")
    if module == "lm_head" or int(parts[2]) not in plan.layers:
        return None, None
    units, sizes = plan.layers[int(parts[2])], plan.geometry
    group = sizes.num_heads // sizes.num_kv_heads
    keys = [h * sizes.head_dim + i for h in units.kv_heads.tolist() for i in range(sizes.head_dim)]
    width = group * sizes.head_dim
    queries = [h * width + i for h in units.kv_heads.tolist() for i in range(width)]
    neurons = units.neurons.tolist()
    return {
        "q_proj": (queries, None),
        "k_proj": (keys, None),
        "v_proj": (keys, None),
        "o_proj": (None, queries),
        "gate_proj": (neurons, None),
        "up_proj": (neurons, None),
        "down_proj": (None, neurons),
    }[parts[-1]]
