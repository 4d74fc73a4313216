"""Sizes of a base and of what pruning leaves of it, from its ``config.json`` alone.

The models are built on the meta device by the classes that train them: no weight exists.
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
from loram_ray.architectures import Architecture, Geometry, Unit, architecture_of
from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.config import PruneConfig
from loram_ray.config.criteria import STRUCTURED
from loram_ray.errors import LoramError
from loram_ray.models.files import pruned_config, stock_model_type
from loram_ray.models.registration import register
from loram_ray.plan import PruningPlan
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.selection import keep_units, layer_range, layer_ratios


@dataclass(frozen=True)
class LayerSizes:
    """A decoder layer.

    Attributes:
        query: features of all query heads together.
        key: features of all KV heads together.
        heads: query heads.
        neurons: of the MLP.
        norms: features of all norms together.
    """

    query: int
    key: int
    heads: int
    neurons: int
    norms: int


@dataclass(frozen=True)
class ModelShapes:
    """A causal LM.

    Attributes:
        parameters: all of them, tied ones once.
        trained: those that alignment trains.
        layer_weights: weights of the layers' linears.
        head_weights: weights of the output head, tied or not.
        head_trained: whether alignment trains them.
        largest: parameters of the largest module that has any of its own.
        hidden: hidden size.
        vocabulary: words.
        layers: of the decoder.
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
    """Sizes of the pruned model, as alignment trains it, and of its base.

    Which units a criterion keeps changes no size, so they are drawn at random; an ``allocation``
    that is global is taken as uniform, which has about as many parameters.

    Args:
        base_config: the base's ``config.json``.
        prune: how it is pruned.
        frozen: what alignment leaves as it is.

    Raises:
        LoramError: a family that is not supported, a mixture of experts, or layers or a ratio that
            the model does not have.
    """
    require_dense(architecture_of(base_config.get("model_type")), base_config)
    base = empty_model(base_config)
    pruned = empty_model(config_after(base_config, prune, base))
    freeze(pruned, frozen)
    base.requires_grad_(False)
    return model_shapes(pruned), model_shapes(base)


def require_dense(family: Architecture, base_config: dict[str, Any]) -> None:
    """Refuse a mixture of experts, whose activations depend on values.

    Raises:
        LoramError: it is one.
    """
    if family.geometry(base_config).num_experts:
        raise LoramError(
            f"prune.base must be a dense model for an estimate, got {family.model_type}: how many "
            "experts a token takes is not modelled; choose a dense family"
        )


def config_after(
    base_config: dict[str, Any], prune: PruneConfig, base: nn.Module
) -> dict[str, Any]:
    """``config.json`` of the pruned model; masked weights have the base's shapes.

    Args:
        base_config: the base's ``config.json``.
        prune: how it is pruned.
        base: a model of that configuration, on any device.
    """
    if prune.pattern != STRUCTURED:
        return base_config
    family = architecture_of(base_config.get("model_type"))
    plan = _random_plan(family, family.geometry(base_config), prune)
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in base.named_parameters()}
    return pruned_config(base_config, plan, plan.linear_shapes(specs))


def model_shapes(model: Any) -> ModelShapes:
    """Read the sizes of a causal LM of a supported, dense family, trained where it takes gradients.

    Args:
        model: on any device.
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
    inputs = {
        linear.sections[0]: layer.get_submodule(linear.name).weight.shape[1]
        for linear in family.linears
        if linear.axis == 1
    }
    query = inputs[Unit.QUERY_GROUP]
    norms = (m for m in layer.modules() if type(m).__name__.endswith("Norm"))
    return LayerSizes(
        query=query,
        key=query // geometry.group_size,
        heads=query // geometry.head_dim,
        neurons=inputs[Unit.NEURON],
        norms=sum(p.numel() for norm in norms for p in norm.parameters()),
    )


def _random_plan(family: Architecture, geometry: Geometry, prune: PruneConfig) -> PruningPlan:
    layers = layer_range(prune.layers, geometry.num_layers)
    ratios = layer_ratios(prune.ratio, prune.ratios, layers)
    scores = random_scores(geometry, layers, prune.seed)
    kept = keep_units(scores, geometry, ratios, multiple=prune.round_neurons_to)
    return PruningPlan(
        family.model_type, geometry, "random", prune.ratio, prune.seed, layers, "", kept
    )


def empty_model(
    config: dict[str, Any], device: str = "meta", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM of a ``config.json``, stock or pruned; on the meta device, without weights."""
    register()
    settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings), dtype=dtype
        )
    return model
