"""Structured criteria, their statistics and the selection against loops over single weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers.calibrations import COLUMNS, unit_of
from loram_ray.architectures import architecture_of
from loram_ray.config import CRITERIA, Criterion, PruneConfig
from loram_ray.errors import LoramError
from loram_ray.pruning import statistics
from loram_ray.pruning.criteria import (
    SCORES,
    CalibratedLinear,
    LayerScores,
    TaylorForm,
    activation,
    flap,
    layer_linears,
    magnitude,
    score_layer,
    taylor,
)
from loram_ray.pruning.sparsify import MASKINGS
from loram_ray.units import Geometry

FAMILIES = ["llama", "phi3", "mixtral", "qwen3_moe"]
LAYER = 1


def geometry_of(family: str) -> Geometry:
    """4 KV heads of 2 query heads each: as folded by position, heads of different groups mix."""
    experts = 3 if family in ("mixtral", "qwen3_moe") else 0
    return Geometry(2, 10, 7, num_heads=8, num_kv_heads=4, head_dim=3, num_experts=experts)


def shape_of(name: str, sizes: Geometry) -> tuple[int, int]:
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    width, hidden = sizes.intermediate_size, sizes.hidden_size
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "qkv_proj": queries + 2 * keys}
    rows |= {"gate_up_proj": 2 * width}
    columns = {"o_proj": queries, "down_proj": width, "w2": width}
    return (hidden, columns[name]) if name in columns else (rows.get(name, width), hidden)


def random_layer(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A weight for each coupled linear of a layer, by its path."""
    sizes, generator = geometry_of(family), torch.Generator().manual_seed(seed)
    return {
        module: torch.randn(shape_of(module.rpartition(".")[2], sizes), generator=generator)
        for module, _, _ in architecture_of(family).modules(LAYER, sizes)
    }


def expert_of(module: str) -> int:
    parts = module.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else 0


