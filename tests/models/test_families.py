"""Every supported family through prune, recover and merge, against its stock class and PEFT."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import loram_ray as lr
from helpers import families, tiny
from helpers.adapters import logits_of, run_python, train_randomly, with_random_adapter
from helpers.families import (
    CLOSE,
    IDS,
    Case,
    prune,
    zero_pruned,
)
from loram_ray.architectures import ARCHITECTURES, architecture_of
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.models import configuration_pruned, modeling_pruned
from loram_ray.models.files import family_of
from loram_ray.models.loading import load_model
from loram_ray.models.modeling_pruned import unfuse_experts
from loram_ray.plan import KeptUnits, PruningPlan, unit_sums
from loram_ray.units import KV_HEAD, KV_HEADS, NEURON, NEURONS, QUERY_GROUP, Unit


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    base = families.write_base(folder / "base", request.param, seed=3)
    pruned = prune(base, folder / "pruned")
    return Case(request.param, base, pruned, PruningPlan.load(pruned))


def unfused(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The stock model with its experts apart, given the tensors on disk by their names."""
    for layer in model.model.layers:
        unfuse_experts(layer, model.config)
    missing, unexpected = model.load_state_dict(
        load_file(directory / "model.safetensors"), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


SAVED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
"""Part of the classes' names that stands for the family; saved directories have these names."""


@pytest.mark.parametrize("family", SAVED)
def test_classes_have_the_names_in_saved_directories(family: str) -> None:
    """``auto_map`` and pickles find a class by the name of its module and its own."""
    config = getattr(configuration_pruned, f"Pruned{SAVED[family]}Config")
    model = getattr(modeling_pruned, f"Pruned{SAVED[family]}ForCausalLM")
    assert (config.model_type, model.config_class) == (f"loram_{family}", config)
    assert pickle.loads(pickle.dumps((config, model))) == (config, model)
    stock = architecture_of(family)
    assert (stock.pruned_config, stock.pruned_model) == (config.__name__, model.__name__)


def test_every_family_has_a_tiny_model() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES} == set(families.FAMILIES)


def test_ratio_zero_is_the_base_bit_for_bit(case: Case, tmp_path: Path) -> None:
    whole = prune(case.base, tmp_path / "whole", ratio=0.0)
    before = load_file(case.base / "model.safetensors")
    after = load_file(whole / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    base = load_model(case.base, "fp32")
    found, expected = logits_of(load_model(whole, "fp32"), IDS), logits_of(base, IDS)
    if case.family in families.MIXTURES:  # a fused product is rounded otherwise than two
        torch.testing.assert_close(found, expected, **CLOSE)
        expected = logits_of(unfused(base, case.base), IDS)
    assert torch.equal(found, expected)


def test_a_stock_model_with_its_experts_apart_is_the_stock_model(case: Case) -> None:
    expected = logits_of(load_model(case.base, "fp32"), IDS)
    found = logits_of(unfused(load_model(case.base, "fp32"), case.base), IDS)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_logits_are_the_base_s_with_the_pruned_positions_zeroed(case: Case) -> None:
    untouched, expected = (
        logits_of(load_model(case.base, "fp32"), IDS),
        logits_of(case.zeroed(), IDS),
    )
    assert (expected - untouched).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load_model(case.pruned, "fp32"), IDS), expected, **CLOSE)


def test_a_model_pruned_before_its_config_named_the_norm_s_mean_is_what_it_was(
    tmp_path: Path,
) -> None:
    base = families.write_base(tmp_path / "base", "olmo2", seed=3)
    pruned = prune(base, tmp_path / "pruned")
    config = read_model_config(pruned)
    assert config.pop("pruned_norm_mean") == "kept"
    now = logits_of(load_model(pruned, "fp32"), IDS)
    (pruned / "config.json").write_text(json.dumps(config))
    before = zero_pruned(load_model(base, "fp32"), PruningPlan.load(pruned), norm_mean="all")
    found = logits_of(load_model(pruned, "fp32"), IDS)
    torch.testing.assert_close(found, logits_of(before, IDS), **CLOSE)
    assert (found - now).abs().max() > 1e-2


