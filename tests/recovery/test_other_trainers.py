"""Adapters that other trainers saved: recovered by the plan of the pruned model, without manifest.

The reference is invariant 1: the pruned model with its adapter computes what the base with zeroed
positions and the recovered adapter computes, the latter loaded by PEFT alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import loram_ray as lr
from helpers import families, masked, tiny
from helpers.adapters import (
    LINEARS,
    logits_of,
    token_ids,
    train_randomly,
    with_random_adapter,
    zero_pruned,
)
from helpers.command import Command
from helpers.recovery_cases import CASES, make_pruned
from loram_ray.artifacts.manifest import read_manifest
from loram_ray.evaluation.chat import open_chat
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

WEIGHTS = "adapter_model.safetensors"
IDS = token_ids(tiny.VOCABULARY)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def train_elsewhere(
    model: Path, output: Path, seed: int = 0, **settings: object
) -> tuple[Path, peft.PeftModel]:
    """Save a random adapter of a model as PEFT does; return its directory and the model."""
    adapted = with_random_adapter(load_model(model, "fp32"), seed, **settings)
    adapted.save_pretrained(output)
    return output, adapted


def recover(adapter: Path, base: Path, output: Path, **settings: Any) -> lr.StageResult:
    return lr.recover(lr.RecoverConfig(adapter=adapter, base=str(base), output=output, **settings))


def on_zeroed(base: Path, pruned: Path, adapter: Path) -> peft.PeftModel:
    """The base with the pruned positions zeroed and an adapter, put on by PEFT alone."""
    zeroed = zero_pruned(load_model(base, "fp32"), PruningPlan.load(pruned))
    return peft.PeftModel.from_pretrained(zeroed, adapter)


def rename(adapter: Path, new_name: Callable[[str], str]) -> None:
    """Rename the tensors of an adapter."""
    tensors = load_file(adapter / WEIGHTS)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


def configure(adapter: Path, **settings: object) -> None:
    """Change settings of an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "name", tiny.fast_of(list(CASES), "gqa", "rank and alpha patterns", "with the output head")
)
def test_recovery_is_exact_without_a_manifest(name: str, tmp_path: Path) -> None:
    sizes, settings = CASES[name]
    base, pruned = make_pruned(tmp_path, **sizes)
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained", seed=5, **settings)
    result = recover(adapter, base, tmp_path / "recovered")
    found = logits_of(on_zeroed(base, pruned, result.output), IDS)
    without = logits_of(load_model(pruned, "fp32"), IDS)
    expected = logits_of(adapted, IDS)
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, **EXACT)
    source = read_manifest(pruned)
    assert source is not None
    assert result.manifest.parents["model"] == source.digest
    assert result.manifest.details["trained"] == "elsewhere"
    assert "data" in result.manifest.details["not_recorded"]
    assert recover(adapter, base, tmp_path / "recovered").skipped


def test_the_result_is_that_of_the_same_adapter_with_a_manifest(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, adapted = train_randomly(pruned, tmp_path / "trained")
    adapted.save_pretrained(tmp_path / "elsewhere")
    ours = recover(trained, base, tmp_path / "a").output
    other = recover(tmp_path / "elsewhere", base, tmp_path / "b").output
    expected, found = load_file(ours / WEIGHTS), load_file(other / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("family", tiny.fast_of(list(families.FAMILIES), "olmo2", "phi3"))
def test_every_family_is_recovered(family: str, tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", family)
    pruned = families.prune(base, tmp_path / "pruned")
    targets = list(PruningPlan.load(pruned).architecture.target_names())
    adapter, adapted = train_elsewhere(pruned, tmp_path / "elsewhere", target_modules=targets)
    trained, _ = train_randomly(pruned, tmp_path / "trained", target_modules=targets)
    other = recover(adapter, base, tmp_path / "b", correction=False).output
    ours = recover(trained, base, tmp_path / "a", correction=False).output
    expected, found = load_file(ours / WEIGHTS), load_file(other / WEIGHTS)
    assert expected.keys() == found.keys() and len(expected) > 0
    assert all(torch.equal(found[key], value) for key, value in expected.items())


PREFIX = "base_model.model."
NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".sft.weight"),
    "torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile around PEFT": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('.self_attn', '._fsdp_wrapped_module.self_attn')}"
    ),
    "activation checkpointing": lambda name: name.replace(
        ".mlp.", "._checkpoint_wrapped_module.mlp."
    ),
    "DDP or DeepSpeed": lambda name: f"module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "without PEFT's prefix": lambda name: name.removeprefix(PREFIX),
    "several at once": lambda name: (
        "module._orig_mod."
        + name.removeprefix(PREFIX).replace(".mlp.", "._fsdp_wrapped_module._orig_mod.mlp.")
    ).replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_other_trainers_are_read(kind: str, tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained")
    rename(adapter, NAMES[kind])
    recovered = recover(adapter, base, tmp_path / "recovered").output
    found = logits_of(on_zeroed(base, pruned, recovered), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), **EXACT)
    scored = open_chat(str(pruned), adapter, precision="fp32")  # as chat and evaluate read it
    torch.testing.assert_close(logits_of(scored.model, IDS), logits_of(adapted, IDS), **EXACT)


