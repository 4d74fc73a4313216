"""Training and alignment of masked models, against products formed naively."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

import loram_ray as lr
from helpers import tiny
from helpers.adapters import logits_of, token_ids
from helpers.masked import (
    PREFIX,
    SETTINGS,
    Case,
    adapt,
    lora_settings,
    make_case,
    products,
    scales,
    weights,
)
from helpers.scored import score
from loram_ray.corpus.batches import padded
from loram_ray.corpus.examples import load_examples
from loram_ray.corpus.stream import Share, open_order, read_chunk
from loram_ray.finetuning.masked import (
    BLOCK_ELEMENTS,
    MaskedLoraLinear,
    MaskedProduct,
    put_adapter_on,
)
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.losses import summed_loss
from loram_ray.masks import pack
from loram_ray.models.loading import load_model
from loram_ray.models.modeling_pruned import SparseLinear
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.plan import PruningPlan
from loram_ray.runtime.progress import METRICS_FILE

IDS = token_ids(tiny.VOCABULARY)
STEPS, LR = 4, 1e-3


@pytest.fixture(params=list(SETTINGS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make_case(tmp_path, request.param)


def losses(directory: Path) -> list[float]:
    lines = (directory / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


class NaiveModel:
    """A masked model whose weights are ``W + s * (B A) * M`` as tensors, A and B being leaves."""

    def __init__(self, pruned: Path, adapted: peft.PeftModel) -> None:
        self.plan, self.scales = PruningPlan.load(pruned), scales(adapted)
        self.model = load_model(pruned, "fp32")
        self.matrices = {
            name.removeprefix(PREFIX).replace(".default.weight", ""): (
                parameter.detach().clone().requires_grad_()
            )
            for name, parameter in adapted.named_parameters()
            if "lora_" in name
        }

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The loss."""
        changed = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        for module, scale in self.scales.items():
            product = self.matrices[f"{module}.lora_B"] @ self.matrices[f"{module}.lora_A"]
            mask = self.plan.mask(module)
            masked = product if mask is None else product * mask
            changed[f"{module}.weight"] = changed[f"{module}.weight"] + scale * masked
        return torch.func.functional_call(self.model, changed, (), inputs).loss


@pytest.mark.parametrize("elements", [1, 10, 30, 10**6])
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
    found, grad = product(x, a, b), draw(2, 3, 7).detach()
    torch.testing.assert_close(found, naive)
    ours = torch.autograd.grad(found, (x, a, b), grad)
    for mine, expected in zip(ours, torch.autograd.grad(naive, (x, a, b), grad), strict=True):
        torch.testing.assert_close(mine, expected)
    assert torch.autograd.gradcheck(product, (x, a, b))
    assert torch.autograd.gradcheck(lambda a, b: product(x.detach(), a, b), (a, b))
    assert torch.autograd.gradcheck(lambda x: product(x, a.detach(), b.detach()), (x,))


def test_an_expert_without_tokens_has_zero_gradients() -> None:
    x, a, b = (torch.randn(shape).requires_grad_() for shape in ((0, 10), (2, 10), (7, 2)))
    packed, weight = pack(torch.rand(7, 10) < 0.5), torch.randn(7, 10)
    found = MaskedProduct.apply(x, a, b, packed, 1.0, weight, 30)
    found.sum().backward()
    assert found.shape == (0, 7) and x.grad.shape == (0, 10)
    assert not a.grad.any() and not b.grad.any()