def test_what_pruning_changes_are_linears_and_the_norms_that_a_family_names(case: Case) -> None:
    before = {n: t.shape for n, t in load_file(case.base / "model.safetensors").items()}
    after = load_file(case.pruned / "model.safetensors")
    changed = {n.rpartition(".")[0] for n, t in after.items() if t.shape != before[n]}
    linears = set(read_model_config(case.pruned)["pruned_linears"])
    norms = {name.rpartition(".")[2] for name in changed - linears}
    assert norms == ({"q_norm", "k_norm"} if case.family == "olmo2" else set())
    said = read_model_config(case.pruned).get("pruned_norm_mean")
    assert said == ("kept" if case.family == "olmo2" else None)


def test_generation_is_the_zeroed_base_s(case: Case) -> None:
    settings = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = load_model(case.pruned, "fp32").generate(IDS, **settings)
    expected = case.zeroed().generate(IDS, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


def test_attention_can_be_switched_after_loading(case: Case) -> None:
    model, zeroed = load_model(case.pruned, "fp32"), case.zeroed()
    for either in (model, zeroed):
        either.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, IDS), logits_of(zeroed, IDS), **CLOSE)


def test_a_recovered_adapter_is_exact_and_merges(case: Case, tmp_path: Path) -> None:
    settings = {"target_modules": case.targets, "lora_dropout": 0.05}
    trained, adapted = train_randomly(case.pruned, tmp_path / "trained", seed=5, **settings)
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(case.base), output=tmp_path / "recovered")
    ).output
    expected = logits_of(adapted, IDS)
    assert (expected - logits_of(load_model(case.pruned, "fp32"), IDS)).abs().max() > 1e-2
    found = logits_of(peft.PeftModel.from_pretrained(case.zeroed(), recovered), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)

    result = lr.merge(
        lr.MergeConfig(adapter=recovered, base=str(case.base), output=tmp_path / "merged")
    )
    assert 0 < result.manifest.details["parity_relative_error"] < 1e-4
    merged = result.output
    on_base = peft.PeftModel.from_pretrained(load_model(case.base, "fp32"), recovered)
    found, expected = logits_of(load_model(merged, "fp32"), IDS), logits_of(on_base, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert json.loads((merged / "config.json").read_text())["model_type"] == case.family


def test_every_lora_matrix_gets_a_finite_gradient(case: Case) -> None:
    model = with_random_adapter(load_model(case.pruned, "fp32"), target_modules=case.targets)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained}
    geometry, family = case.plan.geometry, case.plan.architecture
    assert adapted == {
        module for layer in range(4) for module, _, _ in family.modules(layer, geometry)
    }
    assert losses[-1] < losses[0]


