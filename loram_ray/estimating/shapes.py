"""Derive the shapes of a base and of its pruned model from ``config.json`` alone.

Models are built on the meta device by the classes that train them; no weights are allocated.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loram_ray.alignment.engine import freeze
from loram_ray.alignment.mfu import linear_weights
from loram_ray.architectures import Architecture, architecture_of
from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.config import PruneConfig
from loram_ray.criteria import STRUCTURED
from loram_ray.errors import LoramError
from loram_ray.models.files import pruned_config, stock_model_type
from loram_ray.models.registration import register
from loram_ray.plan import PruningPlan
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.selection import keep_units, layer_range, layer_ratios
from loram_ray.units import Geometry


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer.

    Attributes:
        query: Total features of the query heads.
        key: Total features of the KV heads.
        heads: Number of query heads.
        neurons: Number of neurons in the MLP.
        norms: Total features of the norms.
    """

    query: int
    key: int
    heads: int
    neurons: int
    norms: int


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a causal LM.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        trained: Number of parameters that alignment trains.
        layer_weights: Number of weights in the layers' linears.
        head_weights: Number of weights in the output head, tied or not.
        head_trained: Whether alignment trains the output head.
        largest: Largest number of parameters that a module holds directly.
        hidden: Hidden size.
        vocabulary: Vocabulary size.
        layers: Sizes of the decoder layers.
    """

    parameters: int
    trained: int
    layer_weights: int
    head_weights: int
    head_trained: bool
    largest: int
    hidden: int
    vocabulary: int
    layers: tuple[LayerSizes, ...]


def shapes_of(
    base_config: dict[str, Any], prune: PruneConfig, frozen: Collection[str]
) -> tuple[ModelShapes, ModelShapes]:
    """Return the sizes of the pruned model, as alignment trains it, and of its base.

    The choice of units does not affect sizes, so they are drawn at random. A global ``allocation``
    is treated as uniform, which leaves about as many parameters.

    Args:
        base_config: ``config.json`` of the base.
        prune: Pruning configuration.
        frozen: Parts that alignment does not train.

    Raises:
        LoramError: If the family is not supported, the model is a mixture of experts, or the layers
            or ratio do not suit it.
    """
    require_dense(architecture_of(base_config.get("model_type")), base_config)
    base = empty_model(base_config)
    pruned = empty_model(config_after(base_config, prune, base))
    freeze(pruned, frozen)
    base.requires_grad_(False)
    return model_shapes(pruned), model_shapes(base)


def require_dense(family: Architecture, base_config: dict[str, Any]) -> None:
    """Refuse a mixture of experts, whose activations depend on the data.

    Raises:
        LoramError: If the model is a mixture of experts.
    """
    if family.geometry(base_config).num_experts:
        raise LoramError(
            f"prune.base must be a dense model for an estimate, got {family.model_type}, whose "
            "routing is not modelled; use a dense family"
        )


def config_after(
    base_config: dict[str, Any], prune: PruneConfig, base: nn.Module
) -> dict[str, Any]:
    """Return ``config.json`` of the pruned model; masked weights keep the base's shapes.

    Args:
        base_config: ``config.json`` of the base.
        prune: Pruning configuration.
        base: Model of that configuration, on any device.
    """
    if prune.pattern != STRUCTURED:
        return base_config
    family = architecture_of(base_config.get("model_type"))
    plan = _random_plan(family, family.geometry(base_config), prune)
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in base.named_parameters()}
    return pruned_config(base_config, plan, plan.linear_shapes(specs))


def model_shapes(model: Any) -> ModelShapes:
    """Return the sizes of a dense causal LM; parameters that require gradients count as trained.

    Args:
        model: Model on any device.
    """
    family = architecture_of(stock_model_type(model.config.model_type))
    head: nn.Linear = model.get_output_embeddings()
    layers = model.get_submodule(family.layers)
    geometry = family.geometry(model.config.to_dict())
    return ModelShapes(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layer_weights=linear_weights(layers),
        head_weights=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        largest=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        hidden=geometry.hidden_size,
        vocabulary=head.out_features,
        layers=tuple(_layer_sizes(layer, family, geometry) for layer in layers),
    )


def _layer_sizes(layer: Any, family: Architecture, geometry: Geometry) -> LayerSizes:
    spans = {span.features: span for linear in family.linears for span in linear.spans}
    kept = {
        span.unit: layer.get_submodule(linear.name).weight.shape[1] // span.width(geometry)
        for linear in family.linears
        for span in linear.spans
        if linear.axis == 1
    }
    query, key, neurons = (
        kept[spans[features].unit] * spans[features].width(geometry)
        for features in ("query", "kv", "neuron")
    )
    norms = (m for m in layer.modules() if type(m).__name__.endswith("Norm"))
    return LayerSizes(
        query=query,
        key=key,
        heads=query // geometry.head_dim,
        neurons=neurons,
        norms=sum(p.numel() for norm in norms for p in norm.parameters()),
    )


def _random_plan(family: Architecture, geometry: Geometry, prune: PruneConfig) -> PruningPlan:
    layers = layer_range(prune.layers, geometry.num_layers)
    ratios = layer_ratios(prune.ratio, prune.ratios, layers)
    scores = random_scores(family.units, geometry, layers, prune.seed)
    kept = keep_units(scores, geometry, ratios, multiple=prune.round_neurons_to)
    return PruningPlan(
        family.model_type, geometry, "random", prune.ratio, prune.seed, layers, "", kept
    )


def empty_model(
    config: dict[str, Any], device: str = "meta", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a causal LM from a stock or pruned ``config.json``, by default on the meta device."""
    register()
    settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings), dtype=dtype
        )
    return model
