"""The recipes of large models, against the models' real shapes, on the meta device."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from helpers.adapters import random_plan
from helpers.recipes import CONFIGS, RECIPES
from loram_ray.alignment.deepspeed_config import deepspeed_config
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.config import RunConfig, load_run
from loram_ray.models.configuration_pruned import PrunedLlamaConfig
from loram_ray.models.files import pruned_config
from loram_ray.models.modeling_pruned import PrunedLlamaForCausalLM
from loram_ray.pruning.selection import layer_range


def empty(config: object) -> torch.nn.Module:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def recipe(name: str) -> RunConfig:
    return load_run(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prunes_the_real_shapes_to_the_published_parameters(name: str) -> None:
    config, parameters, billions = RECIPES[name]
    base = empty(config)
    assert sum(p.numel() for p in base.parameters()) == parameters
    prune = recipe(name).prune
    assert prune is not None and prune.ratio is not None
    family = architecture_of("llama")
    geometry = family.geometry(config.to_dict())
    layers = layer_range(prune.layers, geometry.num_layers)
    plan = random_plan(family, geometry, prune.ratio, layers, prune.seed, "")
    specs = {n: TensorSpec(tuple(p.shape), torch.bfloat16) for n, p in base.named_parameters()}
    settings = pruned_config(config.to_dict(), plan, plan.linear_shapes(specs))
    with init_empty_weights():
        pruned = PrunedLlamaForCausalLM(PrunedLlamaConfig.from_dict(settings))
    count = sum(p.numel() for p in pruned.parameters())
    assert count < parameters
    assert billions is None or f"{count / 1e9:.2f}" == billions
    shapes = {n: tuple(p.shape) for n, p in pruned.named_parameters()}
    assert shapes == {n: plan_shape(plan, n, specs[n].shape) for n in specs}


def plan_shape(plan: object, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return plan.pruned_shape(name.removesuffix(".weight"), shape)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_aligns_as_the_paper_does(name: str) -> None:
    run = recipe(name)
    align = run.align
    assert align is not None and run.base.startswith("meta-llama/")
    assert align.total_steps == 1600
    assert (align.batch_size, align.corpus.sequence_length) == (128, 512)
    assert (align.optimiser.learning_rate, align.optimiser.warmup_steps) == (5e-5, 100)
    assert align.frozen == ("lm_head",)
    weights = {source.name: source.weight for source in align.corpus.sources}
    assert sorted(weights.values()) == [0.25, 0.25, 0.5]  # type: ignore[type-var]
    assert align.corpus.sequence_length <= RECIPES[name][0].max_position_embeddings
    built = deepspeed_config(align, {}, align.workers)
    assert built["train_batch_size"] == align.batch_size  # shared out evenly
    if align.min_workers is not None:
        assert deepspeed_config(align, {}, align.min_workers)["train_batch_size"] == 128