def test_a_pruned_model_saved_by_transformers_is_itself(case: Case, tmp_path: Path) -> None:
    model = load_model(case.pruned, "fp32")
    model.save_pretrained(tmp_path / "again")
    before = load_file(case.pruned / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    again = load_model(tmp_path / "again", "fp32")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_modules_are_those_on_disk_and_are_located(case: Case) -> None:
    family, geometry = case.plan.architecture, case.plan.geometry
    stored = load_file(case.base / "model.safetensors")
    for layer in range(geometry.num_layers):
        for module, linear, expert in family.modules(layer, geometry):
            assert family.locate(module) == (layer, linear, expert)
            size = stored[f"{module}.weight"].shape[linear.axis]
            assert size == linear.size(geometry)
    coupled = {m for layer in (1, 2) for m, _, _ in family.modules(layer, geometry)}
    assert set(read_model_config(case.pruned)["pruned_linears"]) == coupled
    experts = {expert for _, _, expert in family.modules(0, geometry)} - {None}
    assert experts == (set(range(4)) if case.family in families.MIXTURES else set())


def test_unit_sums_are_the_brute_force_sums(case: Case) -> None:
    geometry = case.plan.geometry
    group, dim = geometry.num_heads // geometry.num_kv_heads, geometry.head_dim
    for linear in case.plan.architecture.linears:
        expected: dict[Unit, list[float]] = {}
        at = 0
        size = linear.size(geometry)
        values = torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
        for span in linear.spans:
            kind = NEURONS if span is NEURON else KV_HEADS
            width = {NEURON: 1, KV_HEAD: dim, QUERY_GROUP: group * dim}[span]
            count = geometry.intermediate_size if kind is NEURONS else geometry.num_kv_heads
            sums = expected.setdefault(kind, [0.0] * count)
            for i in range(count):
                sums[i] += sum(values[at : at + width].tolist())
                at += width
        found = unit_sums(geometry, linear, values)
        assert found.keys() == expected.keys()
        for kind, sums in expected.items():
            torch.testing.assert_close(found[kind], torch.tensor(sums, dtype=torch.float64))
        with pytest.raises(ValueError, match="indices, got"):
            unit_sums(geometry, linear, values[:-1])


@pytest.mark.parametrize("family", families.MIXTURES)
def test_experts_have_kept_sets_of_their_own(family: str, tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", family)
    plan = PruningPlan.load(prune(base, tmp_path / "pruned"))
    for units in plan.layers.values():
        assert units.neurons.shape == (4, 12)
        assert len({tuple(kept) for kept in units.neurons.tolist()}) == 4


def test_a_plan_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "mixtral")
    plan = PruningPlan.load(prune(base, tmp_path / "pruned"))
    (tmp_path / "saved").mkdir()
    plan.save(tmp_path / "saved")
    assert PruningPlan.load(tmp_path / "saved").digest == plan.digest
    cut = {n: KeptUnits(kept, neurons=kept.neurons[:3]) for n, kept in plan.layers.items()}
    replace(plan, layers=cut).save(tmp_path / "saved")
    with pytest.raises(lr.LoramError, match="must keep ascending neurons"):
        PruningPlan.load(tmp_path / "saved")


def test_stock_names_of_a_mixture_are_located_too() -> None:
    family = architecture_of("mixtral")
    stored = "model.layers.2.block_sparse_moe.experts.3.w1"
    assert family.name_on_disk("model.layers.2.mlp.experts.3.w1") == stored
    assert family.locate("model.layers.2.mlp.experts.3.w1") == family.locate(stored)
    assert family.locate("model.layers.2.mlp.gate") is None


def test_a_dense_layer_in_the_range_of_a_mixture_is_refused(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "qwen3_moe", mlp_only_layers=[2])
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=r"prune.layers .* layer 2 of .* has no experts"):
        prune(base, tmp_path / "pruned")
    assert tiny.tree(tmp_path) == before
    model = load_model(prune(base, tmp_path / "pruned", layers=(0, 2)), "fp32")
    zeroed = zero_pruned(load_model(base, "fp32"), PruningPlan.load(tmp_path / "pruned"))
    torch.testing.assert_close(logits_of(model, IDS), logits_of(zeroed, IDS), **CLOSE)


def test_a_model_around_a_language_model_is_refused(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "gemma3_text")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    with pytest.raises(lr.LoramError, match="is a gemma3 around a gemma3_text; save its language"):
        prune(base, tmp_path / "pruned")


REFUSED_EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank-stabilised": ({"use_rslora": True}, "use_rslora"),
    "a rank of one projection": ({"rank_pattern": {"w1": 2}}, "rank or an alpha of its own"),
    "an alpha of one expert": (
        {"alpha_pattern": {r"experts\.1\.w2": 2}},
        "rank or an alpha of its own",
    ),
    "gate without up": ({"target_modules": ["q_proj", "w1"]}, "only one of .*w1 and .*w3"),
    "some experts": ({"target_modules": ["experts.0.w2"]}, "experts.1.w2 is not adapted"),
    "some layers": ({"layers_to_transform": [1]}, "is not adapted, but other experts are"),
    "an expression": ({"target_modules": r".*\.w[123]"}, "a regular expression"),
}


