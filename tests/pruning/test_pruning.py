"""The prune stage against slices of the base and against the base with zeroed positions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loram_ray as lr
from helpers import tiny
from helpers.adapters import logits_of, run_python, token_ids, zero_pruned
from loram_ray.models.loading import load_model
from loram_ray.plan import PruningPlan

IDS = token_ids(tiny.VOCABULARY)
BASES: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha": {"heads": 6, "kv_heads": 6, "hidden": 48},
    "one kv head kept of two": {"heads": 6, "kv_heads": 2, "hidden": 36, "layers": 3},
    "biases": {"bias": True},
    "mha, biases": {"heads": 4, "kv_heads": 4, "bias": True},
    "tied": {"tied": True},
    "bf16": {"dtype": torch.bfloat16},
    "many shards": {"max_shard_size": "40KB"},
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory, read by the safetensors library."""
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def prune(base: Path, output: Path, **settings: object) -> Path:
    settings = {"ratio": 0.5, "layers": (1, 3), "seed": 1, **settings}
    return lr.prune(lr.PruneConfig(base=str(base), output=output, **settings)).output


@pytest.fixture(params=list(BASES))
def any_base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base", seed=3, **BASES[request.param])


def brute_force(base: dict[str, torch.Tensor], plan: PruningPlan) -> dict[str, torch.Tensor]:
    """What is left of the base, row by row and column by column."""
    sizes = plan.geometry
    dim, group = sizes.head_dim, sizes.num_heads // sizes.num_kv_heads
    left = dict(base)
    for layer, units in plan.layers.items():
        heads, neurons = units.kv_heads.tolist(), units.neurons.tolist()
        keys = [head * dim + i for head in heads for i in range(dim)]
        queries = [
            (h * group + q) * dim + i for h in heads for q in range(group) for i in range(dim)
        ]
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        rows |= {"gate_proj": neurons, "up_proj": neurons}
        columns = {"o_proj": queries, "down_proj": neurons}
        for name, tensor in base.items():
            if not name.startswith(f"model.layers.{layer}."):
                continue
            module, kind = name.split(".")[-2:]
            if module in rows:
                left[name] = torch.stack([tensor[i] for i in rows[module]])
            elif module in columns and kind == "weight":
                left[name] = torch.stack([tensor[:, i] for i in columns[module]], dim=1)
    return left


@pytest.mark.parametrize("max_shard_bytes", [30_000, 5 * 10**9])
def test_every_tensor_is_the_slice_of_the_base(
    any_base: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    pruned = prune(any_base, tmp_path / "pruned", max_shard_bytes=max_shard_bytes)
    plan = PruningPlan.load(pruned)
    base, found = weights(any_base), weights(pruned)
    expected = brute_force(base, plan)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, expected[name]), name
    cut = [name for name in found if found[name].shape != base[name].shape]
    assert {name.split(".")[2] for name in cut} == {"1", "2"}
    assert len([name for name in cut if name.endswith("weight")]) == 14
    assert (len(list(pruned.glob("model*.safetensors"))) > 1) == (max_shard_bytes == 30_000)


def test_logits_are_the_base_s_with_the_pruned_positions_zeroed(
    any_base: Path, tmp_path: Path
) -> None:
    pruned = prune(any_base, tmp_path / "pruned")
    model, whole = load_model(pruned, "fp32"), load_model(any_base, "fp32")
    untouched = logits_of(whole, IDS)
    zeroed = zero_pruned(whole, PruningPlan.load(pruned))
    expected = logits_of(zeroed, IDS)
    assert (expected - untouched).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(model, IDS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_zeroed_base_s(any_base: Path, tmp_path: Path, cache: str) -> None:
    pruned = prune(any_base, tmp_path / "pruned")
    model, whole = load_model(pruned, "fp32"), load_model(any_base, "fp32")
    zeroed = zero_pruned(whole, PruningPlan.load(pruned))
    settings = {
        "max_new_tokens": 10,
        "min_new_tokens": 10,
        "do_sample": False,
        "cache_implementation": cache,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    mask = torch.ones_like(IDS)
    found = model.generate(IDS, attention_mask=mask, **settings)
    expected = zeroed.generate(IDS, attention_mask=mask, **settings)
    assert found.sequences.shape == (2, 22)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5
    )


def test_ratio_zero_is_the_base_bit_for_bit(any_base: Path, tmp_path: Path) -> None:
    pruned = prune(any_base, tmp_path / "pruned", ratio=0.0)
    base, found = weights(any_base), weights(pruned)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)
    for precision in ("fp32", "bf16"):
        expected = logits_of(load_model(any_base, precision), IDS)
        assert torch.equal(logits_of(load_model(pruned, precision), IDS), expected)


