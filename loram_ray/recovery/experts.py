"""Adapters of single experts, and the conditions under which PEFT loads them on fused experts.

transformers stores all experts of a layer in one parameter per projection, with gate and up fused.
PEFT converts an adapter of single experts on loading: it adds the ranks of gate and up, and their
alphas. The result is the same function only for the adapters that this module accepts.
"""

from __future__ import annotations

from collections.abc import Iterable

from loram_ray.architectures import Architecture, CoupledLinear
from loram_ray.artifacts.adapter import Adapter
from loram_ray.errors import LoramError


def adapted_experts(adapter: Adapter, family: Architecture) -> dict[str, CoupledLinear]:
    """Return the adapted modules that belong to single experts."""
    return _of_experts(adapter.modules, family)


def require_fusable_experts(
    adapter: Adapter, family: Architecture, base_parameters: Iterable[str]
) -> None:
    """Reject an adapter whose experts PEFT would change, or not find, on the base.

    Args:
        adapter: Adapter in the base's shapes or in pruned shapes.
        family: Family of the base.
        base_parameters: Names of the base's parameters on disk.

    Raises:
        LoramError: If PEFT would not reproduce the adapter; the message says why.
    """
    experts = adapted_experts(adapter, family)
    why = _why_not(adapter, family, experts, base_parameters) if experts else None
    if why is not None:
        raise LoramError(
            f"{adapter.directory} adapts experts in a way that PEFT cannot apply to the base's "
            f"fused experts: {why}; train with the same settings for all experts, or exclude "
            "experts from train.lora.targets"
        )


def _why_not(
    adapter: Adapter,
    family: Architecture,
    experts: dict[str, CoupledLinear],
    base_parameters: Iterable[str],
) -> str | None:
    config = adapter.config
    if config.get("use_rslora"):
        return "use_rslora scales by the rank's square root, and fusing doubles the rank"
    if isinstance(config.get("target_modules"), str):
        return "target_modules is a regular expression"
    rank, alpha = config["r"], config["lora_alpha"]
    for module in experts:
        if adapter.rank(module) != rank or adapter.scale(module) != alpha / rank:
            return f"{module} has a rank or an alpha of its own"
    adapted = set(experts.values())
    fused = {linear for linear in family.linears if linear.per_expert and linear.axis == 0}
    if adapted & fused and not fused <= adapted:
        return f"only one of {' and '.join(sorted(linear.name for linear in fused))} is adapted"
    stored = (name.removesuffix(".weight") for name in base_parameters)
    for module, linear in _of_experts(stored, family).items():
        if linear in adapted and module not in experts:
            return f"{module} is not adapted, but other experts are"
    names = {module.rpartition(".")[2] for module in experts}
    for module in adapter.modules:
        if module not in experts and module.rpartition(".")[2] in names:
            return f"{module} is named like an expert, but is not one"
    return None


def _of_experts(modules: Iterable[str], family: Architecture) -> dict[str, CoupledLinear]:
    found = ((module, family.locate(module)) for module in modules)
    return {module: place[1] for module, place in found if place and place[1].per_expert}