def naive_scores(
    family: str, weights: dict[str, torch.Tensor], importance: Callable[[str, int, int], float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the importance of single weights over the units that their row or column belongs to."""
    sizes = geometry_of(family)
    kv_heads = [0.0] * sizes.num_kv_heads
    neurons = [[0.0] * sizes.intermediate_size for _ in range(max(sizes.num_experts, 1))]
    for module, weight in weights.items():
        name = module.rpartition(".")[2]
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                kind, unit = unit_of(name, column if name in COLUMNS else row, sizes)
                value = importance(module, row, column)
                if kind == "kv_head":
                    kv_heads[unit] += value
                else:
                    neurons[expert_of(module)][unit] += value
    exact = neurons if sizes.num_experts else neurons[0]
    return torch.tensor(kv_heads).float(), torch.tensor(exact).float()


def assert_scores(found: LayerScores, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found.kv_heads, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.neurons, expected[1], rtol=1e-5, atol=1e-6)


def score(family: str, per_index: Callable[[CalibratedLinear], torch.Tensor | None]) -> LayerScores:
    sizes = geometry_of(family)
    return score_layer(layer_linears(architecture_of(family), sizes, LAYER), sizes, per_index)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_squared_norm_of_all_weights_of_a_unit(family: str) -> None:
    weights = random_layer(family)
    found = score(family, lambda e: magnitude(weights[e.module], e.linear.axis))
    assert_scores(
        found, naive_scores(family, weights, lambda m, r, c: weights[m][r, c].item() ** 2)
    )


def test_magnitude_of_bf16_weights_is_that_of_their_values() -> None:
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    for axis in (0, 1):
        expected = torch.from_numpy((weight.double().numpy() ** 2).sum(1 - axis)).float()
        torch.testing.assert_close(magnitude(weight, axis), expected)


@pytest.mark.parametrize("form", list(TaylorForm))
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_sum_of_the_terms_of_single_weights(family: str, form: TaylorForm) -> None:
    weights, gradients = random_layer(family), random_layer(family, seed=1)
    squares = {m: t.square() for m, t in random_layer(family, seed=2).items()}

    def term(module: str, row: int, column: int) -> float:
        w, g, f = (x[module][row, column].item() for x in (weights, gradients, squares))
        return {
            "first": abs(w * g),
            "second": abs(w * w * f),
            "mixed": abs(w * g - 0.5 * w * w * f),
        }[form.value]

    def per_index(entry: CalibratedLinear) -> torch.Tensor:
        module = entry.module
        return taylor(
            form,
            weights[module],
            entry.linear.axis,
            None if form is TaylorForm.SECOND else gradients[module],
            None if form is TaylorForm.FIRST else squares[module],
        )

    assert_scores(score(family, per_index), naive_scores(family, weights, term))


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_is_the_variance_of_the_input_times_the_squared_norm_of_its_column(
    family: str,
) -> None:
    weights = random_layer(family)
    generator = torch.Generator().manual_seed(3)
    inputs = {m: 3 + torch.randn(5, 8, w.shape[1], generator=generator) for m, w in weights.items()}
    pruned = {m: w for m, w in weights.items() if m.rpartition(".")[2] in COLUMNS}

    def per_index(entry: CalibratedLinear) -> torch.Tensor | None:
        if entry.module not in pruned:
            return None
        moments = statistics.Moments.empty(weights[entry.module].shape[1])
        moments.add(inputs[entry.module])
        return flap(weights[entry.module], moments)

    variance = {
        m: inputs[m].double().numpy().reshape(-1, inputs[m].shape[-1]).var(0) for m in pruned
    }
    expected = naive_scores(
        family, pruned, lambda m, r, c: float(variance[m][c]) * weights[m][r, c].item() ** 2
    )
    assert_scores(score(family, per_index), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_the_norm_over_sequences_of_the_mean_absolute_input(family: str) -> None:
    weights = random_layer(family)
    generator = torch.Generator().manual_seed(3)
    inputs = {m: torch.randn(5, 8, w.shape[1], generator=generator) for m, w in weights.items()}
    pruned = {m: w[:1] for m, w in weights.items() if m.rpartition(".")[2] in COLUMNS}

    def per_index(entry: CalibratedLinear) -> torch.Tensor | None:
        if entry.module not in pruned:
            return None
        found = statistics.MeanActivations.empty(weights[entry.module].shape[1])
        found.add(inputs[entry.module])
        return activation(found)

    def norm(module: str, _row: int, column: int) -> float:
        sequences = inputs[module][:, :, column].tolist()
        means = [sum(map(abs, values)) / len(values) for values in sequences]
        return math.sqrt(sum(mean**2 for mean in means))

    assert_scores(score(family, per_index), naive_scores(family, pruned, norm))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (6, 2), (4, 4), (4, 1)])
def test_a_query_head_counts_with_its_own_group(heads: int, kv_heads: int) -> None:
    """One query head alone has a score; folding by position puts it with head ``i % kv_heads``."""
    sizes = Geometry(2, 10, 7, heads, kv_heads, head_dim=3)
    folded_elsewhere = 0
    for head in range(heads):
        per_head = torch.zeros(heads)
        per_head[head] = 1

        def per_index(entry: CalibratedLinear, of_heads: torch.Tensor = per_head) -> object:
            name = entry.linear.name.rpartition(".")[2]
            return of_heads.repeat_interleave(3) if name in ("q_proj", "o_proj") else None

        linears = layer_linears(architecture_of("llama"), sizes, LAYER)
        found = score_layer(linears, sizes, per_index).kv_heads  # type: ignore[arg-type]
        expected = [0.0] * kv_heads
        expected[head // (heads // kv_heads)] = 6.0
        assert found.tolist() == expected
        folded = per_head.view(heads // kv_heads, kv_heads).sum(0) * 6
        folded_elsewhere += folded.tolist() != expected
    assert (folded_elsewhere > 0) == (1 < kv_heads < heads)


def test_a_score_that_is_not_finite_names_its_linear() -> None:
    weights = random_layer("llama")
    weights["model.layers.1.mlp.up_proj"][2, 3] = float("inf")
    with pytest.raises(LoramError, match=r"scores of model\.layers\.1\.mlp\.up_proj .* not finite"):
        score("llama", lambda e: magnitude(weights[e.module], e.linear.axis))


# Statistics

KINDS = {
    "moments": statistics.Moments,
    "squared norms": statistics.SquaredNorms,
    "mean activations": statistics.MeanActivations,
    "hessian": statistics.Hessian,
}


def reference(kind: str, x: np.ndarray) -> list[np.ndarray]:
    """What a statistic of ``[sequences, tokens, in]`` must be, float64."""
    tokens = x.reshape(-1, x.shape[-1])
    return {
        "moments": lambda: [tokens.mean(0), tokens.var(0)],
        "squared norms": lambda: [(tokens**2).sum(0)],
        "mean activations": lambda: [(np.abs(x).mean(1) ** 2).sum(0)],
        "hessian": lambda: [2 / len(tokens) * sum(np.outer(row, row) for row in tokens)],
    }[kind]()


def values_of(found: object) -> list[torch.Tensor]:
    match found:
        case statistics.Moments():
            return [found.mean, found.variance]
        case statistics.Hessian():
            return [found.matrix]
        case statistics.SquaredNorms() | statistics.MeanActivations():
            return [found.total]
    raise AssertionError(found)


def cuts(total: int, seed: int) -> list[tuple[int, int]]:
    """A random split of a range."""
    generator = np.random.default_rng(seed)
    inner = sorted(generator.choice(range(1, total), generator.integers(0, total - 1), False))
    edges = [0, *map(int, inner), total]
    return list(zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_shares_and_batches_merges_to_the_whole(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(13, 6, 5)) * np.exp(generator.normal(size=5)) + [0, 1, -2, 5, 0]
    x[:, :, 4] = 0  # a dead input
    inputs = torch.from_numpy(x).float()
    merged = KINDS[kind].empty(5)
    for begin, end in cuts(len(x), seed):
        share = KINDS[kind].empty(5)
        for first, last in cuts(end - begin, seed + 1) if end - begin > 1 else [(0, 1)]:
            share.add(inputs[begin + first : begin + last])
        merged.merge(share)
    merged.merge(KINDS[kind].empty(5))
    expected = reference(kind, inputs.double().numpy())
    found = values_of(merged)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), torch.from_numpy(other), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["moments", "squared norms", "hessian"])
def test_tokens_of_an_expert_count_one_by_one(kind: str) -> None:
    """They come without sequences, and sometimes none come."""
    x = np.random.default_rng(0).normal(size=(1, 11, 4))
    tokens = torch.from_numpy(x[0]).float()
    found = KINDS[kind].empty(4)
    for part in (tokens[:3], tokens[:0], tokens[3:]):
        found.add(part)
    for one, other in zip(values_of(found), reference(kind, x), strict=True):
        torch.testing.assert_close(one.double(), torch.from_numpy(other), rtol=2e-5, atol=1e-6)


def test_activation_takes_a_batch_of_an_expert_s_tokens_for_one_sequence() -> None:
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    found = statistics.MeanActivations.empty(4)
    for part in (x[:3], x[:0], x[3:]):
        found.add(part)
    expected = x[:3].abs().mean(0) ** 2 + x[3:].abs().mean(0) ** 2
    torch.testing.assert_close(found.total, expected)


def test_variance_survives_a_large_mean() -> None:
    """Mean 1000 times the deviation or more: a sum of squares less the squared sum gives noise."""
    generator = np.random.default_rng(0)
    means, spreads = [1e3, -1e3, 256.0, 0.0], [0.5, 1.0, 0.125, 1e-3]
    inputs = torch.from_numpy(generator.normal(means, spreads, size=(64, 32, 4))).float()
    found = statistics.Moments.empty(4)
    for begin in range(0, 64, 4):
        part = statistics.Moments.empty(4)
        part.add(inputs[begin : begin + 2])
        part.add(inputs[begin + 2 : begin + 4])
        found.merge(part)
    tokens = inputs.reshape(-1, 4)
    mean = torch.from_numpy(tokens.double().numpy().mean(0))
    variance = torch.from_numpy(tokens.double().numpy().var(0))
    naive = tokens.square().mean(0) - tokens.mean(0).square()
    assert (naive / variance - 1).abs().max() > 1e-2
    torch.testing.assert_close(found.variance.double(), variance, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_in_bf16_are_summed_in_float32(kind: str) -> None:
    inputs = (2 + torch.randn(64, 32, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = KINDS[kind].empty(4)
    for begin in range(0, 64, 4):
        found.add(inputs[begin : begin + 4])
    expected = reference(kind, inputs.double().numpy())
    for one, other in zip(values_of(found), expected, strict=True):
        torch.testing.assert_close(one.double(), torch.from_numpy(other), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_is_zero(kind: str) -> None:
    assert all(not value.any() for value in values_of(KINDS[kind].empty(3)))


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=list(CRITERIA))
def test_a_criterion_has_the_arithmetic_that_it_names(criterion: Criterion) -> None:
    assert criterion.units or criterion.weights
    assert criterion.weights == (criterion.name in MASKINGS)
    if criterion.units:  # random looks at no linear
        assert (criterion.name in SCORES) == (criterion.name != "random")
    else:
        assert criterion.name not in SCORES
    if criterion.statistic is not None:
        assert callable(statistics.statistic_of(criterion.name).empty)
    if criterion.form is not None:
        assert criterion.form in PruneConfig.model_fields


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=list(CRITERIA))
def test_the_configuration_takes_what_a_criterion_can(criterion: Criterion) -> None:
    given = {"base": "base", "output": "out", "method": criterion.name, "scores": "earlier"}
    assert PruneConfig(**given).pattern == criterion.default_pattern
    for pattern, possible in (("structured", criterion.units), ("2:4", criterion.weights)):
        if possible:
            assert PruneConfig(**given, pattern=pattern).pattern == pattern
        else:
            with pytest.raises(ValidationError, match=f"for method {criterion.name}, got"):
                PruneConfig(**given, pattern=pattern)
    with_text = PruneConfig.model_construct(method=criterion.name, scores=None)
    assert with_text.calibrates == criterion.calibrates


def test_a_criterion_s_label_has_its_form() -> None:
    given = {"base": "base", "output": "out", "scores": "earlier", "taylor": "mixed"}
    assert PruneConfig(**given, method="taylor").scored_by == "taylor mixed"
    assert PruneConfig(**given, method="flap").scored_by == "flap"