def test_nothing_of_the_weights_size_is_saved_for_the_backward_pass() -> None:
    x, a, b = (torch.randn(shape).requires_grad_() for shape in ((5, 64), (2, 64), (96, 2)))
    weight, packed = torch.randn(96, 64), pack(torch.rand(96, 64) < 0.5)
    given = {tensor.data_ptr() for tensor in (x, a, b, packed, weight)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        MaskedProduct.apply(x, a, b, packed, 2.0, weight)
    assert {tensor.data_ptr() for tensor in saved} == given
    assert BLOCK_ELEMENTS <= 2**24


def test_bfloat16_does_not_round_a_young_adapter_away() -> None:
    # x W is 0, x ((B A) * M) is not; W + (B A) * M is W to bfloat16
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    x, weight = torch.ones(1, 64).bfloat16(), signs.repeat(4, 1).bfloat16()
    a, b, packed = torch.ones(1, 64), torch.full((4, 1), 1e-3), pack(torch.ones(4, 64).bool())
    assert torch.equal((weight + (b @ a)).bfloat16(), weight)
    found = MaskedProduct.apply(x, a, b, packed, 1.0, weight)
    torch.testing.assert_close(found.float(), torch.full((1, 4), 0.064), rtol=1e-2, atol=0)


def test_under_autocast_loss_and_gradients_are_those_of_float32_to_rounding(case: Case) -> None:
    found = {}
    for dtype in (None, torch.bfloat16):
        adapted = adapt(case.pruned, **SETTINGS[case.plan.pattern])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, count = summed_loss(adapted.get_base_model(), IDS, None, IDS)
        (loss / count).backward()
        named = [(n, p) for n, p in adapted.named_parameters() if "lora_" in n]
        assert all(p.grad.dtype == torch.float32 for _, p in named)
        found[dtype] = (float(loss / count), {n: p.grad for n, p in named})
    (exact, gradients), (rounded, others) = found[None], found[torch.bfloat16]
    assert rounded == pytest.approx(exact, rel=1e-2)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_is_on_the_adapters_input_alone(bias: bool, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", bias=bias)
    case = make_case(tmp_path, "2:4", base, lora_dropout=0.5)
    module = "model.layers.1.mlp.up_proj"
    layer, x = case.adapted.get_submodule(f"{PREFIX}{module}"), torch.randn(3, 64)
    assert isinstance(layer, MaskedLoraLinear)
    frozen, product = layer.base_layer, case.products()[module]
    layer.train()
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.5)
    expected = functional.linear(x, frozen.weight, frozen.bias) + dropped @ product.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    layer.eval()
    expected = functional.linear(x, frozen.weight + product, frozen.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_what_peft_merges_is_masked_and_disabling_takes_it_off(case: Case) -> None:
    expected = logits_of(case.adapted, IDS)
    with case.adapted.disable_adapter():
        without = logits_of(case.adapted, IDS)
    assert torch.equal(without, logits_of(load_model(case.pruned, "fp32"), IDS))
    assert (expected - without).abs().max() > 1e-2
    merged = logits_of(case.adapted.merge_and_unload(), IDS)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_the_plan_is_the_mask_and_not_the_zeros(case: Case) -> None:
    model, module = load_model(case.pruned, "fp32"), "model.layers.1.mlp.up_proj"
    torch.nn.init.zeros_(model.get_submodule(module).weight)
    adapted = put_adapter_on(model, case.pruned, case.trained)
    layer = adapted.get_submodule(f"{PREFIX}{module}")
    assert torch.equal(layer.get_delta_weight("default") != 0, case.plan.mask(module))
    masked = {n for n, m in adapted.named_modules() if isinstance(m, MaskedLoraLinear)}
    assert masked == {f"{PREFIX}{module}" for module in case.plan.masks.shapes}


def test_adapters_that_are_more_than_a_product_are_refused(case: Case) -> None:
    for setting in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ValueError, match="only a plain LoRA can be masked"):
            put_adapter_on(load_model(case.pruned, "fp32"), case.pruned, lora_settings(**setting))


def train_config(model: Path, data: Path, output: Path, **changes: object) -> lr.TrainConfig:
    settings = {
        "model": model,
        "output": output,
        "data": str(data),
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "lm_head": True},
        "steps": STEPS,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 64,
        "optimiser": {"learning_rate": 5e-3, "warmup_steps": 1},
        "precision": "fp32",
        "checkpoint_every": 2,
        "cpus": 1,
        **changes,
    }
    return lr.TrainConfig.model_validate(settings)


