"""Non-structured pruning after the prune stage: masks, masked LoRA, delta, truncated SVD, merge."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from adapters import LINEARS, logits_of, token_ids, write_trained
from safetensors.torch import load_file, save_file

import loram_ray as lr
from loram_ray.finetuning.masked import MaskedProduct, put_adapter_on
from loram_ray.losses import summed_loss
from loram_ray.masks import MASKS_FILE, pack, unpack
from loram_ray.modeling import load_model
from loram_ray.modeling_pruned import SparseLinear
from loram_ray.plan import PruningPlan
from loram_ray.recovery import truncated

IDS = token_ids(tiny.VOCABULARY)
PREFIX = "base_model.model."


def prune(base: Path, output: Path, pattern: str = "2:4", **settings: object) -> Path:
    config = lr.PruneConfig(
        base=str(base),
        output=output,
        method="magnitude",
        pattern=pattern,
        layers=(1, 3),
        **settings,
    )
    return lr.prune(config).output


def adapt(pruned: Path, **settings: object) -> peft.PeftModel:
    """The pruned model with a random masked LoRA, as the train stage puts it on."""
    model = load_model(pruned, "fp32")
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **settings}
    )
    adapted = put_adapter_on(model, pruned, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def products(adapter: Path, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """``s (B A) * M`` of each adapted module, from the files, entry by entry under the mask."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for name in [n for n in tensors if "lora_A" in n]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        rank = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
        product = (b @ a) * scale
        mask = plan.mask(module)
        found[module] = product if mask is None else torch.where(mask, product, 0.0)
    return found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def make_case(folder: Path, pattern: str) -> dict:
    base = tiny.write_base(folder / "base", seed=4)
    pruned = prune(base, folder / "pruned", pattern)
    adapted = adapt(pruned, **({"use_rslora": True} if pattern == "2:4" else {}))
    trained = write_trained(pruned, adapted, folder / "trained").output
    plan = PruningPlan.load(pruned)
    return {"base": base, "pruned": pruned, "adapted": adapted, "trained": trained, "plan": plan}


