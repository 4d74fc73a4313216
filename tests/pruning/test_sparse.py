"""Masks and SparseGPT against naive loops and the exact optimal-brain-surgeon solution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loram_ray.errors import LoramError
from loram_ray.pruning import pattern as pattern_module
from loram_ray.pruning.sparse import Pattern, magnitude_mask, sparsegpt, wanda_mask

UNSTRUCTURED = Pattern()
GROUPS = ["1:2", "2:4", "4:8", "3:5", "5:7", "1:10"]


def linear(
    rows: int, columns: int, seed: int = 0, tokens: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, correlated inputs of uneven sizes, and their Hessian in float32."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    hidden = torch.randn(tokens, max(columns // 4, 1), generator=generator)
    mixing = torch.randn(max(columns // 4, 1), columns, generator=generator)
    x = hidden @ mixing / mixing.shape[0] ** 0.5
    x = (x + 0.3 * torch.randn(tokens, columns, generator=generator)) * torch.randn(
        columns, generator=generator
    ).exp()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, x, hessian_of(x)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return (2 * x.double().t() @ x.double() / len(x)).float()


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The Hessian whose inverse is taken, float64: dead inputs 1, then damping."""
    full = hessian.double().clone()
    for j in range(len(full)):
        if full[j, j] == 0:
            full[j, j] = 1
    return full + damping * full.diagonal().mean() * torch.eye(len(full), dtype=torch.float64)


def surgeon(
    weight: torch.Tensor, hessian: torch.Tensor, ratio: float, pattern: Pattern, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT by explicit inverses of the remaining columns' Hessian, weight by weight."""
    full, w = damped(hessian), weight.double().clone()
    w[:, hessian.diagonal() == 0] = 0
    rows, columns = w.shape
    inverses = [torch.linalg.inv(full[j:, j:]) for j in range(columns)]
    keep = torch.ones(rows, columns, dtype=torch.bool)
    done = 0
    for j in range(columns):
        if not pattern.group and j % block == 0:
            end = min(j + block, columns)
            wanted = math.floor(round(ratio * rows * end, 9)) - done
            cost = {
                (r, c): float(w[r, c] ** 2 / inverses[c][0, 0])
                for r in range(rows)
                for c in range(j, end)
            }
            for place in sorted(cost, key=cost.__getitem__)[:wanted]:
                keep[place] = False
            done += wanted
        if pattern.group and j % pattern.group == 0:
            for r in range(rows):
                group = range(j, j + pattern.group)
                cost = {c: float(w[r, c] ** 2 / inverses[c][0, 0]) for c in group}
                for c in sorted(cost, key=cost.__getitem__)[: pattern.zeros]:
                    keep[r, c] = False
        for r in range(rows):
            if not keep[r, j]:
                w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][0]
                w[r, j] = 0
    return w, keep


def lost(weight: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    """Share of the outputs' energy that pruning changed."""
    outputs = x.double() @ weight.double().t()
    changed = outputs - x.double() @ pruned.double().t()
    return float(changed.square().sum() / outputs.square().sum())


@pytest.mark.parametrize(
    ("pattern", "ratio", "block", "columns"),
    [
        ("unstructured", 0.5, 128, 20),
        ("unstructured", 0.5, 8, 20),
        ("unstructured", 0.35, 7, 20),
        ("unstructured", 0.55, 16, 33),
        ("2:4", 0, 128, 20),
        ("2:4", 0, 8, 20),
        ("4:8", 0, 8, 24),
        ("3:5", 0, 8, 20),
        ("1:2", 0, 6, 20),
        ("5:7", 0, 4, 21),
    ],
)
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern, ratio, block, columns):
    weight, _, hessian = linear(6, columns)
    result = sparsegpt(weight, hessian, ratio, Pattern.parse(pattern), block_size=block)
    expected, keep = surgeon(weight, hessian, ratio, Pattern.parse(pattern), block)
    assert torch.equal(result.mask, keep)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:6"])
@pytest.mark.parametrize("block", [1, 12, 24])
def test_each_kept_weight_is_the_least_squares_answer_to_the_weights_before_it(pattern, block):
    weight, _, hessian = linear(5, 24, seed=1)
    result = sparsegpt(weight, hessian, 0.5, Pattern.parse(pattern), block_size=block)
    full, final = damped(hessian), result.weight.double()
    for j in range(24):
        # Columns before j are fixed: the minimiser of the quadratic over those from j on.
        change = final[:, :j] - weight.double()[:, :j]
        best = (
            weight.double()[:, j:] - torch.linalg.solve(full[j:, j:], full[j:, :j] @ change.t()).t()
        )
        kept = result.mask[:, j]
        torch.testing.assert_close(final[kept, j], best[kept, 0], rtol=1e-4, atol=1e-4)
        assert (final[~kept, j] == 0).all()