def test_a_tied_model_stays_tied_and_biases_stay(tmp_path: Path) -> None:
    tied = prune(tiny.write_base(tmp_path / "a", tied=True), tmp_path / "tied")
    model = load_model(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in weights(tied)
    biased = prune(tiny.write_base(tmp_path / "b", bias=True), tmp_path / "biased")
    layer = load_model(biased).model.layers[1]
    assert layer.self_attn.q_proj.bias.shape == (32,)
    assert layer.self_attn.k_proj.bias.shape == (16,)
    assert layer.self_attn.o_proj.bias.shape == (64,)
    assert layer.mlp.up_proj.bias.shape == (48,)


def test_the_same_config_and_seed_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    first, again = prune(base, tmp_path / "a"), prune(base, tmp_path / "b")
    names = [path.name for path in first.iterdir() if path.name != "manifest.json"]
    assert "pruning_plan.safetensors" in names and "tokenizer.json" in names
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    other = prune(base, tmp_path / "c", seed=2)
    assert PruningPlan.load(other).digest != PruningPlan.load(first).digest


def test_the_same_config_twice_is_skipped_and_another_is_refused(
    base: Path, tmp_path: Path
) -> None:
    config = lr.PruneConfig(base=str(base), output=tmp_path / "out", ratio=0.5, layers=(1, 3))
    first = lr.prune(config)
    before = tiny.tree(tmp_path)
    again = lr.prune(config)
    assert (first.skipped, again.skipped) == (False, True)
    assert again.manifest == first.manifest
    with pytest.raises(lr.LoramError, match="prune.output must be a new or empty directory"):
        lr.prune(config.model_copy(update={"seed": 9}))
    assert tiny.tree(tmp_path) == before


def test_the_manifest_counts_what_is_there(base: Path, tmp_path: Path) -> None:
    config = lr.PruneConfig(base=str(base), output=tmp_path / "out", ratio=0.5, layers=(1, 3))
    manifest = lr.prune(config).manifest
    assert manifest.details["base_parameters"] == sum(t.numel() for t in weights(base).values())
    assert manifest.details["parameters"] == sum(
        t.numel() for t in weights(tmp_path / "out").values()
    )
    assert set(manifest.files) | {"manifest.json"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }


def _edit_config(base: Path, **changes: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _truncate(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 5)


def _rename_a_tensor(base: Path) -> None:
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        held = {
            k.replace("2.mlp.up_proj.weight", "2.mlp.up_proj.qweight"): v for k, v in held.items()
        }
        save_file(held, file)


def _refuse_nothing(base: Path) -> None:
    pass


REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "unsupported family": (
        lambda base: _edit_config(base, model_type="gpt2"),
        {},
        r"model_type must be one of \[.*llama.*\], got 'gpt2'",
    ),
    "no family": (
        lambda base: _edit_config(base, model_type=None),
        {},
        "config.json: model_type must be a valid string, got None",
    ),
    "no config": (lambda base: (base / "config.json").unlink(), {}, "contains no config.json"),
    "broken config": (lambda base: (base / "config.json").write_text("{"), {}, "not valid JSON"),
    "config without sizes": (
        lambda base: (base / "config.json").write_text('{"model_type": "llama"}'),
        {},
        r"config.json: hidden_size must be given",
    ),
    "quantised": (
        lambda base: _edit_config(base, quantization_config={"quant_method": "gptq"}),
        {},
        "full precision",
    ),
    "no neuron left": (_refuse_nothing, {"ratio": 0.99}, "prune.ratio must keep"),
    "layers beyond the model": (_refuse_nothing, {"layers": (1, 5)}, r"prune.layers .* 4 "),
    "no layers": (_refuse_nothing, {"layers": (2, 2)}, "prune.layers"),
    "default layers of a shallow model": (_refuse_nothing, {"layers": None}, "prune.layers"),
    "truncated shard": (_truncate, {}, r"model.safetensors is not a valid"),
    "no weights": (
        lambda base: (base / "model.safetensors").unlink(),
        {},
        "contains neither model",
    ),
    "another size than its config says": (
        lambda base: _edit_config(base, intermediate_size=95),
        {},
        r"mlp.gate_proj.weight of shape \(96, 64\), but its config.json requires \(95, 64\)",
    ),
    "more layers than tensors": (
        lambda base: _edit_config(base, num_hidden_layers=6),
        {"layers": (1, 5)},
        r"lacks tensor model.layers.4.self_attn.q_proj.weight \(64, 64\) and 17 more",
    ),
    "a tensor of another name": (
        _rename_a_tensor,
        {},
        r"lacks tensor model.layers.2.mlp.up_proj.weight \(96, 64\), which",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_write_nothing(base: Path, tmp_path: Path, case: str) -> None:
    spoil, settings, message = REFUSALS[case]
    spoilt = Path(shutil.copytree(base, tmp_path / "base"))
    spoil(spoilt)
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=message):
        prune(spoilt, tmp_path / "parent" / "pruned", **settings)
    assert tiny.tree(tmp_path) == before


def test_a_ratio_that_leaves_no_kv_head_is_refused(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", heads=4, kv_heads=4, intermediate=200)
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=r"one of 4 KV heads .* keeps 0 and 40"):
        prune(base, tmp_path / "pruned", ratio=0.8)
    assert tiny.tree(tmp_path) == before


def test_a_pruned_model_is_not_pruned_again(base: Path, tmp_path: Path) -> None:
    for ratio in (0.0, 0.5):
        pruned = prune(base, tmp_path / f"pruned {ratio}", ratio=ratio)
        before = tiny.tree(tmp_path)
        with pytest.raises(lr.LoramError, match="must be a model that is not pruned"):
            prune(pruned, tmp_path / "again")
        assert tiny.tree(tmp_path) == before


def test_an_output_that_holds_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    occupied, file = tmp_path / "occupied", tmp_path / "file"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    file.write_text("mine")
    before = tiny.tree(tmp_path)
    for output in (occupied, file, base):
        with pytest.raises(lr.LoramError, match="prune.output must be a new or empty directory"):
            prune(base, output)
    assert tiny.tree(tmp_path) == before


def test_an_empty_output_directory_is_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    prune(base, tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    load_model(tmp_path / "empty")


def test_memory_of_pruning_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", layers=16, hidden=256, intermediate=4096)
    model_bytes = (base / "model.safetensors").stat().st_size
    tensor_bytes = 256 * 4096 * 4
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    prune(base, tmp_path / "pruned", layers=(1, 15), ratio=0.25)
    assert model_bytes > 48 * tensor_bytes
    assert _status("VmHWM") - before < 8 * tensor_bytes


def _status(key: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


REMOTE_CODE = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ids = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError:
        pass
    else:
        raise AssertionError("a pruned model is no stock model")
    assert AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("x").input_ids
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        torch.save(model(ids).logits, directory + "/logits.pt")
assert not any(name.partition(".")[0] == "loram_ray" for name in sys.modules)
"""


def test_plain_transformers_loads_pruned_models_where_loram_ray_is_not_installed(
    base: Path, tmp_path: Path
) -> None:
    tied = tiny.write_base(tmp_path / "tied", tied=True, bias=True)
    pruned = [
        prune(base, tmp_path / "pruned", max_shard_bytes=50_000),
        prune(tied, tmp_path / "pruned_tied"),
        prune(base, tmp_path / "whole", ratio=0.0),
    ]
    torch.save(IDS, tmp_path / "ids.pt")
    run_python(REMOTE_CODE, tmp_path, tmp_path / "ids.pt", *pruned, with_loram_ray=False)
    for directory in pruned:
        found = torch.load(directory / "logits.pt")
        assert torch.equal(found, logits_of(load_model(directory, "fp32"), IDS))


LOAD = """
import torch
ids = torch.load(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
assert type(model).__module__ == "loram_ray.models.modeling_pruned", type(model)
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""
ORDERS = {
    "loram_ray first": """
import sys, loram_ray
from loram_ray.stages import align, evaluate, merge, prune, train
assert "transformers" not in sys.modules and "ray" not in sys.modules
from loram_ray.models.tokenizer import load_tokenizer
load_tokenizer(sys.argv[2])
assert "transformers.modeling_utils" not in sys.modules  # which takes seconds to import
from transformers import AutoModelForCausalLM
""",
    "loram_ray after transformers was used": """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[4])
import loram_ray
""",
    "loram_ray first, then the modelling code of the family": """
import sys, loram_ray
import transformers.models.llama.modeling_llama
import transformers.models.auto.configuration_auto
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_loram_ray_is_enough_to_load_a_pruned_model(
    base: Path, tmp_path: Path, order: str
) -> None:
    pruned, result = prune(base, tmp_path / "pruned"), tmp_path / "logits.pt"
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [tmp_path / "ids.pt", pruned, result, base]
    run_python(ORDERS[order] + LOAD, tmp_path, *arguments, with_loram_ray=True)
    assert torch.equal(torch.load(result), logits_of(load_model(pruned, "fp32"), IDS))
