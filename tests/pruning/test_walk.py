"""The stream of layers against whole stock models: autograd, hooks, ablation, brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from helpers.calibrations import (
    COLUMNS,
    TOKENS,
    assert_scores,
    by_linear,
    coupled,
    flat,
    naive_scores,
    stock_inputs,
    walking,
)
from loram_ray.architectures import ARCHITECTURES
from loram_ray.masks import unpack
from loram_ray.models.loading import load_model
from loram_ray.pruning.calibration import sparsified_file
from loram_ray.pruning.criteria import TaylorForm
from loram_ray.pruning.sparse import Pattern, sparsegpt, wanda_mask
from loram_ray.pruning.statistics import Hessian, SquaredNorms

# Inputs


ALL = [architecture.model_type for architecture in ARCHITECTURES]


@pytest.mark.parametrize("family", ALL)
def test_hessians_and_norms_are_those_of_hooks_on_the_stock_model(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is pruned, so every layer sees what the stock model's sees."""
    base = bases(family)
    inputs = stock_inputs(load_model(base, "fp32"), TOKENS)
    wanted = coupled(base, (0, 4))
    ratios = dict.fromkeys(range(4), 0.0)
    for method in ("sparsegpt", "wanda"):
        with walking(base, tmp_path / method, layers=(0, 4)) as (walk, pool):
            walk.sparsify(method, ratios, Pattern(), 0.01)
            norms = walk.input_norms()
        found = {arguments[0]: arguments[2] for arguments, _ in pool.of("sparsify")}
        assert list(found) == wanted
        for module in wanted:
            tokens = flat(inputs[module])
            statistic = found[module]
            if method == "sparsegpt":
                assert isinstance(statistic, Hessian) and statistic.count == len(tokens)
                expected = 2 / len(tokens) * tokens.t() @ tokens
                value = statistic.matrix.double()
            else:
                assert isinstance(statistic, SquaredNorms)
                expected, value = tokens.square().sum(0), statistic.total.double()
                assert torch.equal(norms[module], statistic.total)
            torch.testing.assert_close(
                value, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
            )