@pytest.mark.parametrize("reason", REFUSED_EXPERTS)
def test_adapters_of_experts_that_peft_would_change_are_refused(
    reason: str, tmp_path: Path
) -> None:
    settings, message = REFUSED_EXPERTS[reason]
    base = families.write_base(tmp_path / "base", "mixtral")
    pruned = prune(base, tmp_path / "pruned")
    targets = list(family_of(base).target_names())
    trained, _ = train_randomly(
        pruned, tmp_path / "trained", **{"target_modules": targets, **settings}
    )
    with pytest.raises(lr.LoramError, match=f"adapts experts .*{message}"):
        lr.recover(lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered"))
    assert not (tmp_path / "recovered").exists()


def test_an_adapter_of_attention_alone_may_have_any_ranks_on_a_mixture(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "mixtral")
    pruned = prune(base, tmp_path / "pruned")
    settings = {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}}
    trained, adapted = train_randomly(
        pruned, tmp_path / "trained", use_rslora=True, layers_to_transform=[0, 2], **settings
    )
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered")
    ).output
    zeroed = zero_pruned(load_model(base, "fp32"), PruningPlan.load(pruned))
    found = logits_of(peft.PeftModel.from_pretrained(zeroed, recovered), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), rtol=1e-5, atol=1e-4)


REMOTE_CODE = """
import torch
from transformers import AutoModelForCausalLM

ids = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        torch.save(model(ids).logits, directory + "/logits.pt")
assert not any(name.partition(".")[0] == "loram_ray" for name in sys.modules)
"""


@pytest.mark.slow
def test_plain_transformers_loads_pruned_models_where_loram_ray_is_not_installed(
    tmp_path: Path,
) -> None:
    pruned = []
    for family in ("phi3", "olmo2", "mixtral", "qwen3_moe"):
        base = families.write_base(tmp_path / f"base_{family}", family)
        pruned.append(prune(base, tmp_path / family))
        shutil.rmtree(base)
    torch.save(IDS, tmp_path / "ids.pt")
    run_python(REMOTE_CODE, tmp_path, tmp_path / "ids.pt", *pruned, with_loram_ray=False)
    for directory in pruned:
        expected = logits_of(load_model(directory, "fp32"), IDS)
        assert torch.equal(torch.load(directory / "logits.pt"), expected)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("family", tiny.first_of(["mixtral", "olmo2", "phi3"]))
def test_alignment_over_partitioned_weights_and_training_reach_a_merged_model(
    family: str, tmp_path: Path, embedded_ray: None
) -> None:
    base = families.write_base(tmp_path / "base", family)
    pruned = prune(base, tmp_path / "pruned")
    steps = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    steps["optimiser"] = {"learning_rate": 1e-3, "warmup_steps": 1}
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts())
    corpus = {"sources": [{"path": str(text)}], "sequence_length": 32}
    aligned = []
    for stage, workers in ((1, 1), (3, 2)):
        output = tmp_path / f"aligned{stage}"
        settings = {"pruned": pruned, "output": output, "corpus": corpus, **steps}
        settings |= {"base": str(base), "zero_stage": stage, "workers": workers}
        lr.align(lr.AlignConfig.model_validate(settings))
        aligned.append(load_file(output / "model.safetensors"))
    whole, partitioned = aligned
    for name, tensor in whole.items():
        torch.testing.assert_close(partitioned[name], tensor, rtol=0, atol=1e-6)

    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions())
    settings = {"model": output, "output": tmp_path / "trained", "data": str(data), **steps}
    settings |= {"lora": {"r": 4, "alpha": 8}, "max_length": 64}
    trained = lr.train(lr.TrainConfig.model_validate(settings)).output
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered")
    ).output
    merged = lr.merge(
        lr.MergeConfig(adapter=recovered, base=str(base), output=tmp_path / "merged")
    ).output
    on_base = peft.PeftModel.from_pretrained(load_model(base, "fp32"), recovered)
    found, expected = logits_of(load_model(merged, "fp32"), IDS), logits_of(on_base, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