def test_sparsegpt_is_near_the_best_of_all_masks():
    excess, above_optimum = [], []
    for seed in range(30):
        weight, _, hessian = linear(1, 8, seed)
        full = damped(hessian)
        change = (weight - sparsegpt(weight, hessian, 0.5, UNSTRUCTURED).weight).double()
        ours = float(change @ full @ change.t())
        # Of a mask, the optimum is tr of the Schur complement at the zeros: w_z inv(inv(H)_zz) w_z.
        inverse = torch.linalg.inv(full)
        optima = []
        for zeros in itertools.combinations(range(8), 4):
            index = torch.tensor(zeros)
            w = weight.double()[0, index]
            optima.append(float(w @ torch.linalg.solve(inverse[index][:, index], w)))
        assert ours >= min(optima) * (1 - 1e-4)
        above_optimum.append(ours / min(optima))
        excess.append(sum(optimum < ours for optimum in optima) / len(optima))
    # Greedy choice in one pass, earlier weights frozen: not the optimum, but among the best.
    assert sum(excess) / len(excess) < 0.1
    assert sorted(above_optimum)[15] < 2


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_block_size_changes_nothing_under_n_of_m(pattern):
    weight, _, hessian = linear(16, 160, seed=2)
    expected = sparsegpt(weight, hessian, 0, Pattern.parse(pattern), block_size=160)
    for block in (1, 8, 24, 100, 128, 500):
        result = sparsegpt(weight, hessian, 0, Pattern.parse(pattern), block_size=block)
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight, expected.weight, rtol=1e-3, atol=1e-4)
        assert result.error == pytest.approx(expected.error, rel=1e-4)


@pytest.mark.parametrize("pattern", GROUPS)
@pytest.mark.parametrize("tied", [False, True])
def test_n_of_m_holds_in_every_group_of_every_row(pattern, tied):
    rule = Pattern.parse(pattern)
    weight, x, hessian = linear(9, 4 * rule.group, seed=3)
    if tied:
        weight, hessian = torch.ones_like(weight), torch.eye(weight.shape[1])
    for mask in (
        magnitude_mask(weight, 0.9, rule),
        wanda_mask(weight, torch.ones(len(hessian)) if tied else x.norm(dim=0), 0.9, rule),
        sparsegpt(weight, hessian, 0.9, rule, block_size=16).mask,
    ):
        assert mask.shape == weight.shape and mask.dtype == torch.bool
        groups = ~mask.view(9, 4, rule.group)
        assert (groups.sum(-1) == rule.zeros).all()
        if tied:
            assert groups[..., : rule.zeros].all()


def naive_lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


@pytest.mark.parametrize("long_row", [1, 2**24])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.55, 0.99])
def test_unstructured_masks_are_the_naive_ones(ratio, coarse, long_row, monkeypatch):
    monkeypatch.setattr(pattern_module, "LONG_ROW", long_row)
    weight, x, _ = linear(7, 20, seed=4)
    norms = x.norm(dim=0)
    if coarse:  # many ties
        weight, norms = weight.mul(2).round(), norms.round() + 1
    rows = weight.abs().tolist()
    count = math.floor(round(ratio * 20, 9))
    mask = wanda_mask(weight, norms, ratio, UNSTRUCTURED)
    for r, row in enumerate(rows):
        scores = (torch.tensor(row) * norms).tolist()
        dropped = naive_lowest(scores, count)
        assert mask[r].tolist() == [i not in dropped for i in range(20)]
    dropped = naive_lowest(sum(rows, []), math.floor(round(ratio * 140, 9)))
    mask = magnitude_mask(weight, ratio, UNSTRUCTURED)
    assert mask.flatten().tolist() == [i not in dropped for i in range(140)]


@pytest.mark.parametrize("chunk", [1, 60, 2**20])
@pytest.mark.parametrize("pattern", GROUPS)
def test_n_of_m_masks_are_the_naive_ones(pattern, chunk, monkeypatch):
    monkeypatch.setattr(pattern_module, "CHUNK", chunk)
    rule = Pattern.parse(pattern)
    weight, x, _ = linear(5, 3 * rule.group, seed=5)
    weight = weight.mul(2).round()
    norms = x.norm(dim=0).round() + 1
    for mask, scores in (
        (magnitude_mask(weight, 0, rule), weight.abs()),
        (wanda_mask(weight, norms, 0, rule), weight.abs() * norms),
    ):
        for r in range(5):
            for start in range(0, weight.shape[1], rule.group):
                group = slice(start, start + rule.group)
                dropped = naive_lowest(scores[r, group].tolist(), rule.zeros)
                assert mask[r, group].tolist() == [i not in dropped for i in range(rule.group)]