@pytest.fixture(params=["2:4", "unstructured"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict:
    return make_case(tmp_path, request.param)


def recover(case: dict, output: Path, **settings: object) -> Path:
    config = lr.RecoverConfig(
        adapter=case["trained"], base=str(case["base"]), output=output, **settings
    )
    return lr.recover(config).output


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_packing_is_numpy_s_lowest_bit_first(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, columns), mask)


def test_a_plan_keeps_its_masks_and_refuses_others(case: dict, tmp_path: Path) -> None:
    plan = case["plan"]
    kept = weights(case["pruned"])
    original = weights(case["base"])
    assert len(plan.masks.shapes) == 14
    for module in plan.masks.shapes:
        name = f"{module}.weight"
        assert torch.equal(kept[name], torch.where(plan.mask(module), original[name], 0.0))
    copy = tmp_path / "copy"
    copy.mkdir()
    plan.save(copy)
    assert PruningPlan.load(copy).digest == plan.digest
    assert replace(plan, masks=replace(plan.masks, sha256="0")).digest != plan.digest
    (copy / MASKS_FILE).unlink()
    with pytest.raises(lr.LoramError, match="is missing, the plan beside it needs it"):
        PruningPlan.load(copy)
    save_file({"x": torch.zeros(1)}, copy / MASKS_FILE)
    with pytest.raises(lr.LoramError, match="holds other masks than its plan says"):
        PruningPlan.load(copy).mask(next(iter(plan.masks.shapes)))


@pytest.mark.parametrize("elements", [1, 30, 10**6])
@pytest.mark.parametrize("with_weight", [False, True])
def test_the_masked_product_and_its_gradients(elements: int, with_weight: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, a, b = draw(2, 3, 10), draw(2, 10), draw(7, 2)
    weight = draw(7, 10).detach() if with_weight else None
    mask = torch.rand(7, 10, generator=generator) < 0.5

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return MaskedProduct.apply(x, a, b, pack(mask), 0.7, weight, elements)

    naive = x @ (0.7 * (b @ a) * mask + (0 if weight is None else weight)).T
    torch.testing.assert_close(product(x, a, b), naive)
    assert torch.autograd.gradcheck(product, (x, a, b))


def test_training_is_that_of_the_product_formed_naively(case: dict) -> None:
    """A few steps of SGD, against a model whose weights are ``W + s (B A) * M`` as tensors."""
    plan, ids = case["plan"], IDS
    adapted = adapt(case["pruned"])
    plain = load_model(case["pruned"], "fp32")
    tensors = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    own = [p for n, p in adapted.named_parameters() if "lora_" in n]
    frozen = dict(plain.named_parameters())
    for _ in range(4):
        loss, count = summed_loss(adapted.get_base_model(), ids, None, ids)
        (loss / count).backward()
        changed = dict(frozen)
        for name in [n for n in tensors if "lora_A" in n]:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.default.weight")
            product = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * 2
            mask = plan.mask(module)
            product = product if mask is None else product * mask
            changed[f"{module}.weight"] = frozen[f"{module}.weight"] + product
        output = torch.func.functional_call(plain, changed, (ids,), {"labels": ids})
        output.loss.backward()
        torch.testing.assert_close(loss / count, output.loss, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for parameter in (*own, *tensors.values()):
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    for parameter, expected in zip(own, tensors.values(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_what_peft_merges_is_masked_and_disabling_takes_it_off(case: dict) -> None:
    adapted = case["adapted"]
    expected = logits_of(adapted, IDS)
    with adapted.disable_adapter():
        without = logits_of(adapted, IDS)
    assert torch.equal(without, logits_of(load_model(case["pruned"], "fp32"), IDS))
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), IDS), expected)


def test_the_delta_is_exact_and_zero_where_nothing_was_kept(case: dict, tmp_path: Path) -> None:
    recovered = recover(case, tmp_path / "delta", form="delta")
    found = load_file(recovered / "delta.safetensors")
    expected = products(case["trained"], case["plan"])
    assert found.keys() == {f"{module}.weight" for module in expected}
    for module, product in expected.items():
        delta = found[f"{module}.weight"]
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, product, rtol=1e-5, atol=1e-7)
        mask = case["plan"].mask(module)
        assert mask is None or not delta[~mask].any()


def test_recovery_is_exact_on_the_base_with_masked_weights_zeroed(
    case: dict, tmp_path: Path
) -> None:
    """Invariant 1 for masks."""
    delta = load_file(recover(case, tmp_path / "delta", form="delta") / "delta.safetensors")
    model = load_model(case["base"], "fp32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mask = case["plan"].mask(name.removesuffix(".weight"))
            if mask is not None:
                parameter.mul_(mask)
            if name in delta:
                parameter.add_(delta[name])
    torch.testing.assert_close(
        logits_of(model, IDS), logits_of(case["adapted"], IDS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_delta_is_the_sum_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", seed=4, dtype=dtype)
    pruned = prune(base, tmp_path / "pruned")
    trained = write_trained(pruned, adapt(pruned), tmp_path / "trained").output
    case = {"base": base, "trained": trained}
    recovered = recover(case, tmp_path / "delta", form="delta")
    delta = load_file(recovered / "delta.safetensors")
    merging = lr.MergeConfig(base=str(base), adapter=recovered, output=tmp_path / "merged")
    merged = weights(lr.merge(merging).output)
    for name, tensor in weights(base).items():
        expected = (tensor.float() + delta[name]).to(dtype) if name in delta else tensor
        assert torch.equal(merged[name], expected), name
    other = tiny.write_base(tmp_path / "other", seed=5, dtype=dtype)
    with pytest.raises(lr.LoramError, match="merge.base .* has fingerprint"):
        lr.merge(merging.model_copy(update={"base": str(other), "output": tmp_path / "no"}))


def test_a_full_rank_svd_is_the_delta(case: dict, tmp_path: Path) -> None:
    recovered = recover(case, tmp_path / "svd", svd_rank=10_000)
    details = json.loads((recovered / "manifest.json").read_text())["details"]
    assert details["svd_error"] < 1e-5
    with_adapter = peft.PeftModel.from_pretrained(load_model(case["base"], "fp32"), recovered)
    expected = load_model(case["base"], "fp32")
    with torch.no_grad():
        for module, product in products(case["trained"], case["plan"]).items():
            expected.get_submodule(module).weight += product
    torch.testing.assert_close(
        logits_of(with_adapter, IDS), logits_of(expected, IDS), rtol=1e-4, atol=1e-4
    )


def test_the_truncated_svd_is_near_the_best_and_its_error_is_told(
    case: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recovered = recover(case, tmp_path / "svd", svd_rank=6)
    said = capsys.readouterr().err
    assert "recovered adapter misses" in said and "recover.form to delta" in said
    details = json.loads((recovered / "manifest.json").read_text())["details"]
    tensors = load_file(recovered / "adapter_model.safetensors")
    squares = missed = 0.0
    for module, product in products(case["trained"], case["plan"]).items():
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].double()
        b = tensors[f"{PREFIX}{module}.lora_B.weight"].double()
        error = float((product - b @ a).square().sum())
        if case["plan"].mask(module) is None:
            assert error < 1e-8
            continue
        best = float(torch.linalg.svdvals(product.double())[6:].square().sum())
        assert a.shape[0] == 6
        assert best <= error * (1 + 1e-6) and error <= 1.02 * best
        size = float(product.double().square().sum())
        assert details["svd_errors"][module] == pytest.approx(math.sqrt(error / size), rel=1e-4)
        squares, missed = squares + size, missed + error
    assert details["svd_error"] == pytest.approx(math.sqrt(missed / squares), rel=1e-4)
    quiet = recover(case, tmp_path / "quiet", svd_rank=6, max_svd_error=1.0)
    assert "misses" not in capsys.readouterr().err
    assert load_file(quiet / "adapter_model.safetensors").keys() == tensors.keys()
    model = peft.PeftModel.from_pretrained(load_model(case["base"], "fp32"), quiet)
    assert peft.LoraConfig.from_pretrained(quiet).r == 6
    assert torch.isfinite(logits_of(model, IDS)).all()


def test_truncation_is_deterministic_and_leaves_the_generator_alone() -> None:
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    first, again = truncated(delta, 5), truncated(delta, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_structured_pruning_has_no_delta_and_a_delta_is_no_adapter(
    case: dict, tmp_path: Path
) -> None:
    structured = lr.prune(
        lr.PruneConfig(base=str(case["base"]), output=tmp_path / "s", ratio=0.5, layers=(1, 3))
    ).output
    plain = peft.get_peft_model(
        load_model(structured, "fp32"), peft.LoraConfig(target_modules=LINEARS)
    )
    trained = write_trained(structured, plain, tmp_path / "st").output
    config = lr.RecoverConfig(
        adapter=trained, base=str(case["base"]), output=tmp_path / "no", form="delta"
    )
    with pytest.raises(lr.LoramError, match="recover.form must be adapter"):
        lr.recover(config)
    delta = recover(case, tmp_path / "delta", form="delta")
    with pytest.raises(lr.LoramError, match="holds a dense delta; run loram merge"):
        lr.evaluate(
            lr.EvaluateConfig(
                model=str(case["base"]),
                adapter=delta,
                output=tmp_path / "e",
                data=str(tiny.write_jsonl(tmp_path / "d.jsonl", tiny.questions(4))),
            )
        )


def test_zero_weights_stay_zero_when_the_weights_are_trained(case: dict) -> None:
    """What alignment relies on: against gradients multiplied by the mask in a plain loop."""
    ours, plain = load_model(case["pruned"], "fp32"), load_model(case["pruned"], "fp32")
    kept = {n: p != 0 for n, p in plain.named_parameters() if case["plan"].mask(n[:-7]) is not None}
    for module in plain.modules():
        if isinstance(module, SparseLinear):
            module.__class__ = torch.nn.Linear
    assert len(kept) == 14
    for model in (ours, plain):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            if model is plain:
                for name, parameter in model.named_parameters():
                    if name in kept:
                        parameter.grad.mul_(kept[name])
            optimiser.step()
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert name not in kept or not found[~kept[name]].any()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("zero_stage", "workers"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 2)]
)
def test_alignment_leaves_masked_weights_zero(
    zero_stage: int, workers: int, tmp_path: Path, embedded_ray: None
) -> None:
    case = make_case(tmp_path, "unstructured")
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts())
    aligned = lr.align(
        lr.AlignConfig(
            pruned=case["pruned"],
            output=tmp_path / "aligned",
            corpus={"sources": [{"path": str(text)}], "sequence_length": 32},
            steps=3,
            batch_size=4,
            micro_batch_size=2,
            workers=workers,
            zero_stage=zero_stage,
            precision="fp32",
            optimiser={"learning_rate": 1e-2, "weight_decay": 0.1},
        )
    ).output
    before, after, plan = weights(case["pruned"]), weights(aligned), PruningPlan.load(aligned)
    assert plan.digest == case["plan"].digest
    for module in plan.masks.shapes:
        name, mask = f"{module}.weight", plan.mask(module)
        assert not after[name][~mask].any()
        assert (after[name] - before[name])[mask].abs().mean() > 1e-3


@pytest.mark.cluster
def test_the_train_and_evaluate_stages_use_the_masks(tmp_path: Path, embedded_ray: None) -> None:
    case = make_case(tmp_path, "2:4")
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(16)))
    trained = lr.train(
        lr.TrainConfig(
            model=case["pruned"],
            output=tmp_path / "adapter",
            data=data,
            steps=3,
            batch_size=8,
            lora={"dropout": 0.1},
            optimiser={"learning_rate": 1e-1},
            precision="fp32",
            cpus=1,
        )
    ).output
    summed = load_model(case["pruned"], "fp32")
    stock = load_model(case["base"], "fp32")
    stock.load_state_dict(summed.state_dict())
    with torch.no_grad():
        for module, product in products(trained, PruningPlan.load(trained)).items():
            assert product.abs().max() > 1e-3
            stock.get_submodule(module).weight += product
    stock.save_pretrained(tmp_path / "stock")
    tiny.tokenizer().save_pretrained(tmp_path / "stock")

    def perplexity(name: str, **model: object) -> float:
        config = lr.EvaluateConfig(
            output=tmp_path / name, data=data, precision="fp32", cpus=1, **model
        )
        return lr.evaluate(config).manifest.details["answer_perplexity"]

    found = perplexity("ours", model=str(case["pruned"]), adapter=trained)
    assert found == pytest.approx(perplexity("naive", model=str(tmp_path / "stock")), rel=1e-4)
    assert found != pytest.approx(perplexity("without", model=str(case["pruned"])), rel=1e-2)
