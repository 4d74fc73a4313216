"""Structured criteria, their statistics and the selection against loops over single weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from loram_ray.architectures import Geometry, architecture_of
from loram_ray.config import CRITERIA, Criterion, PruneConfig
from loram_ray.errors import LoramError
from loram_ray.plan import KeptUnits
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
from loram_ray.pruning.scores import SCORES_FILE, load_scores, save_scores
from loram_ray.pruning.selection import (
    keep_units,
    kept_counts,
    layer_range,
    layer_ratios,
    round_to_multiple,
)
from loram_ray.pruning.sparsify import MASKINGS

FAMILIES = ["llama", "phi3", "mixtral", "qwen3_moe"]
LAYER = 1
COLUMNS = ("o_proj", "down_proj", "w2")
"""Linears whose columns are pruned; of all others the rows are."""
INPUT_SIDE = COLUMNS


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


def unit_of(name: str, index: int, sizes: Geometry) -> tuple[str, int]:
    """To which KV head or neuron a row or column of a linear belongs."""
    dim, group = sizes.head_dim, sizes.num_heads // sizes.num_kv_heads
    queries, keys = sizes.num_heads * dim, sizes.num_kv_heads * dim
    if name in ("q_proj", "o_proj") or (name == "qkv_proj" and index < queries):
        return "kv_head", index // dim // group
    if name == "qkv_proj":
        return "kv_head", (index - queries) % keys // dim
    if name in ("k_proj", "v_proj"):
        return "kv_head", index // dim
    return "neuron", index % sizes.intermediate_size


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
    pruned = {m: w for m, w in weights.items() if m.rpartition(".")[2] in INPUT_SIDE}

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
    pruned = {m: w[:1] for m, w in weights.items() if m.rpartition(".")[2] in INPUT_SIDE}

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


# Selection

SMALL = Geometry(6, 16, 12, num_heads=8, num_kv_heads=4, head_dim=2)
LARGE = Geometry(6, 16, 1024, num_heads=8, num_kv_heads=4, head_dim=2)
MIXTURE = Geometry(6, 16, 12, num_heads=8, num_kv_heads=4, head_dim=2, num_experts=3)


def random_layer_scores(
    sizes: Geometry, layers: range = range(1, 5), seed: int = 0, coarse: bool = False
) -> dict[int, LayerScores]:
    """Scores of layers, each at a scale and with an outlier of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.num_experts,) if sizes.num_experts else ()
    scores = {}
    for layer in layers:
        scale = 10.0 ** (layer - 2)
        heads = torch.rand(sizes.num_kv_heads, generator=generator) * scale
        neurons = torch.rand((*shape, sizes.intermediate_size), generator=generator) ** layer
        if coarse:
            heads, neurons = (heads / scale * 2).round(), (neurons * 3).round()
        scores[layer] = LayerScores(heads, neurons * scale)
    return scores