def test_the_ratio_is_the_decimal_number_that_was_written():
    weight, x, hessian = linear(3, 100, seed=6)
    assert ((~wanda_mask(weight, x.norm(dim=0), 0.29, UNSTRUCTURED)).sum(1) == 29).all()
    assert (~magnitude_mask(weight, 0.29, UNSTRUCTURED)).sum() == 87
    assert (~sparsegpt(weight, hessian, 0.29, UNSTRUCTURED).mask).sum() == 87


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.55, 0.95])
def test_sparsegpt_zeros_are_the_ratio_in_every_block_and_in_all(ratio):
    weight, _, hessian = linear(7, 90, seed=7)
    result = sparsegpt(weight, hessian, ratio, UNSTRUCTURED, block_size=16)
    for part in (~result.mask).split(16, dim=1):
        assert abs(int(part.sum()) - ratio * part.numel()) <= 1
    assert int((~result.mask).sum()) == math.floor(round(ratio * 630, 9))
    assert torch.equal(result.weight != 0, result.mask)


def test_no_zeros_leave_the_weight_as_it_is():
    weight, _, hessian = linear(4, 24)
    result = sparsegpt(weight, hessian, 0.0, UNSTRUCTURED, block_size=8)
    assert torch.equal(result.weight, weight) and result.mask.all() and result.error == 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_reported_error_is_that_of_the_outputs(pattern):
    for tokens in (20, 400):  # fewer tokens than inputs, and many
        weight, x, hessian = linear(8, 64, seed=8, tokens=tokens)
        result = sparsegpt(weight, hessian, 0.5, Pattern.parse(pattern), block_size=32)
        assert result.error == pytest.approx(lost(weight, result.weight, x), rel=1e-3)
        assert result.damping == 0.01


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_loses_least_and_magnitude_most(pattern, seed):
    weight, x, hessian = linear(32, 64, seed, tokens=512)
    rule = Pattern.parse(pattern)
    best = lost(weight, sparsegpt(weight, hessian, 0.5, rule).weight, x)
    middle = lost(weight, weight * wanda_mask(weight, x.norm(dim=0), 0.5, rule), x)
    worst = lost(weight, weight * magnitude_mask(weight, 0.5, rule), x)
    assert best < middle < worst


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dead_inputs_are_zeroed_and_count_one_in_the_damping(pattern):
    weight, x, _ = linear(6, 20, seed=9)
    x[:, [0, 7, 19]] = 0
    rule = Pattern.parse(pattern)
    result = sparsegpt(weight, hessian_of(x), 0.5, rule, block_size=8)
    expected, keep = surgeon(weight, hessian_of(x), 0.5, rule, 8)
    assert torch.equal(result.mask, keep)
    assert (result.weight[:, [0, 7, 19]] == 0).all()
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-4, atol=1e-4)
    assert result.error == pytest.approx(lost(weight, result.weight, x), rel=1e-3)


def test_the_error_of_a_wide_linear_is_that_of_the_outputs():
    weight, x, hessian = linear(4, 1200, seed=12, tokens=600)
    result = sparsegpt(weight, hessian, 0.5, UNSTRUCTURED)
    assert result.error == pytest.approx(lost(weight, result.weight, x), rel=1e-3)


def test_nothing_but_dead_inputs_gives_zeros():
    result = sparsegpt(torch.randn(4, 8), torch.zeros(8, 8), 0.5, UNSTRUCTURED)
    assert (result.weight == 0).all() and result.error == 0