@pytest.mark.parametrize("family", ALL)
def test_flap_and_activation_are_those_of_hooks_on_the_stock_model(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(family)
    model = load_model(base, "fp32")
    inputs, weights = stock_inputs(model, TOKENS), by_linear(model, torch.Tensor.detach)
    outgoing = [m for m in coupled(base) if m.rpartition(".")[2] in COLUMNS]
    variance = {m: flat(inputs[m]).var(0, correction=0) for m in outgoing}
    expected = naive_scores(base, {m: variance[m] * weights[m].square() for m in outgoing})
    with walking(base, tmp_path / "flap") as (walk, _):
        assert_scores(walk.score_forward("flap"), expected)
    # All sequences at once: the tokens that come to an expert in one batch count as one sequence.
    means = {
        m: inputs[m].double().abs().mean(-2).reshape(-1, inputs[m].shape[-1]) for m in outgoing
    }
    expected = naive_scores(base, {m: x.square().sum(0).sqrt()[None] for m, x in means.items()})
    with walking(base, tmp_path / "activation", batch_size=6, shares=1) as (walk, _):
        assert_scores(walk.score_forward("activation"), expected)


@pytest.mark.parametrize("method", ["flap", "activation"])
def test_forward_scores_do_not_depend_on_batches_and_shares(
    method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    scores = []
    for number, (batch_size, shares) in enumerate([(1, 1), (6, 1), (2, 4), (4, 6)]):
        work = tmp_path / str(number)
        with walking(bases("gemma3_text"), work, batch_size=batch_size, shares=shares) as (walk, _):
            scores.append(walk.score_forward(method))
    for other in scores[1:]:
        assert_scores(other, scores[0])


@pytest.mark.parametrize("method", ["flap", "taylor"])
def test_scores_in_bf16_are_near_those_in_fp32(
    method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    scores = {}
    for precision in ("fp32", "bf16"):
        work = tmp_path / precision
        with walking(bases("qwen2"), work, precision=precision) as (walk, _):
            if method == "flap":
                scores[precision] = walk.score_forward("flap")
            else:
                scores[precision] = walk.score_taylor(TaylorForm.FIRST)
    for layer, exact in scores["fp32"].items():
        rounded = scores["bf16"][layer]
        assert not torch.equal(rounded.neurons, exact.neurons)
        assert (rounded.neurons / exact.neurons - 1).abs().median() < 0.05
        assert (rounded.kv_heads / exact.kv_heads - 1).abs().median() < 0.05


# Non-structured pruning


def set_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Replace weights of linears of the stock model, by their names on disk."""
    views = by_linear(model, torch.Tensor.detach)
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            views[name.removesuffix(".weight")].copy_(tensor)


SPARSE = {
    "sparsegpt": ["llama", "phi3", "gemma2", "mixtral"],
    "wanda": ["llama", "phi3", "olmo2", "qwen3_moe"],
}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(("method", "family"), [(m, f) for m, fs in SPARSE.items() for f in fs])
def test_a_layer_is_solved_for_the_outputs_of_the_pruned_layers_before_it(
    method: str, family: str, pattern: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, kind = bases(family), Pattern.parse(pattern)
    ratios = {1: 0.5, 2: 0.35, 3: 0.6}
    with walking(base, tmp_path / "work", layers=(1, 4)) as (walk, _):
        errors = walk.sparsify(method, ratios, kind, 0.02)
    model, dense = load_model(base, "fp32"), load_model(base, "fp32")
    whole = by_linear(dense, torch.Tensor.detach)
    untouched = stock_inputs(dense, TOKENS)
    differs = 0
    for layer, ratio in ratios.items():
        inputs = stock_inputs(model, TOKENS)  # earlier layers pruned, this one dense
        solved = load_file(sparsified_file(tmp_path / "work", layer))
        modules = coupled(base, (layer, layer + 1))
        assert set(solved) == {f"{m}.{part}" for m in modules for part in ("weight", "mask")}
        for module in modules:
            tokens, weight = flat(inputs[module]), whole[module]
            expected, mask = reference_solution(method, weight, tokens, ratio, kind)
            found = solved[f"{module}.weight"]
            kept = unpack(solved[f"{module}.mask"], found.shape[1])
            # Scores that are equal but for rounding may change places.
            assert (kept != mask).float().mean() < 0.005, module
            same = (kept == mask).all(1)
            if method == "wanda":
                assert torch.equal(found, weight * kept)
            torch.testing.assert_close(found[same], expected[same], rtol=5e-3, atol=5e-4)
            assert torch.equal(found != 0, kept)
            if kind.group:
                assert (kept.reshape(-1, kind.group).sum(1) == kind.group - kind.zeros).all()
            earlier = reference_solution(method, weight, flat(untouched[module]), ratio, kind)[0]
            differs += bool(layer > 1 and not torch.allclose(earlier, expected, rtol=5e-2))
            if method == "sparsegpt":
                assert errors[module] == pytest.approx(
                    relative_error(weight, found, tokens), rel=0.05
                )
        set_weights(model, solved)
    assert differs >= len(ratios)  # it does matter what the earlier layers became
    assert bool(errors) == (method == "sparsegpt")


def reference_solution(
    method: str, weight: torch.Tensor, tokens: torch.Tensor, ratio: float, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    if method == "wanda":
        mask = wanda_mask(weight, tokens.square().sum(0).sqrt().float(), ratio, pattern)
        return weight * mask, mask
    hessian = (2 / len(tokens) * tokens.t() @ tokens).float()
    result = sparsegpt(weight, hessian, ratio, pattern, damping=0.02)
    return result.weight, result.mask


def relative_error(weight: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor) -> float:
    outputs = tokens @ weight.double().t()
    return ((tokens @ found.double().t() - outputs).square().sum() / outputs.square().sum()).item()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said(
    method: str, bases: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = bases("mixtral")
    with walking(base, tmp_path / "work", layers=(1, 2), tokens=torch.full((2, 8), 7)) as (
        walk,
        pool,
    ):
        walk.sparsify(method, {1: 0.5}, Pattern(), 0.01)
    unused = [a[0] for a, _ in pool.of("sparsify") if a[2] is None]
    assert len(unused) == 6 and all("experts" in module for module in unused)
    solved, said = load_file(sparsified_file(tmp_path / "work", 1)), capfd.readouterr().err
    whole = load_file(base / "model.safetensors")
    for module in unused:
        assert f"{module} received no calibration token" in said
        weight = whole[f"{module}.weight"]
        threshold = weight.abs().flatten().sort().values[weight.numel() // 2]
        assert torch.equal(solved[f"{module}.weight"], weight * (weight.abs() >= threshold))


# Disk


def test_forward_walks_have_two_layers_of_hidden_states_on_disk(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    for method in ("flap", "wanda"):
        with walking(bases("llama"), tmp_path / method) as (walk, pool):
            if method == "flap":
                walk.score_forward(method)
            else:
                walk.sparsify(method, {1: 0.5, 2: 0.5}, Pattern(), 0.01)
        for (name, arguments), folders in pool.on_disk:
            if name == "forward":
                layer = arguments[0]
                assert folders <= {f"input-{n:05d}" for n in (layer, layer + 1)}, (name, layer)
        assert not [p for p in (tmp_path / method).glob("input-*") if p.name != "input-00003"]


def test_taylor_keeps_the_inputs_it_goes_back_through_and_drops_them_on_the_way(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    with walking(bases("llama"), tmp_path / "work", layers=(2, 3)) as (walk, pool):
        walk.score_taylor(TaylorForm.FIRST)
    for (name, arguments), folders in pool.on_disk:
        layer = arguments[0]
        if name == "forward":
            allowed = {f"input-{n:05d}" for n in (layer, *range(2, layer + 2))}
            allowed |= {f"input-{layer + 1:05d}"}
        elif name == "backward":
            allowed = {f"gradient-{n:05d}" for n in (layer, layer + 1)}
            allowed |= {f"input-{n:05d}" for n in range(2, layer + 2)}
        else:
            continue
        assert folders <= allowed, (name, layer)
    left = {p.name for p in (tmp_path / "work").glob("*-*")}
    assert left <= {"input-00002", "gradient-00002"}