def naive_highest(scores: list[float], count: int) -> list[int]:
    """Indices of the highest, the first of equals, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@pytest.mark.parametrize(
    ("sizes", "ratio", "heads", "neurons"),
    [
        (Geometry(80, 8192, 28672, 64, 8, 128), 0.65, 3, 10035),
        (Geometry(80, 8192, 28672, 64, 8, 128), 0.75, 2, 7168),
        (Geometry(80, 8192, 28672, 64, 8, 128), 0.85, 2, 4300),
        (Geometry(80, 8192, 28672, 64, 8, 128), 0.95, 1, 1433),
        (Geometry(40, 5120, 13824, 40, 40, 128), 0.65, 14, 4838),
    ],
)
def test_counts_of_the_reference_s_models(
    sizes: Geometry, ratio: float, heads: int, neurons: int
) -> None:
    layers = layer_range(None, sizes.num_layers)
    assert layers == (4, sizes.num_layers - 2)
    counts = kept_counts(sizes, layer_ratios(ratio, None, layers))
    assert counts == dict.fromkeys(range(*layers), (heads, neurons))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.7])
def test_the_highest_of_each_layer_and_expert_are_kept(
    ratio: float, sizes: Geometry, coarse: bool
) -> None:
    scores = random_layer_scores(sizes, coarse=coarse)
    kept = keep_units(scores, sizes, dict.fromkeys(scores, ratio))
    heads = 4 - int(ratio * 4)
    neurons = 12 - math.ceil(round(ratio * 12, 9))
    for layer, units in kept.items():
        assert units.kv_heads.tolist() == naive_highest(scores[layer].kv_heads.tolist(), heads)
        rows = scores[layer].neurons.reshape(-1, 12).tolist()
        expected = [naive_highest(row, neurons) for row in rows]
        assert units.neurons.tolist() == (expected if sizes.num_experts else expected[0])
        assert units.neurons.dtype == units.kv_heads.dtype == torch.int64


def test_a_list_gives_each_layer_its_ratio() -> None:
    ratios = layer_ratios(0.9, (0.0, 0.25, 0.5, 0.75), (1, 5))
    assert ratios == {1: 0.0, 2: 0.25, 3: 0.5, 4: 0.75}
    kept = keep_units(random_layer_scores(SMALL), SMALL, ratios)
    assert [len(units.kv_heads) for units in kept.values()] == [4, 3, 2, 1]
    assert [len(units.neurons) for units in kept.values()] == [12, 9, 6, 3]
    for wrong in ((), (0.5,), (0.5,) * 5):
        with pytest.raises(
            LoramError, match=rf"prune.ratios .* 4 layers \[1, 5\), got {len(wrong)}"
        ):
            layer_ratios(0.9, wrong, (1, 5))


@pytest.mark.parametrize("ratios", [(0.5, 1.0, 0.5, 0.5), (0.5, 0.5, -0.1, 0.5)])
def test_a_listed_ratio_out_of_range_is_refused_by_its_number(ratios: tuple[float, ...]) -> None:
    number = next(i for i, ratio in enumerate(ratios) if not 0 <= ratio < 1)
    with pytest.raises(LoramError, match=rf"prune.ratios.{number} must be .* got {ratios[number]}"):
        layer_ratios(0.5, ratios, (1, 5))


def test_a_listed_ratio_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(LoramError, match=r"0.99 leaves 1 and 0"):
        kept_counts(SMALL, {1: 0.5, 2: 0.99})


def greedy(layers: list[list[float]], budget: int) -> list[list[int]]:
    """Kept units by taking the best of each layer, then one after another the best of all left."""
    standard = []
    for scores in layers:
        mean = sum(scores) / len(scores)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        standard.append([(s - mean) / deviation if deviation else 0.0 for s in scores])
    kept = [[max(range(len(z)), key=lambda i: (z[i], -i))] for z in standard]  # noqa: B023
    while sum(map(len, kept)) < budget:
        candidates = [
            (z[i], -layer, -i)
            for layer, z in enumerate(standard)
            for i in range(len(z))
            if i not in kept[layer]
        ]
        _, layer, i = max(candidates)
        kept[-layer].append(-i)
    return [sorted(k) for k in kept]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75, 0.9])
def test_a_global_allocation_is_the_greedy_one_of_the_uniform_budget(
    ratio: float, seed: int, coarse: bool
) -> None:
    scores = random_layer_scores(SMALL, seed=seed, coarse=coarse)
    ratios = dict.fromkeys(scores, ratio)
    kept = keep_units(scores, SMALL, ratios, "global")
    uniform = kept_counts(SMALL, ratios)
    heads, neurons = (sum(count[i] for count in uniform.values()) for i in (0, 1))
    found_heads = [units.kv_heads.tolist() for units in kept.values()]
    found_neurons = [units.neurons.tolist() for units in kept.values()]
    assert sum(map(len, found_heads)) == heads and sum(map(len, found_neurons)) == neurons
    assert all(found_heads) and all(found_neurons)
    assert found_heads == greedy([s.kv_heads.tolist() for s in scores.values()], heads)
    assert found_neurons == greedy([s.neurons.tolist() for s in scores.values()], neurons)


def test_a_global_allocation_takes_its_budget_from_listed_ratios() -> None:
    scores = random_layer_scores(SMALL)
    kept = keep_units(scores, SMALL, layer_ratios(0.5, (0.0, 0.25, 0.5, 0.75), (1, 5)), "global")
    assert sum(len(units.kv_heads) for units in kept.values()) == 4 + 3 + 2 + 1
    assert sum(len(units.neurons) for units in kept.values()) == 12 + 9 + 6 + 3


def test_a_global_allocation_moves_units_to_the_layers_that_need_them() -> None:
    """Two alike layers, but for one whose scores are a few high ones among many low ones."""
    flat, peaked = torch.linspace(1, 2, 12), torch.cat([torch.full((2,), 9.0), torch.rand(10)])
    scores = {i: LayerScores(torch.rand(4), n) for i, n in {1: flat, 2: peaked}.items()}
    kept = keep_units(scores, SMALL, {1: 0.5, 2: 0.5}, "global")
    assert len(kept[1].neurons) > 6 > len(kept[2].neurons) >= 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_experts_of_a_global_allocation_have_equally_many_neurons_each_its_own(
    ratio: float,
) -> None:
    scores = random_layer_scores(MIXTURE)
    ratios = dict.fromkeys(scores, ratio)
    kept = keep_units(scores, MIXTURE, ratios, "global")
    budget = sum(n for _, n in kept_counts(MIXTURE, ratios).values())
    counts = [units.neurons.shape[1] for units in kept.values()]
    # A layer's share is rounded to whole neurons in each expert.
    assert abs(sum(counts) - budget) <= len(kept) / 2 and min(counts) >= 1
    for layer, units in kept.items():
        for expert, row in enumerate(units.neurons.tolist()):
            assert row == naive_highest(scores[layer].neurons[expert].tolist(), len(row))


@pytest.mark.parametrize("multiple", [64, 128])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.35, 0.65, 0.9, 0.97])
def test_kept_neurons_are_a_multiple_near_the_count(
    ratio: float, allocation: str, multiple: int
) -> None:
    scores = random_layer_scores(LARGE)
    ratios = {layer: ratio for layer in scores} | {3: 0.0}
    plain = keep_units(scores, LARGE, ratios, allocation)  # type: ignore[arg-type]
    kept = keep_units(scores, LARGE, ratios, allocation, multiple)  # type: ignore[arg-type]
    for layer, units in kept.items():
        exact, found = len(plain[layer].neurons), len(units.neurons)
        assert found % multiple == 0 and multiple <= found <= 1024
        assert abs(found - exact) <= multiple / 2 or found == multiple
        assert units.neurons.tolist() == naive_highest(scores[layer].neurons.tolist(), found)
        assert torch.equal(units.kv_heads, plain[layer].kv_heads)
    if allocation == "uniform":
        assert len(kept[3].neurons) == 1024


def test_rounding_leaves_a_whole_layer_whole() -> None:
    assert round_to_multiple(1000, 64, most=1000) == 1000
    assert round_to_multiple(999, 64, most=1000) == 1000  # the nearest multiple does not exist
    assert round_to_multiple(1, 64, most=1000) == 64
    assert round_to_multiple(95, 64, most=1000) == 64
    assert round_to_multiple(97, 64, most=1000) == 128
    assert round_to_multiple(7, 1, most=1000) == 7


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("sizes", [SMALL, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_ratio_of_zero_keeps_everything(allocation: str, sizes: Geometry, multiple: int) -> None:
    scores = random_layer_scores(sizes)
    kept = keep_units(scores, sizes, dict.fromkeys(scores, 0.0), allocation, multiple)  # type: ignore[arg-type]
    for units in kept.values():
        assert units.kv_heads.tolist() == list(range(4))
        rows = units.neurons.reshape(-1, 12).tolist()
        assert rows == [list(range(12))] * max(sizes.num_experts, 1)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_equal_scores_are_kept_in_the_order_of_their_indices(allocation: str) -> None:
    scores = {i: LayerScores(torch.ones(4), torch.zeros(12)) for i in range(1, 4)}
    kept = [
        keep_units(scores, SMALL, dict.fromkeys(scores, 0.5), allocation)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    for units in kept[0].values():
        assert units.kv_heads.tolist() == list(range(len(units.kv_heads)))
        assert units.neurons.tolist() == list(range(len(units.neurons)))
    assert same_units(*kept)


def same_units(one: dict[int, KeptUnits], other: dict[int, KeptUnits]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[i].kv_heads, other[i].kv_heads)
        and torch.equal(one[i].neurons, other[i].neurons)
        for i in one
    )


def test_selection_does_not_change_the_scores() -> None:
    scores = random_layer_scores(SMALL)
    before = {i: (s.kv_heads.clone(), s.neurons.clone()) for i, s in scores.items()}
    keep_units(scores, SMALL, dict.fromkeys(scores, 0.5), "global", 4)
    for layer, (heads, neurons) in before.items():
        assert torch.equal(scores[layer].kv_heads, heads)
        assert torch.equal(scores[layer].neurons, neurons)


# Scores on disk


@pytest.mark.parametrize("sizes", [SMALL, MIXTURE], ids=["dense", "mixture"])
def test_scores_survive_the_disk_and_part_of_the_layers_will_do(
    sizes: Geometry, tmp_path: Path
) -> None:
    scores = random_layer_scores(sizes)
    save_scores(tmp_path, "taylor first", scores, {})
    for layers in ((1, 5), (2, 4)):
        found, norms = load_scores(tmp_path, "taylor first", layers)
        assert norms == {} and list(found) == list(range(*layers))
        for layer, entry in found.items():
            assert torch.equal(entry.kv_heads, scores[layer].kv_heads)
            assert torch.equal(entry.neurons, scores[layer].neurons)


def test_norms_survive_the_disk(tmp_path: Path) -> None:
    norms = {f"model.layers.{i}.mlp.{n}": torch.rand(7) for i in (1, 2) for n in ("up_proj", "x")}
    save_scores(tmp_path, "wanda", {}, norms)
    scores, found = load_scores(tmp_path, "wanda", (1, 3))
    assert scores == {} and found.keys() == norms.keys()
    assert all(torch.equal(found[name], norms[name]) for name in norms)


def test_scores_of_another_criterion_or_of_other_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoramError, match=rf"prune.scores must be a directory with {SCORES_FILE}"):
        load_scores(tmp_path, "flap", (1, 5))
    save_scores(tmp_path, "taylor first", random_layer_scores(SMALL), {})
    for method in ("flap", "taylor second", "taylor"):
        with pytest.raises(LoramError, match=f"scores of {method}, .* those of taylor first"):
            load_scores(tmp_path, method, (1, 5))
    for layers, missing in {(0, 4): 0, (2, 6): 5, (1, 6): 5}.items():
        with pytest.raises(LoramError, match=rf"prune.scores must hold layers .* layer {missing}"):
            load_scores(tmp_path, "taylor first", layers)


def test_norms_of_other_layers_are_refused(tmp_path: Path) -> None:
    norms = {f"model.layers.{i}.mlp.up_proj": torch.rand(7) for i in (1, 2)}
    save_scores(tmp_path, "wanda", {}, norms)
    for layers, missing in {(0, 2): 0, (1, 4): 3}.items():
        with pytest.raises(LoramError, match=rf"prune.scores must hold layers .* layer {missing}"):
            load_scores(tmp_path, "wanda", layers)


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