def test_damping_is_raised_with_a_message_until_the_hessian_factors(capsys):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.05  # least eigenvalue -0.05
    result = sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, name="layers.3.up_proj")
    assert result.damping == pytest.approx(0.1)
    expected = sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, damping=0.1)
    assert torch.equal(result.weight, expected.weight)
    told = capsys.readouterr().err
    assert "layers.3.up_proj" in told and "0.01 -> 0.1" in told and len(told.splitlines()) == 1
    assert sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, damping=0.0).damping == pytest.approx(0.1)
    hessian[0, 1] = hessian[1, 0] = 1.0005
    assert sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, damping=0.0).damping == 0.001
    hessian[0, 1] = hessian[1, 0] = 1.5
    assert sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, damping=0.2).damping == 1.0
    hessian[0, 1] = hessian[1, 0] = 2.5
    with pytest.raises(LoramError, match=r"layers\.3\.up_proj positive definite"):
        sparsegpt(weight, hessian, 0.5, UNSTRUCTURED, name="layers.3.up_proj")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_name_the_linear(bad):
    weight, x, hessian = linear(4, 8)
    broken, broken_hessian, norms = weight.clone(), hessian.clone(), x.norm(dim=0)
    broken[2, 3] = broken_hessian[5, 4] = bad
    for rule in (UNSTRUCTURED, Pattern.parse("2:4")):
        with pytest.raises(LoramError, match=r"weight of layers\.0\.o_proj"):
            sparsegpt(broken, hessian, 0.5, rule, name="layers.0.o_proj")
        with pytest.raises(LoramError, match=r"Hessian .* of layers\.0\.o_proj"):
            sparsegpt(weight, broken_hessian, 0.5, rule, name="layers.0.o_proj")
        with pytest.raises(LoramError, match=r"weight of layers\.0\.o_proj"):
            magnitude_mask(broken, 0.5, rule, name="layers.0.o_proj")
        with pytest.raises(LoramError, match=r"norms of layers\.0\.o_proj"):
            wanda_mask(weight, norms * bad, 0.5, rule, name="layers.0.o_proj")


def test_groups_must_divide_the_inputs():
    weight, x, hessian = linear(4, 10)
    rule = Pattern.parse("2:4")
    for call in (
        lambda: sparsegpt(weight, hessian, 0.5, rule, name="layers.0.q_proj"),
        lambda: wanda_mask(weight, x.norm(dim=0), 0.5, rule, name="layers.0.q_proj"),
        lambda: magnitude_mask(weight, 0.5, rule, name="layers.0.q_proj"),
    ):
        with pytest.raises(LoramError, match=r"prune\.pattern .* 2:4 with 10 .*layers\.0\.q_proj"):
            call()
    UNSTRUCTURED.require(10, "layers.0.q_proj")
    Pattern.parse("3:5").require(10, "layers.0.q_proj")


def test_patterns_are_read_and_written():
    assert Pattern.parse("4:8") == Pattern(zeros=4, group=8)
    assert Pattern.parse("unstructured") == UNSTRUCTURED
    assert [str(Pattern.parse(text)) for text in ("unstructured", "1:4")] == ["unstructured", "1:4"]
    assert Pattern.parse("1:4").ratio(0.5) == 0.25
    assert UNSTRUCTURED.ratio(0.55) == 0.55


@pytest.mark.parametrize("text", ["", "0:4", "4:4", "5:4", "2:4:8", "-1:4", "2 of 4", "2:x", "½:4"])
def test_other_patterns_are_refused(text):
    with pytest.raises(LoramError, match=r"prune\.pattern must be .* 0 < n < m"):
        Pattern.parse(text)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan])
def test_ratios_outside_their_range_are_refused(ratio):
    weight, x, hessian = linear(4, 8)
    for call in (
        lambda: sparsegpt(weight, hessian, ratio, UNSTRUCTURED),
        lambda: wanda_mask(weight, x.norm(dim=0), ratio, UNSTRUCTURED),
        lambda: magnitude_mask(weight, ratio, UNSTRUCTURED),
    ):
        with pytest.raises(LoramError, match=r"prune\.ratio"):
            call()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_arguments_stay_as_they_are_whatever_their_dtype_and_strides(pattern):
    rule = Pattern.parse(pattern)
    weight, x, hessian = linear(16, 24, seed=10)
    weight = weight.bfloat16()
    turned = weight.t().contiguous().t()
    before = turned.clone(), hessian.clone()
    result = sparsegpt(turned, hessian, 0.5, rule)
    assert result.weight.dtype == torch.float32 and result.weight.is_contiguous()
    assert torch.equal(result.weight, sparsegpt(weight.float(), hessian, 0.5, rule).weight)
    norms = x.norm(dim=0)
    for mask in (
        lambda w: magnitude_mask(w, 0.5, rule),
        lambda w: wanda_mask(w, norms, 0.5, rule),
    ):
        assert torch.equal(mask(turned), mask(weight.float()))
    assert torch.equal(turned, before[0]) and torch.equal(hessian, before[1])


def test_the_scale_of_the_weight_does_not_matter():
    weight, x, hessian = linear(8, 32, seed=11)
    for rule in (UNSTRUCTURED, Pattern.parse("2:4")):
        expected = sparsegpt(weight, hessian, 0.5, rule)
        for scale in (2.0**-80, 2.0**60):
            result = sparsegpt(weight * scale, hessian, 0.5, rule)
            assert torch.equal(result.mask, expected.mask)
            torch.testing.assert_close(result.weight / scale, expected.weight)