@pytest.mark.parametrize(
    "targets",
    [
        [f"_orig_mod.model.layers.{layer}.mlp.up_proj" for layer in range(4)],
        r"_orig_mod\.model\.layers\.\d\.mlp\.up_proj",
        "all-linear",
        ["up"],
    ],
)
def test_targets_that_do_not_match_are_replaced_by_the_adapted_modules(
    targets: object, tmp_path: Path
) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained", target_modules=["up_proj"])
    configure(adapter, target_modules=targets)
    recovered = recover(adapter, base, tmp_path / "recovered").output
    found = logits_of(on_zeroed(base, pruned, recovered), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), **EXACT)


def test_the_model_is_the_one_named_or_the_given_one(tmp_path: Path, loram: Command) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained")
    moved = pruned.rename(tmp_path / "moved")
    arguments = ["--adapter", adapter, "--base", base, "--output", tmp_path / "recovered"]
    before = tiny.tree(tmp_path)
    line = loram("recover", *arguments).line
    assert "recover.model must name the pruned model" in line and str(pruned) in line
    assert tiny.tree(tmp_path) == before
    assert loram("recover", *arguments, "--model", moved).code == 0
    found = logits_of(on_zeroed(base, moved, tmp_path / "recovered"), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), **EXACT)


def test_a_copy_of_the_output_head_is_compared_with_the_model_s(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    targets = [*LINEARS, "lm_head"]
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained", target_modules=targets)
    assert any("base_layer" in name for name in load_file(adapter / WEIGHTS))
    recovered = recover(adapter, base, tmp_path / "recovered").output
    found = logits_of(on_zeroed(base, pruned, recovered), IDS)
    torch.testing.assert_close(found, logits_of(adapted, IDS), **EXACT)
    tensors = load_file(adapter / WEIGHTS)
    [copy] = [name for name in tensors if "base_layer" in name]
    tensors[copy][3, 5] += 0.5
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(lr.LoramError, match=r"base_layer.* differs from lm_head.weight"):
        recover(adapter, base, tmp_path / "again")


def _resize_vocabulary(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"{PREFIX}model.embed_tokens.weight"] = torch.zeros(tiny.VOCABULARY + 8, 64)
    save_file(tensors, adapter / WEIGHTS)


def _add_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.scale.weight"] = torch.ones(4)
    save_file(tensors, adapter / WEIGHTS)


def _empty(adapter: Path) -> None:
    tensors = {name: torch.empty(0) for name in load_file(adapter / WEIGHTS)}
    save_file(tensors, adapter / WEIGHTS)


def _two_adapters(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    both = {
        name.replace(".weight", f".{kind}.weight"): tensor.clone()
        for name, tensor in tensors.items()
        for kind in ("default", "reference")
    }
    save_file(both, adapter / WEIGHTS)


def _pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def _drop_half(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / WEIGHTS)


def _rank(adapter: Path) -> None:
    configure(adapter, r=2)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "resized vocabulary": (_resize_vocabulary, "the vocabulary was resized"),
    "ZeRO-3 without gathering": (_empty, "stage3_gather_16bit_weights_on_model_save"),
    "two adapters": (_two_adapters, "belong to 'default', 'reference'; save one"),
    "pickled": (_pickle, "safe_serialization=True"),
    "half of a pair": (_drop_half, "lacks lora_B"),
    "another rank": (_rank, "r of .* must be 4, the rank of its tensors, got 2"),
    "without names": (
        lambda adapter: rename(adapter, lambda name: name.replace("lora_", "adapter_")),
        "must contain tensors named lora_A and lora_B",
    ),
    "another tensor": (
        _add_a_tensor,
        "contains tensor .*q_proj.scale.weight, which is not LoRA's A",
    ),
    "other modules": (
        lambda adapter: rename(adapter, lambda name: name.replace("layers", "blocks")),
        "which the base does not have",
    ),
    "no model": (
        lambda adapter: configure(adapter, base_model_name_or_path=None),
        "recover.model must name the pruned model",
    ),
    "a model elsewhere": (
        lambda adapter: configure(adapter, base_model_name_or_path="/nowhere/aligned"),
        "/nowhere/aligned, which is not a model on this machine",
    ),
    "DoRA": (lambda adapter: configure(adapter, use_dora=True), "use_dora"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_recovered_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[kind]
    base, pruned = make_pruned(tmp_path)
    adapter, _ = train_elsewhere(pruned, tmp_path / "trained")
    spoil(adapter)
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=message) as refusal:
        recover(adapter, base, tmp_path / "parent" / "recovered")
    assert "\n" not in str(refusal.value)
    assert tiny.tree(tmp_path) == before


def test_an_adapter_of_the_base_needs_no_recovery(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, _ = train_elsewhere(base, tmp_path / "trained")
    with pytest.raises(lr.LoramError, match="an adapter trained on the base needs no recovery"):
        recover(adapter, base, tmp_path / "recovered")
    with pytest.raises(lr.LoramError, match="an adapter of the base needs no recovery"):
        recover(adapter, base, tmp_path / "recovered", model=pruned)


def test_another_plan_s_shapes_and_another_base_are_refused(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, _ = train_elsewhere(pruned, tmp_path / "trained")
    config = lr.PruneConfig(
        base=str(base), output=tmp_path / "other", ratio=0.25, layers=(1, 3), seed=2
    )
    other = lr.prune(config).output
    with pytest.raises(lr.LoramError, match=r"for lora_[AB] of model.layers.1.*require 72"):
        recover(adapter, base, tmp_path / "recovered", model=other)
    stranger = tiny.write_base(tmp_path / "stranger", seed=9)
    with pytest.raises(lr.LoramError, match=r"recover.base .* has fingerprint"):
        recover(adapter, stranger, tmp_path / "recovered")


def test_a_quantised_model_s_adapter_is_corrected_as_one_of_loram_train(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    quantised = lr.quantize(
        lr.QuantizeConfig(model=pruned, base=str(base), output=tmp_path / "nf4")
    ).output
    trained, adapted = train_randomly(quantised, tmp_path / "trained")
    adapted.save_pretrained(tmp_path / "elsewhere")
    ours = recover(trained, base, tmp_path / "a", correction=True)
    other = recover(tmp_path / "elsewhere", base, tmp_path / "b")  # corrected by default
    assert other.manifest.settings == ours.manifest.settings
    assert other.manifest.details["correction_norm"] > 0
    expected, found = load_file(ours.output / WEIGHTS), load_file(other.output / WEIGHTS)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    plain = load_file(recover(trained, base, tmp_path / "c", correction=False).output / WEIGHTS)
    assert any(not torch.equal(found[key], value) for key, value in plain.items())


def test_an_adapter_trained_without_masks_fits_the_base_as_it_is(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", seed=4)
    pruned = masked.prune(base, tmp_path / "pruned")
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained")
    expected = logits_of(adapted, IDS)
    scored = open_chat(str(pruned), adapter, precision="fp32")  # evaluate reads it this way
    torch.testing.assert_close(logits_of(scored.model, IDS), expected, **EXACT)
    recovered = recover(adapter, base, tmp_path / "recovered").output
    on_pruned = peft.PeftModel.from_pretrained(load_model(pruned, "fp32"), recovered)
    torch.testing.assert_close(logits_of(on_pruned, IDS), expected, **EXACT)
    with pytest.raises(lr.LoramError, match="another trainer trained without the masks"):
        recover(adapter, base, tmp_path / "delta", form="delta")


def test_merge_and_evaluate_take_the_recovered_adapter(tmp_path: Path, loram: Command) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, adapted = train_elsewhere(pruned, tmp_path / "trained")
    recovered = recover(adapter, base, tmp_path / "recovered").output
    merged = lr.merge(
        lr.MergeConfig(base=str(base), adapter=recovered, output=tmp_path / "merged")
    ).output
    expected = logits_of(peft.PeftModel.from_pretrained(load_model(base, "fp32"), recovered), IDS)
    torch.testing.assert_close(logits_of(load_model(merged, "fp32"), IDS), expected, **EXACT)
    line = loram("merge", "--base", base, "--adapter", adapter, "--output", tmp_path / "no").line
    assert "run loram recover first" in line


def test_a_chat_template_saved_beside_the_adapter_goes_with_it(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    adapter, _ = train_elsewhere(pruned, tmp_path / "trained")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    recovered = recover(adapter, base, tmp_path / "recovered").output
    assert (recovered / "chat_template.jinja").read_text() == "{{ messages }}"


def test_an_incomplete_copy_of_loram_train_s_directory_is_not_taken_for_another_trainer_s(
    tmp_path: Path,
) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(pruned, tmp_path / "trained")
    (trained / "manifest.json").unlink()
    with pytest.raises(lr.LoramError, match="no manifest.json; copy the whole directory again"):
        recover(trained, base, tmp_path / "recovered")
    shutil.copy(pruned / "manifest.json", trained)
    with pytest.raises(lr.LoramError, match="contains the output of prune"):
        recover(trained, base, tmp_path / "recovered")


def batch_of(
    model: Path, base: Path | None, output: Path, *tasks: dict[str, object]
) -> lr.BatchConfig:
    settings = {"model": model, "output": output, "tasks": tasks, "base": base and str(base)}
    return lr.BatchConfig.model_validate(settings)


@pytest.mark.usefixtures("embedded_ray")
def test_a_batch_recovers_adapters_of_other_trainers(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    for number in range(2):
        train_elsewhere(pruned, tmp_path / f"trained/a{number}", seed=number)
    (tmp_path / "trained/a2").mkdir()
    config = batch_of(pruned, base, tmp_path / "out", {"adapter": f"{tmp_path}/trained/*"})
    result = lr.batch(config)
    assert [(row["name"], row["state"]) for row in result.rows] == [
        ("a0", "done"), ("a1", "done"), ("a2", "failed")
    ]  # fmt: skip
    assert "does not contain adapter_config.json" in result.rows[2]["reason"]
    for number in range(2):
        alone = recover(tmp_path / f"trained/a{number}", base, tmp_path / f"alone{number}").output
        expected, found = (
            load_file(directory / WEIGHTS)
            for directory in (alone, Path(result.rows[number]["adapter"]))
        )
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_batch_refuses_adapters_that_it_cannot_recover(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    task = {"adapter": str(tmp_path / "trained")}
    with pytest.raises(ValidationError, match="data or adapter must be given, got neither"):
        batch_of(pruned, base, tmp_path / "out", {"name": "a"})
    with pytest.raises(ValidationError, match="seed must be left out with adapter"):
        batch_of(pruned, base, tmp_path / "out", {**task, "seed": 3})
    with pytest.raises(lr.LoramError, match="batch.base must be given for batch.tasks.0.adapter"):
        lr.batch(batch_of(pruned, None, tmp_path / "out", task))
    with pytest.raises(lr.LoramError, match="batch.model must be a pruned model"):
        lr.batch(batch_of(base, base, tmp_path / "out", task))
    with pytest.raises(lr.LoramError, match="adapter must match at least one directory"):
        lr.batch(batch_of(pruned, base, tmp_path / "out", {"adapter": f"{tmp_path}/x*"}))
    assert not (tmp_path / "out").exists()
