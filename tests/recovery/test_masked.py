"""Non-structured pruning, carried to the base: masks, delta, truncated SVD, merge."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loram_ray as lr
from helpers import families, tiny
from helpers.adapters import LINEARS, logits_of, token_ids, write_trained
from helpers.masked import PREFIX, SETTINGS, Case, make_case, prune, weights
from loram_ray.masks import MASKS_FILE, pack, unpack
from loram_ray.models.loading import load_model
from loram_ray.plan import PLAN_FILE, PruningPlan
from loram_ray.recovery.scatter import truncated
from loram_ray.stages.run import plan_steps
from loram_ray.studies.systems import comparison_of

IDS = token_ids(tiny.VOCABULARY)


@pytest.fixture(params=list(SETTINGS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make_case(tmp_path, request.param)


def details(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())["details"]


def with_changes(base: Path, changes: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The base with something added to its weights."""
    model = load_model(base, "fp32")
    with torch.no_grad():
        for module, change in changes.items():
            model.get_submodule(module).weight += change
    return model


def stored_products(adapter: Path) -> dict[str, torch.Tensor]:
    """``B A`` of each module of a PEFT directory, float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (
            tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        )
        for name in tensors
        if "lora_A" in name
    }


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_packing_is_numpy_s_lowest_bit_first(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, columns), mask)


def test_a_plan_keeps_its_masks_and_refuses_others(case: Case, tmp_path: Path) -> None:
    plan, kept, original = case.plan, weights(case.pruned), weights(case.base)
    assert len(plan.masks.shapes) == 14
    for module in plan.masks.shapes:
        name = f"{module}.weight"
        assert torch.equal(kept[name], torch.where(plan.mask(module), original[name], 0.0))
    copy = tmp_path / "copy"
    copy.mkdir()
    plan.save(copy)
    again = PruningPlan.load(copy)
    assert again.digest == plan.digest
    assert all(torch.equal(again.mask(m), plan.mask(m)) for m in plan.masks.shapes)
    assert again.mask("lm_head") is None
    assert replace(plan, masks=replace(plan.masks, sha256="0")).digest != plan.digest
    (copy / MASKS_FILE).unlink()
    with pytest.raises(lr.LoramError, match="is missing, but the plan next to it requires it"):
        PruningPlan.load(copy)
    save_file({"x": torch.zeros(1)}, copy / MASKS_FILE)
    with pytest.raises(lr.LoramError, match="does not match its pruning plan"):
        PruningPlan.load(copy).mask(next(iter(plan.masks.shapes)))


def test_an_adapter_whose_masks_were_changed_is_refused(case: Case, tmp_path: Path) -> None:
    content = bytearray((case.trained / MASKS_FILE).read_bytes())
    content[-1] ^= 1
    (case.trained / MASKS_FILE).write_bytes(content)
    with pytest.raises(
        lr.LoramError, match="pruning_masks.safetensors does not match the SHA-256 in its manifest"
    ):
        case.recover(tmp_path / "delta", form="delta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_is_exact_and_zero_where_nothing_was_kept(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = case.retrained(tmp_path / "retrained", dtype)
    recovered = case.recover(tmp_path / "delta", form="delta")
    found, expected = load_file(recovered / "delta.safetensors"), case.products()
    assert found.keys() == {f"{module}.weight" for module in expected}
    for module, product in expected.items():
        delta, mask = found[f"{module}.weight"], case.plan.mask(module)
        assert delta.dtype == torch.float32
        assert torch.equal(delta, product)
        if mask is not None:
            assert not delta[~mask].any()
            assert delta[mask].count_nonzero() > 0.99 * mask.sum()


def test_recovery_is_exact_on_the_base_with_masked_weights_zeroed(
    case: Case, tmp_path: Path
) -> None:
    """Invariant 1 for masks."""
    delta = load_file(case.recover(tmp_path / "delta", form="delta") / "delta.safetensors")
    model = with_changes(case.base, {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mask = case.plan.mask(name.removesuffix(".weight"))
            if mask is not None:
                parameter.mul_(mask)
            if name in delta:
                parameter.add_(delta[name])
    expected = logits_of(case.adapted, IDS)
    assert (expected - logits_of(load_model(case.pruned, "fp32"), IDS)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_merging_a_delta_is_the_sum_bit_for_bit(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", seed=4, dtype=dtype, tied=tied)
    case = make_case(tmp_path, "unstructured", base)
    recovered = case.recover(tmp_path / "delta", form="delta")
    merging = lr.MergeConfig(
        base=str(base), adapter=recovered, output=tmp_path / "merged", max_shard_bytes=60_000
    )
    result = lr.merge(merging)
    exact = 1e-4 if dtype == torch.float32 else 0.05
    assert result.manifest.details["parity_relative_error"] < exact
    merged, before = weights(result.output), weights(base)
    if tied:
        before["lm_head.weight"] = before["model.embed_tokens.weight"]
    changes = {f"{module}.weight": product for module, product in case.products().items()}
    assert merged.keys() == before.keys() > changes.keys()
    for name, tensor in before.items():
        expected = (tensor.float() + changes[name]).to(dtype) if name in changes else tensor
        assert torch.equal(merged[name], expected), name
    other = tiny.write_base(tmp_path / "other", seed=5, dtype=dtype, tied=tied)
    with pytest.raises(lr.LoramError, match=r"merge.base must be the base that was pruned"):
        lr.merge(merging.model_copy(update={"base": str(other), "output": tmp_path / "no"}))


def test_a_full_rank_svd_is_the_delta(case: Case, tmp_path: Path) -> None:
    recovered = case.recover(tmp_path / "svd", svd_rank=10_000)
    assert details(recovered)["svd_error"] < 1e-5
    on_base = peft.PeftModel.from_pretrained(load_model(case.base, "fp32"), recovered)
    expected = logits_of(with_changes(case.base, case.products()), IDS)
    torch.testing.assert_close(logits_of(on_base, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 6])
def test_the_truncated_svd_is_near_the_best_and_its_error_is_told(
    case: Case,
    rank: int | None,
    dtype: torch.dtype,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = case.retrained(tmp_path / "retrained", dtype)
    recovered = case.recover(tmp_path / "svd", svd_rank=rank)
    said, told = capsys.readouterr().err, details(recovered)
    assert "recovered adapter has a relative error" in said and "recover.form to delta" in said
    stored = stored_products(recovered)
    squares = missed = 0.0
    for module, product in case.products().items():
        error = float((product - stored[module]).square().sum())
        size = float(product.double().square().sum())
        if case.plan.mask(module) is None:
            assert error <= (1e-12 if dtype == torch.float32 else 1e-5) * size
            assert module not in told["svd_errors"]
            continue
        own = 2 if rank is None and "q_proj" in module and "lm_head" in stored else rank or 4
        best = float(torch.linalg.svdvals(product.double())[own:].square().sum())
        assert best <= error * (1 + 1e-6) and error <= 1.02 * best
        assert told["svd_errors"][module] == pytest.approx(math.sqrt(error / size), rel=1e-4)
        squares, missed = squares + size, missed + error
    assert told["svd_error"] == pytest.approx(math.sqrt(missed / squares), rel=1e-4)
    quiet = case.recover(tmp_path / "quiet", svd_rank=rank, max_svd_error=1.0)
    assert "relative error" not in capsys.readouterr().err
    name = "adapter_model.safetensors"
    assert (quiet / name).read_bytes() == (recovered / name).read_bytes()


@pytest.mark.parametrize("rank", [None, 6])
def test_plain_peft_loads_the_truncated_svd(case: Case, rank: int | None, tmp_path: Path) -> None:
    recovered = case.recover(tmp_path / "svd", svd_rank=rank)
    assert sorted(path.name for path in recovered.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    on_base = peft.PeftModel.from_pretrained(load_model(case.base, "fp32"), recovered)
    changes = {module: product.float() for module, product in stored_products(recovered).items()}
    expected = logits_of(with_changes(case.base, changes), IDS)
    torch.testing.assert_close(logits_of(on_base, IDS), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits_of(load_model(case.base, "fp32"), IDS)).abs().max() > 1e-2


def test_experts_are_recovered_to_what_peft_puts_on_fused_ones(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "mixtral", intermediate_size=32)
    targets = ["q_proj", "o_proj", "w1", "w2", "w3"]
    case = make_case(tmp_path, "2:4", base, target_modules=targets, lora_dropout=0.1)
    recovered = case.recover(tmp_path / "svd")
    on_base = peft.PeftModel.from_pretrained(load_model(base, "fp32"), recovered)
    # The same products on a base whose experts are apart: ratio 0 leaves each weight.
    apart = prune(base, tmp_path / "apart", "structured", method="random", ratio=0.0)
    changes = {module: product.float() for module, product in stored_products(recovered).items()}
    expected = logits_of(with_changes(apart, changes), IDS)
    torch.testing.assert_close(logits_of(on_base, IDS), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        lr.LoramError, match=r"recover.svd_rank must give all experts the same rank"
    ):
        case.recover(tmp_path / "no", svd_rank=6)  # experts of unpruned layers have rank 4
    assert not (tmp_path / "no").exists()


def test_truncation_is_deterministic_and_leaves_the_generator_alone() -> None:
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    first, again = truncated(delta, 5), truncated(delta, 5)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_truncating_nothing_gives_nothing() -> None:
    a, b, missed = truncated(torch.zeros(12, 10), 3)
    assert not (b @ a).any() and missed == 0


def test_a_structured_pruning_has_no_delta_and_a_delta_is_no_adapter(
    case: Case, tmp_path: Path
) -> None:
    structured = prune(case.base, tmp_path / "s", "structured", method="random", ratio=0.5)
    plain = peft.get_peft_model(
        load_model(structured, "fp32"), peft.LoraConfig(target_modules=LINEARS)
    )
    trained = write_trained(structured, plain, tmp_path / "st").output
    for settings, message in [
        ({"form": "delta"}, "recover.form must be adapter"),
        ({"svd_rank": 4}, "recover.svd_rank must be left out"),
    ]:
        with pytest.raises(lr.LoramError, match=message):
            replace(case, trained=trained).recover(tmp_path / "no", **settings)
    with pytest.raises(ValueError, match="svd_rank must not be given with form delta"):
        case.recover(tmp_path / "no", form="delta", svd_rank=4)
    delta = case.recover(tmp_path / "delta", form="delta")
    data = str(tiny.write_jsonl(tmp_path / "d.jsonl", tiny.questions(4)))
    evaluation = lr.EvaluateConfig(
        model=str(case.base), adapter=delta, output=tmp_path / "e", data=data
    )
    for adapter, message in [
        (delta, "contains a dense delta; run loram merge"),
        (case.trained, "is not for .*; run loram recover first"),
    ]:
        with pytest.raises(lr.LoramError, match=message):
            lr.evaluate(evaluation.model_copy(update={"adapter": adapter}))
    merging = lr.MergeConfig(base=str(case.base), adapter=case.trained, output=tmp_path / "m")
    with pytest.raises(lr.LoramError, match="is for a pruned model; run loram recover first"):
        lr.merge(merging)
    assert (case.trained / PLAN_FILE).exists() and not (delta / PLAN_FILE).exists()


def test_a_run_that_recovers_a_delta_evaluates_what_it_merged(tmp_path: Path) -> None:
    data = "d.jsonl"
    raw = {
        "base": "models/base",
        "output": str(tmp_path),
        "prune": {"method": "magnitude", "pattern": "2:4"},
        "align": {"corpus": {"sources": [{"path": "t.jsonl"}]}},
        "train": {"data": data},
        "recover": {"form": "delta"},
        "merge": {},
        "evaluate": {"data": data},
        "compare": {"systems": ["loram"], "tasks": {"t": {"data": data, "held_out": data}}},
    }
    config = lr.RunConfig.model_validate(raw)
    steps = plan_steps(config)
    loram = {step.name: step.config for step in steps}["evaluate"]
    assert (loram.model, loram.adapter) == (str(tmp_path / "merged"), None)
    compared = comparison_of(config.compare).steps.values()
    assert {step.config.output for step in compared} == {step.config.output for step in steps}
    for section in ({"merge": None}, {"evaluate": {"data": data, "model": "models/base"}}):
        refused = lr.RunConfig.model_validate({**raw, **section})
        with pytest.raises(lr.LoramError, match="evaluate must score the merged model"):
            plan_steps(refused)
