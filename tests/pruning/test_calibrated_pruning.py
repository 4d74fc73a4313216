"""The prune stage with a calibration: what it writes, continued, or from saved scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loram_ray as lr
from helpers import tiny
from helpers.calibrations import Calls, Lost, coupled, files, layer_of, prune, weights
from loram_ray.artifacts.manifest import read_manifest
from loram_ray.masks import MASKS_FILE, pack, unpack
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan
from loram_ray.pruning.pool import Job
from loram_ray.pruning.scores import SCORES_FILE

METHODS = {
    "random": "structured",
    "magnitude": "structured",
    "taylor": "structured",
    "flap": "structured",
    "activation": "structured",
    "wanda": "unstructured",
    "sparsegpt": "unstructured",
    "magnitude, single weights": "unstructured",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_of_zero_is_the_base_bit_for_bit(
    method: str, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.bfloat16)
    spoilt = weights(base)
    for layer in range(4):  # inputs that are always zero, whose columns SparseGPT would zero
        spoilt[f"model.layers.{layer}.mlp.up_proj.weight"][3] = 0
    save_file(spoilt, base / "model.safetensors", {"format": "pt"})
    name = method.partition(",")[0]
    source = None if name in ("random", "magnitude") else text
    output = prune(base, tmp_path / "out", name, source, ratio=0.0, pattern=METHODS[method])
    before, after = weights(base), weights(output)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    plan = PruningPlan.load(output)
    for module in coupled(base):
        if METHODS[method] == "structured":
            assert plan.kept(module).index.tolist() == list(range(plan.kept(module).full_size))
        else:
            assert plan.mask(module).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_masks_on_disk_are_the_weights_that_are_not_zero(
    method: str,
    pattern: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
) -> None:
    output = prune(base, tmp_path / "out", method, text, pattern=pattern)
    plan, before, after = PruningPlan.load(output), weights(base), weights(output)
    masks, modules = load_file(output / MASKS_FILE), coupled(base)
    assert set(masks) == set(modules)
    zeros = 0
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        assert tensor.shape == before[name].shape and tensor.dtype == before[name].dtype
        if module not in modules:
            assert torch.equal(tensor, before[name]), name
            assert plan.mask(module) is None
            continue
        mask = unpack(masks[module], tensor.shape[1])
        assert torch.equal(masks[module], pack(tensor != 0)) and torch.equal(mask, tensor != 0)
        assert torch.equal(plan.mask(module), mask)
        zeros += int((tensor == 0).sum())
        if pattern == "unstructured":
            rows = (tensor == 0).sum(1)
            assert rows.sum() == tensor.numel() // 2
            assert method != "wanda" or (rows == tensor.shape[1] // 2).all()
        else:
            n, m = map(int, pattern.split(":"))
            assert ((tensor == 0).reshape(len(tensor), -1, m).sum(-1) == n).all()
        moved = not torch.equal(tensor, before[name] * mask)
        assert moved == (method == "sparsegpt")
    total = sum(tensor.numel() for tensor in before.values())
    details = read_manifest(output).details
    assert details["nonzero_parameters"] == total - zeros
    assert details["parameters"] == details["base_parameters"] == total
    assert ("relative_errors" in details) == (method == "sparsegpt")
    loaded = load_model(output, "fp32")
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, after[f"{modules[5]}.weight"])


def test_each_layer_has_its_listed_share_of_zeros(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    output = prune(base, tmp_path / "out", "sparsegpt", text, ratios=[0.0, 0.25])
    before, after = weights(base), weights(output)
    for name in before:
        if name.removesuffix(".weight") in coupled(base, (2, 3)):
            assert (after[name] == 0).sum() == after[name].numel() // 4
        else:
            assert torch.equal(after[name], before[name])


CUTS: dict[str, tuple[str, dict[str, Any], Callable[[Job], bool], set[tuple[str, int]]]] = {
    "forward of scores": (
        "flap",
        {},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 1),
        {("embed", 0), ("forward", 0), ("forward", 1)},
    ),
    "forward before the loss": (
        "taylor",
        {},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 1),
        {("embed", 0), ("forward", 0), ("forward", 1)},
    ),
    "loss": (
        "taylor",
        {"taylor": "mixed"},
        lambda job: job[0] == "loss" and job[1][1] == 1,
        {("embed", 0), *(("forward", layer) for layer in range(4))},
    ),
    "first layer of the way back": (
        "taylor",
        {},
        lambda job: job[0] == "backward" and job[1][:2] == (3, 1),
        {("embed", 0), ("loss", 4), *(("forward", layer) for layer in range(4))},
    ),
    "a scored layer of the way back": (
        "taylor",
        {"taylor": "second"},
        lambda job: job[0] == "backward" and job[1][:2] == (1, 2),
        {("embed", 0), ("loss", 4), ("backward", 3), ("backward", 2)}
        | {("forward", layer) for layer in range(4)},
    ),
    "statistics": (
        "wanda",
        {"pattern": "2:4"},
        lambda job: job[0] == "forward" and job[1][:2] == (2, 2),
        {("embed", 0), ("forward", 0), ("forward", 1), ("sparsify", 1)},
    ),
    "solve": (
        "sparsegpt",
        {},
        lambda job: job[0] == "sparsify" and "2.mlp.down_proj" in job[1][0],
        {("embed", 0), ("forward", 0), ("forward", 1), ("sparsify", 1)},
    ),
    "outputs of a pruned layer": (
        "sparsegpt",
        {"pattern": "4:8"},
        lambda job: job[0] == "forward" and job[1][:2] == (1, 1) and job[1][3] is not None,
        {("embed", 0), ("forward", 0), ("sparsify", 1)},
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_calibration_that_was_cut_goes_on_at_its_layer(
    cut: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    method, settings, fails, done = CUTS[cut]
    whole = in_process()
    expected = files(prune(base, tmp_path / "whole", method, text, **settings))
    output = tmp_path / "out"
    first = in_process(fails)
    with pytest.raises(Lost):
        prune(base, output, method, text, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.work"}
    assert {(job[0], layer_of(job)) for job in first} >= done
    again = in_process()
    assert files(prune(base, output, method, text, **settings)) == expected
    repeated = Counter((job[0], layer_of(job)) for job in again)
    assert not set(repeated) & done
    assert set(repeated) == {(job[0], layer_of(job)) for job in whole} - done
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_other_settings_do_not_go_on_from_the_work_of_a_cut_calibration(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    in_process(lambda job: job[0] == "backward")
    with pytest.raises(Lost):
        prune(base, tmp_path / "out", "taylor", text)
    calls = in_process()
    prune(base, tmp_path / "out", "taylor", text, calibration={"samples": 5})
    assert calls.layers_of("forward") == [layer for layer in range(4) for _ in range(3)]
    again = in_process()
    prune(base, tmp_path / "fresh", "taylor", text, calibration={"samples": 5})
    assert calls == again and files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("taylor", {"taylor": "second"}),
        ("flap", {"allocation": "global"}),
        ("activation", {"round_neurons_to": 8}),
        ("magnitude", {}),
    ],
)
def test_saved_scores_give_another_ratio_what_a_new_calibration_gives(
    method: str,
    settings: dict[str, Any],
    base: Path,
    text: Path,
    tmp_path: Path,
    in_process: Callable[..., Calls],
) -> None:
    source = None if method == "magnitude" else text
    first = prune(base, tmp_path / "first", method, source, **settings)
    fresh = prune(base, tmp_path / "fresh", method, source, ratio=0.25, **settings)
    calls = in_process()
    again = prune(base, tmp_path / "again", method, ratio=0.25, scores=first, **settings)
    assert not calls
    assert files(again) == files(fresh) != files(first)
    narrower = prune(base, tmp_path / "narrower", method, scores=first, layers=(2, 3), **settings)
    assert PruningPlan.load(narrower).layers.keys() == {2}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_saved_norms_give_wanda_what_a_new_calibration_gives(
    pattern: str, base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    fresh = prune(base, tmp_path / "fresh", "wanda", text, pattern=pattern)
    calls = in_process()
    again = prune(base, tmp_path / "again", "wanda", scores=fresh, pattern=pattern)
    assert not calls and files(again) == files(fresh)


def test_scores_that_do_not_fit_are_refused(
    base: Path, text: Path, tmp_path: Path, in_process: Callable[..., Calls]
) -> None:
    taylor = prune(base, tmp_path / "taylor", "taylor", text)
    wanda = prune(base, tmp_path / "wanda", "wanda", text)
    sparsegpt = prune(base, tmp_path / "sparsegpt", "sparsegpt", text)
    random = prune(base, tmp_path / "random", "random")
    assert not (random / SCORES_FILE).exists() and not (sparsegpt / SCORES_FILE).exists()
    other = tiny.write_base(tmp_path / "other", seed=9)
    before = tiny.tree(tmp_path)
    calls = in_process()
    cases: list[tuple[Path, str, Path, dict[str, Any], str]] = [
        (base, "taylor", taylor, {"taylor": "second"}, "scores of taylor second, .* taylor first"),
        (base, "flap", taylor, {}, "prune.scores must contain scores of flap, .* taylor first"),
        (base, "wanda", taylor, {}, "prune.scores must contain scores of wanda"),
        (
            base,
            "taylor",
            wanda,
            {},
            "prune.scores must contain scores of taylor first, .* of wanda",
        ),
        (base, "random", taylor, {}, "prune.scores must contain scores of random"),
        (base, "sparsegpt", wanda, {}, "prune.scores must contain scores of sparsegpt"),
        (base, "taylor", random, {}, "random and sparsegpt store no scores"),
        (base, "sparsegpt", sparsegpt, {}, "random and sparsegpt store no scores"),
        (base, "taylor", taylor, {"layers": (0, 3)}, "prune.scores must contain .* lacks layer 0"),
        (base, "wanda", wanda, {"layers": (1, 4)}, "prune.scores must contain .* lacks layer 3"),
        (
            other,
            "taylor",
            taylor,
            {},
            "prune.scores must be for prune.base, .*; use scores of this",
        ),
        (base, "taylor", base, {}, "prune.scores must be a directory written by prune"),
    ]
    for of_base, method, scores, settings, message in cases:
        with pytest.raises(lr.LoramError, match=message):
            prune(of_base, tmp_path / "out", method, scores=scores, **settings)
        assert tiny.tree(tmp_path) == before, message
    assert not calls