def run_directly(settings: lr.TrainConfig, folder: Path) -> Path:
    """Train as the actor does, in this process."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    (folder / "adapter").mkdir()
    train_adapter(settings, folder / "work", folder / "adapter")
    return folder


def test_training_equals_a_plain_loop_over_products_formed_naively(
    case: Case, tmp_path: Path
) -> None:
    # the whole data set in a batch, so that the order does not matter
    data = tiny.write_jsonl(tmp_path / "eight.jsonl", tiny.questions(8))
    settings = train_config(case.pruned, data, tmp_path)
    ours = run_directly(settings, tmp_path / "ours")

    tokenizer = load_tokenizer(case.pruned)
    examples = [e for _, e in load_examples(tokenizer, str(data), 64, 0.0, "train.data")]
    rows = [
        {
            "input_ids": e.input_ids,
            "labels": [-100] * e.learnt[0][0] + e.input_ids[e.learnt[0][0] :],
        }
        for e in examples
    ]
    torch.manual_seed(settings.seed)
    config = lora_settings(target_modules=SETTINGS["unstructured"]["target_modules"])
    naive = NaiveModel(case.pruned, peft.get_peft_model(load_model(case.pruned, "fp32"), config))
    trained = list(naive.matrices.values())
    optimiser = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, 1, STEPS)
    expected = []
    for _ in range(STEPS):
        loss = naive(**padded(rows, tokenizer.eos_token_id))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        expected.append(float(loss))
    assert losses(ours / "work") == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    saved = load_file(ours / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {f"{PREFIX}{name}.weight" for name in naive.matrices}
    for name, matrix in naive.matrices.items():
        found = saved[f"{PREFIX}{name}.weight"]
        torch.testing.assert_close(found, matrix.detach(), rtol=1e-3, atol=2e-4)


def test_a_training_that_was_cut_ends_bit_equal(case: Case, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(16))
    settings = train_config(case.pruned, data, tmp_path, lora={"r": 4, "dropout": 0.1})
    whole = run_directly(settings, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole / "work", cut / "work")
    shutil.rmtree(cut / "work" / "checkpoints" / f"checkpoint-{STEPS}")
    run_directly(settings, cut)
    name = "adapter/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert losses(cut / "work") == losses(whole / "work")


@pytest.mark.slow
@pytest.mark.cluster
def test_the_train_and_evaluate_stages_use_the_masks(tmp_path: Path, embedded_ray: None) -> None:
    case = make_case(tmp_path, "unstructured")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(16))
    changes = {"lora": {"r": 4, "dropout": 0.1}, "optimiser": {"learning_rate": 1e-1}}
    trained = lr.train(train_config(case.pruned, data, tmp_path / "adapter", **changes)).output
    plan = PruningPlan.load(trained)
    assert plan.digest == case.plan.digest
    added = products(trained, plan, dict.fromkeys(scales(case.adapted), 16 / 4))

    def evaluation(name: str, model: Path, adapter: Path | None = None) -> lr.EvaluateConfig:
        settings = {"model": str(model), "adapter": adapter, "output": tmp_path / name}
        return lr.EvaluateConfig(data=str(data), precision="fp32", cpus_per_worker=1, **settings)

    def perplexity(name: str, model: Path) -> float:
        return score(evaluation(name, model))["answer_perplexity"]

    stock = load_model(case.base, "fp32")
    stock.load_state_dict(load_model(case.pruned, "fp32").state_dict())
    with torch.no_grad():
        for module, product in added.items():
            stock.get_submodule(module).weight += product
    stock.save_pretrained(tmp_path / "stock")
    tiny.tokenizer().save_pretrained(tmp_path / "stock")
    stage = lr.evaluate(evaluation("ours", case.pruned, trained))
    found = stage.manifest.details["answer_perplexity"]
    assert found == pytest.approx(perplexity("naive", tmp_path / "stock"), rel=1e-4)
    assert found != pytest.approx(perplexity("without", case.pruned), rel=1e-2)


def test_zero_weights_stay_zero_when_the_weights_are_trained(case: Case) -> None:
    """What alignment relies on, without Ray and DeepSpeed."""
    ids = torch.cat([token_ids(tiny.VOCABULARY, seed) for seed in range(STEPS * 2)])
    lengths = torch.full((len(ids),), ids.shape[1])
    expected, _ = plain_alignment(case, ids, lengths)
    found, _ = plain_alignment(case, ids, lengths, stock=False)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        mask = case.plan.mask(name.removesuffix(".weight"))
        assert mask is None or not tensor[~mask].any()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(("zero_stage", "workers"), tiny.first_of([(3, 2), (0, 1), (1, 1)]))
def test_alignment_equals_a_plain_loop_whose_gradients_are_masked(
    zero_stage: int, workers: int, tmp_path: Path, embedded_ray: None
) -> None:
    case = make_case(tmp_path, "unstructured")
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts())
    config = lr.AlignConfig(
        pruned=case.pruned,
        output=tmp_path / "aligned",
        corpus={"sources": [{"path": str(text)}], "sequence_length": 32},
        objective="causal_lm",
        steps=STEPS,
        batch_size=4,
        micro_batch_size=2,
        workers=workers,
        zero_stage=zero_stage,
        precision="fp32",
        optimiser={"learning_rate": LR, "weight_decay": 0.1},
    )
    aligned = lr.align(config).output
    plan = PruningPlan.load(aligned)
    assert plan.digest == case.plan.digest
    order, share = open_order(tmp_path / "aligned_corpus", 0), Share(0, STEPS * 4, 4, 0, 1)
    parts = [read_chunk(order, chunk, share) for chunk in order.chunks(0, STEPS * 4)]
    ids = torch.cat([torch.from_numpy(p["input_ids"]) for p in parts]).long()
    lengths = torch.cat([torch.from_numpy(p["length"]) for p in parts])
    expected, expected_losses = plain_alignment(case, ids, lengths)
    assert losses(aligned) == pytest.approx(expected_losses, rel=1e-4)
    found, before = weights(aligned), weights(case.pruned)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # AdamW turns float rounding in a near-zero gradient into a step of up to lr
        difference = (tensor - expected[name]).abs()
        assert difference.max() < 2 * LR and difference.mean() < 1e-5, name
        mask = plan.mask(name.removesuffix(".weight"))
        if mask is not None:
            assert not tensor[~mask].any()
            assert (tensor - before[name])[mask].abs().mean() > LR / 2


def plain_alignment(
    case: Case, ids: torch.Tensor, lengths: torch.Tensor, stock: bool = True
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Alignment in one process, of stock linears or of the model's own; weights and losses."""
    model = load_model(case.pruned, "fp32").train()
    masks = {f"{module}.weight": case.plan.mask(module) for module in case.plan.masks.shapes}
    for module in model.modules():
        if stock and isinstance(module, SparseLinear):
            module.__class__ = torch.nn.Linear
    model.lm_head.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimiser, 0, STEPS)
    seen = []
    for batch, length in zip(ids.split(4), lengths.split(4), strict=True):
        labels = batch.masked_fill(torch.arange(ids.shape[1]) >= length[:, None], -100)
        micro = zip(batch.split(2), labels.split(2), strict=True)
        loss = sum(model(input_ids=i, labels=t).loss for i, t in micro) / 2
        optimiser.zero_grad()
        loss.backward()
        if stock:
            for name, mask in masks.items():
                trained[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        schedule.step()
        seen.append(float(loss))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, seen
