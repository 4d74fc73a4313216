"""The merge stage against PEFT's own merging and an independent formula."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram_ray as lr
from helpers import tiny
from helpers.adapters import (
    LINEARS,
    logits_of,
    run_python,
    token_ids,
    train_randomly,
    with_random_adapter,
    write_trained,
)
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.adapter import Adapter
from loram_ray.artifacts.stage_directory import StageResult
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan
from loram_ray.recovery.deltas import open_change
from loram_ray.recovery.parity import parity_of
from loram_ray.recovery.scatter import merged_weight

IDS = token_ids(tiny.VOCABULARY)
PREFIX = "base_model.model."
WITH_HEAD = [*LINEARS, "lm_head"]

# Sizes of the base, settings of the adapter.
CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "plain": ({}, {}),
    "mha, biases": ({"heads": 4, "kv_heads": 4, "bias": True}, {"r": 3}),
    "patterns": (
        {},
        {
            "rank_pattern": {r"layers\.2\.mlp\.up_proj": 7, "q_proj": 2},
            "alpha_pattern": {r"^model\.layers\.1\.self_attn\.o_proj": 3, "down_proj": 32},
        },
    ),
    "rank-stabilised": ({}, {"use_rslora": True, "r": 6, "rank_pattern": {"v_proj": 5}}),
    "some linears": ({}, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [3]}),
    "output head": ({}, {"target_modules": WITH_HEAD}),
    "tied": ({"tied": True}, {}),
    "tied, output head": ({"tied": True}, {"target_modules": WITH_HEAD}),
    "many shards": ({"max_shard_size": "40KB"}, {}),
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merge(base: Path, adapter: Path, output: Path, **settings: object) -> Path:
    return merging(base, adapter, output, **settings).output


def merging(base: Path, adapter: Path, output: Path, **settings: object) -> StageResult:
    config = lr.MergeConfig(base=str(base), adapter=adapter, output=output, **settings)
    return lr.merge(config)


def saved_adapter(
    base: Path, folder: Path, seed: int = 0, **settings: object
) -> tuple[Path, peft.PeftModel]:
    """A random adapter written by PEFT itself: it has no manifest."""
    adapted = with_random_adapter(load_model(base, "fp32"), seed, **settings)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, adapted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_bytes", [30_000, 5 * 10**9])
def test_merged_weights_and_logits_are_peft_s(
    tmp_path: Path, case: str, max_shard_bytes: int
) -> None:
    sizes, settings = CASES[case]
    base = tiny.write_base(tmp_path / "base", seed=6, **sizes)
    adapter, adapted = saved_adapter(base, tmp_path / "adapter", **settings)
    expected_logits = logits_of(adapted, IDS)
    result = merging(base, adapter, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    merged = result.output
    assert 0 < result.manifest.details["parity_relative_error"] < 1e-5
    assert (len(list(merged.glob("model*.safetensors"))) > 1) == (max_shard_bytes == 30_000)

    found, before = weights(merged), weights(base)
    head_adapted = "lm_head" in settings.get("target_modules", ())
    assert set(found) == set(before) | ({"lm_head.weight"} if head_adapted else set())
    model, said = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    torch.testing.assert_close(logits_of(model, IDS), expected_logits, rtol=1e-5, atol=1e-5)

    # PEFT adds to the tensor that head and embedding share; the shared tensor must stay.
    if case != "tied, output head":
        reference = adapted.merge_and_unload().state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-6, atol=1e-7)
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    stored = load_file(adapter / "adapter_model.safetensors")
    adapted_weights = {
        name.removeprefix(PREFIX).replace(".lora_A", "") for name in stored if "lora_A" in name
    }
    assert changed == adapted_weights & set(before)


@pytest.mark.parametrize("case", CASES)
def test_the_scale_of_each_module_is_peft_s(tmp_path: Path, case: str) -> None:
    sizes, settings = CASES[case]
    base = tiny.write_base(tmp_path / "base", **sizes)
    directory, adapted = saved_adapter(base, tmp_path / "adapter", **settings)
    scales = {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    with Adapter(directory, "adapter") as adapter:
        assert sorted(adapter.modules) == sorted(scales)
        assert {name: adapter.scale(name) for name in adapter.modules} == pytest.approx(scales)


def test_tied_head_becomes_untied_and_the_embedding_stays(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tied=True)
    adapter, _ = saved_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    merged = merge(base, adapter, tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    found, before = weights(merged), weights(base)
    assert torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"{PREFIX}lm_head.lora_{side}.weight"] for side in "AB")
    expected = before["model.embed_tokens.weight"] + 8 / 4 * (b @ a)
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-6, atol=1e-7)
    model = load_model(merged, "fp32")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])


def test_a_tied_base_that_stores_its_head_too_becomes_untied(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tied=True)
    adapter, adapted = saved_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merged = merge(base, adapter, tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    found = logits_of(load_model(merged, "fp32"), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), rtol=1e-5, atol=1e-5)


def test_a_tied_base_whose_head_is_not_adapted_stays_tied(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tied=True)
    adapter, _ = saved_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged")
    model = load_model(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bf16_weights_are_summed_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapted = with_random_adapter(load_model(base, "bf16"), target_modules=WITH_HEAD)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            # Multiples of 2^-10 up to 1/8: float32 holds the product, in any order of terms.
            steps = torch.randint(-128, 129, parameter.shape, generator=generator)
            parameter.data = steps.float() / 1024
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = weights(merge(base, tmp_path / "adapter", tmp_path / "merged"))
    before = weights(base)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rounded_twice = 0
    for name in [name for name in stored if "lora_A" in name]:
        target = name.removeprefix(PREFIX).replace(".lora_A", "")
        change = 2 * (stored[name.replace("lora_A", "lora_B")].double() @ stored[name].double())
        expected = (before[target].double() + change).float().bfloat16()
        assert found[target].dtype == torch.bfloat16
        assert torch.equal(found[target], expected)
        in_bf16 = before[target] + change.bfloat16()
        rounded_twice += int((in_bf16 != expected).sum())
    assert rounded_twice > 0  # the example tells the two ways apart


def recovered_for(base: Path, folder: Path) -> tuple[Path, Path]:
    """A pruned model of the base, and a random adapter of it, recovered."""
    pruned = lr.prune(
        lr.PruneConfig(base=str(base), output=folder / "pruned", ratio=0.5, layers=(1, 3))
    ).output
    trained, _ = train_randomly(pruned, folder / "trained")
    recovering = lr.RecoverConfig(adapter=trained, base=str(base), output=folder / "recovered")
    return pruned, lr.recover(recovering).output


def test_a_recovered_adapter_merges_into_the_base_it_was_recovered_for(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", seed=8)
    pruned, recovered = recovered_for(base, tmp_path)
    merged = merge(base, recovered, tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(load_model(base, "fp32"), recovered)
    expected = logits_of(model, IDS)
    found = logits_of(load_model(merged, "fp32"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(merged)("x").input_ids
    assert not (merged / "pruning_plan.safetensors").exists()

    # What was pruned is the base's, bit for bit.
    plan, before, after = PruningPlan.load(pruned), weights(base), weights(merged)
    name = "model.layers.1.mlp.up_proj.weight"
    dropped = [i for i in range(96) if i not in plan.layers[1].neurons.tolist()]
    assert torch.equal(after[name][dropped], before[name][dropped])
    assert not torch.equal(after[name], before[name])


def test_an_adapter_trained_on_the_base_itself_merges(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    trained, adapted = train_randomly(base, tmp_path / "trained")
    merged = merge(base, trained, tmp_path / "merged")
    found = logits_of(load_model(merged, "fp32"), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_plain_transformers_loads_a_merged_model_where_loram_ray_is_not_installed(
    tmp_path: Path,
) -> None:
    base = tiny.write_base(tmp_path / "base", tied=True)
    adapter, adapted = saved_adapter(base, tmp_path / "adapter", target_modules=WITH_HEAD)
    merged = merge(base, adapter, tmp_path / "merged", max_shard_bytes=50_000)
    torch.save(IDS, tmp_path / "ids.pt")
    script = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    arguments = [merged, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    run_python(script, tmp_path, *arguments, with_loram_ray=False)
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits_of(adapted, IDS), rtol=1e-5, atol=1e-5)


def test_merging_twice_is_skipped_and_another_adapter_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter, _ = saved_adapter(base, tmp_path / "adapter")
    other, _ = saved_adapter(base, tmp_path / "other", seed=1)
    config = lr.MergeConfig(base=str(base), adapter=adapter, output=tmp_path / "merged")
    assert not lr.merge(config).skipped
    before = tiny.tree(tmp_path)
    assert lr.merge(config).skipped
    with pytest.raises(lr.LoramError, match="merge.output must be a new or empty directory"):
        merge(base, other, tmp_path / "merged")
    assert tiny.tree(tmp_path) == before


@pytest.mark.parametrize("difference", ["one value", "another seed"])
def test_another_base_is_refused_and_nothing_written(tmp_path: Path, difference: str) -> None:
    base = tiny.write_base(tmp_path / "base")
    _, recovered = recovered_for(base, tmp_path)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    if difference == "another seed":
        tiny.write_base(other, seed=1)
    else:
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"][3] *= 1.5
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=r"merge.base must be the base that was pruned"):
        merge(other, recovered, tmp_path / "parent" / "merged")
    assert tiny.tree(tmp_path) == before


def test_an_adapter_of_pruned_shapes_is_refused_and_nothing_written(
    base: Path, tmp_path: Path
) -> None:
    pruned = lr.prune(
        lr.PruneConfig(base=str(base), output=tmp_path / "pruned", ratio=0.5, layers=(1, 3))
    ).output
    adapted = with_random_adapter(load_model(pruned, "fp32"))
    trained = write_trained(pruned, adapted, tmp_path / "trained").output
    adapted.save_pretrained(tmp_path / "by_peft")
    before = tiny.tree(tmp_path)
    for adapter, message in [
        (trained, "merge.adapter .* is for a pruned model; run loram recover"),
        (tmp_path / "by_peft", r"merge.adapter must have .* model.layers.1.* in the base; run"),
    ]:
        with pytest.raises(lr.LoramError, match=message):
            merge(base, adapter, tmp_path / "merged")
    assert tiny.tree(tmp_path) == before


def test_bases_that_cannot_be_merged_into_are_refused_and_nothing_written(
    base: Path, tmp_path: Path
) -> None:
    adapter, _ = saved_adapter(base, tmp_path / "adapter")
    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    shallow = tiny.write_base(tmp_path / "shallow", layers=2)
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    pruned = lr.prune(
        lr.PruneConfig(base=str(base), output=tmp_path / "pruned", ratio=0.0, layers=(1, 3))
    ).output
    before = tiny.tree(tmp_path)
    for refused, message in [
        (quantised, "merge.base must be in full precision"),
        (shallow, r"adapts model.layers.[23]\S+, which the base does not have"),
        (cut, "model.safetensors is not a valid"),
        (pruned, "merge.base must be a model that is not pruned"),
        (tmp_path / "nowhere", "base must be a model directory"),
    ]:
        with pytest.raises(lr.LoramError, match=message):
            merge(refused, adapter, tmp_path / "merged")
    assert tiny.tree(tmp_path) == before


def test_adapters_that_are_none_are_refused_and_nothing_written(base: Path, tmp_path: Path) -> None:
    adapter, _ = saved_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    half = Path(shutil.copytree(adapter, tmp_path / "half"))
    kept = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj.lora_B" not in k}
    save_file(kept, half / "adapter_model.safetensors")
    other_half = Path(shutil.copytree(adapter, tmp_path / "other_half"))
    kept = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj.lora_A" not in k}
    save_file(kept, other_half / "adapter_model.safetensors")
    mixed = Path(shutil.copytree(adapter, tmp_path / "mixed"))
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({**tensors, name: tensors[name][:3].clone()}, mixed / "adapter_model.safetensors")
    listed = Path(shutil.copytree(adapter, tmp_path / "listed"))
    (listed / "adapter_config.json").write_text("[1]")
    cut = Path(shutil.copytree(adapter, tmp_path / "cut"))
    content = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(content[:-1])
    dora, _ = saved_adapter(base, tmp_path / "dora", use_dora=True)
    before = tiny.tree(tmp_path)
    for refused, message in [
        (half, "lacks lora_B of model.layers.1.mlp.up_proj"),
        (other_half, "lacks lora_A of model.layers.1.mlp.up_proj"),
        (mixed, r"lora_A \(3, 64\) and lora_B \(96, 4\) for model.layers.1.mlp.up_proj"),
        (listed, "adapter_config.json must contain a JSON object"),
        (cut, "adapter_model.safetensors is not a valid"),
        (dora, "use_dora"),
        (base, "does not contain adapter_config.json"),
    ]:
        with pytest.raises(lr.LoramError, match=message):
            merge(base, refused, tmp_path / "merged")
    assert tiny.tree(tmp_path) == before


# Parity of logits


def test_parity_is_that_of_whole_models(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter, adapted = saved_adapter(base, tmp_path / "adapter", target_modules=WITH_HEAD)
    merged = merge(base, adapter, tmp_path / "merged")
    with closing(open_change(adapter, "merge.adapter")) as change:
        found = parity_of(base, change, merged, architecture_of("llama"), "cpu")
    ids = torch.randint(tiny.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    of_both = logits_of(adapted, ids)
    with adapted.disable_adapter():
        of_base = logits_of(adapted, ids)
    of_merged = logits_of(load_model(merged, "fp32"), ids)
    expected = {
        "effect": (of_both - of_base).square().mean().sqrt(),
        "error": (of_merged - of_both).square().mean().sqrt(),
        "kl": functional.kl_div(
            of_merged.log_softmax(-1), of_both.log_softmax(-1), log_target=True, reduction="none"
        )
        .sum(-1)
        .mean(),
        "agreement": (of_both.argmax(-1) == of_merged.argmax(-1)).float().mean(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-2, abs=1e-7), name
    assert found.modules == 4 * 7 + 1
    assert 0 < found.relative_error < 0.1


@pytest.mark.parametrize("fault", ["scale", "order", "one is left out"])
def test_a_merge_gone_wrong_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        if fault == "one is left out" and weight.shape == (96, 64):
            return weight
        if fault == "order":
            a = a.flip(0)
        return merged_weight(weight, a, b, scale * (2 if fault == "scale" else 1))

    base = tiny.write_base(tmp_path / "base")
    adapter, _ = saved_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr("loram_ray.recovery.deltas.merged_weight", wrong)
    with pytest.raises(lr.LoramError, match="from those of the base with the adapter"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    unchecked = merging(base, adapter, tmp_path / "merged", parity=False)
    assert "parity_kl" not in unchecked.manifest.details


def test_a_change_too_small_for_bfloat16_is_refused(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter, adapted = saved_adapter(base, tmp_path / "adapter")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    with pytest.raises(lr.LoramError, match="change is too small for the weights"):
        merge(base, adapter, tmp_path / "merged")


def test_a_change_near_the_rounding_of_float32_merges(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    adapter, adapted = saved_adapter(base, tmp_path / "adapter")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-4
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    details = merging(base, adapter, tmp_path / "merged").manifest.details
    assert details["parity_relative_error"] < 0.1
