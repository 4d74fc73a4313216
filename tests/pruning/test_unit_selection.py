"""Which units a plan keeps by their scores, against naive selections; scores on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from loram_ray.errors import LoramError
from loram_ray.plan import KeptUnits
from loram_ray.pruning.criteria import (
    LayerScores,
)
from loram_ray.pruning.scores import SCORES_FILE, load_scores, save_scores
from loram_ray.pruning.selection import (
    keep_units,
    kept_counts,
    layer_range,
    layer_ratios,
    round_to_multiple,
)
from loram_ray.units import UNITS, Geometry

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
        scores[layer] = LayerScores(kv_heads=heads, neurons=neurons * scale)
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
    counts = kept_counts(UNITS, sizes, layer_ratios(ratio, None, layers))
    assert counts == dict.fromkeys(range(*layers), {"kv_heads": heads, "neurons": neurons})


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
    with pytest.raises(LoramError, match=r"0.99 keeps 1 and 0"):
        kept_counts(UNITS, SMALL, {1: 0.5, 2: 0.99})


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
    uniform = kept_counts(UNITS, SMALL, ratios)
    heads, neurons = (sum(counts[unit.name] for counts in uniform.values()) for unit in UNITS)
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
    scores = {
        i: LayerScores(kv_heads=torch.rand(4), neurons=n) for i, n in {1: flat, 2: peaked}.items()
    }
    kept = keep_units(scores, SMALL, {1: 0.5, 2: 0.5}, "global")
    assert len(kept[1].neurons) > 6 > len(kept[2].neurons) >= 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_experts_of_a_global_allocation_have_equally_many_neurons_each_its_own(
    ratio: float,
) -> None:
    scores = random_layer_scores(MIXTURE)
    ratios = dict.fromkeys(scores, ratio)
    kept = keep_units(scores, MIXTURE, ratios, "global")
    budget = sum(counts["neurons"] for counts in kept_counts(UNITS, MIXTURE, ratios).values())
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
    scores = {i: LayerScores(kv_heads=torch.ones(4), neurons=torch.zeros(12)) for i in range(1, 4)}
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
        with pytest.raises(
            LoramError, match=rf"prune.scores must contain layers .* layer {missing}"
        ):
            load_scores(tmp_path, "taylor first", layers)


def test_norms_of_other_layers_are_refused(tmp_path: Path) -> None:
    norms = {f"model.layers.{i}.mlp.up_proj": torch.rand(7) for i in (1, 2)}
    save_scores(tmp_path, "wanda", {}, norms)
    for layers, missing in {(0, 2): 0, (1, 4): 3}.items():
        with pytest.raises(
            LoramError, match=rf"prune.scores must contain layers .* layer {missing}"
        ):
            load_scores(tmp_path, "wanda", layers)
