"""Recovery: the pruned model with its adapter equals the zeroed base with the recovered one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

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
    zero_pruned,
)
from helpers.recovery_cases import CASES, PREFIX, kept_of, make_pruned
from loram_ray.models.loading import load_model
from loram_ray.plan import KeptIndices, PruningPlan
from loram_ray.recovery.scatter import recover_tensor

IDS = token_ids(tiny.VOCABULARY)


def recover(adapter: Path, base: Path, output: Path) -> Path:
    config = lr.RecoverConfig(adapter=adapter, base=str(base), output=output)
    return lr.recover(config).output


def on_zeroed(base: Path, plan: PruningPlan, adapter: Path) -> peft.PeftModel:
    """The base with the pruned positions zeroed and an adapter, put on by PEFT alone."""
    zeroed = zero_pruned(load_model(base, "fp32"), plan)
    return peft.PeftModel.from_pretrained(zeroed, adapter)


def selection(index: list[int], size: int) -> torch.Tensor:
    """The matrix ``[kept, size]`` that picks the kept of ``size`` entries."""
    matrix = torch.zeros(len(index), size)
    for row, column in enumerate(index):
        matrix[row, column] = 1
    return matrix


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    sizes, settings = CASES[request.param]
    base, pruned = make_pruned(tmp_path, **sizes)
    trained, adapted = train_randomly(pruned, tmp_path / "trained", seed=5, **settings)
    recovered = recover(trained, base, tmp_path / "recovered")
    return {
        "base": base,
        "pruned": pruned,
        "adapted": adapted,
        "trained": trained,
        "recovered": recovered,
        "plan": PruningPlan.load(pruned),
    }


def test_recovery_is_exact_on_the_base_with_zeroed_positions(case: dict) -> None:
    found = logits_of(on_zeroed(case["base"], case["plan"], case["recovered"]), IDS)
    expected = logits_of(case["adapted"], IDS)
    without = logits_of(load_model(case["pruned"], "fp32"), IDS)
    assert (expected - without).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_change_of_each_weight_is_the_scattered_change_and_zero_elsewhere(case: dict) -> None:
    small = load_file(case["trained"] / "adapter_model.safetensors")
    full = load_file(case["recovered"] / "adapter_model.safetensors")
    shapes = {
        name.removesuffix(".weight"): module.weight.shape
        for name, module in load_model(case["base"], "fp32").named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert full.keys() == small.keys()
    scattered = 0
    for name in [name for name in full if "lora_A" in name]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = small[name], small[name.replace("lora_A", "lora_B")]
        full_a, full_b = full[name], full[name.replace("lora_A", "lora_B")]
        assert (full_b.shape[0], full_a.shape[1]) == shapes[module]
        rows, columns = kept_of(module, case["plan"])
        change = b @ a
        if rows is not None:
            outside = [i for i in range(full_b.shape[0]) if i not in set(rows)]
            assert outside and not full_b[outside].any()
            assert torch.equal(full_b[rows], b) and torch.equal(full_a, a)
            change = selection(rows, full_b.shape[0]).T @ change
            scattered += 1
        if columns is not None:
            outside = [i for i in range(full_a.shape[1]) if i not in set(columns)]
            assert outside and not full_a[:, outside].any()
            assert torch.equal(full_a[:, columns], a) and torch.equal(full_b, b)
            change = change @ selection(columns, full_a.shape[1])
            scattered += 1
        if rows is None and columns is None:
            assert torch.equal(full_a, a) and torch.equal(full_b, b)
        torch.testing.assert_close(full_b @ full_a, change, rtol=1e-6, atol=1e-6)
    assert scattered > 0


def test_the_recovered_configuration_is_the_trained_one_for_the_base(case: dict) -> None:
    trained, recovered = (
        json.loads((case[stage] / "adapter_config.json").read_text())
        for stage in ("trained", "recovered")
    )
    assert recovered.pop("base_model_name_or_path") == str(case["base"])
    trained.pop("base_model_name_or_path")
    assert recovered == trained
    assert sorted(path.name for path in case["recovered"].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovery_is_exact_at_any_ratio_and_keeps_the_dtype(
    tmp_path: Path, ratio: float, dtype: torch.dtype
) -> None:
    base, pruned = make_pruned(tmp_path, ratio=ratio)
    adapted = with_random_adapter(load_model(pruned, "fp32"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    trained = write_trained(pruned, adapted, tmp_path / "trained").output
    recovered = recover(trained, base, tmp_path / "recovered")
    stored = load_file(recovered / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    found = on_zeroed(base, PruningPlan.load(pruned), recovered)
    expected = logits_of(adapted.float(), IDS)
    torch.testing.assert_close(logits_of(found.float(), IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_matrix_is_scattered_on_the_pruned_side_only(axis: int) -> None:
    kept = KeptIndices(axis, torch.tensor([1, 4, 5]), 7)
    side, other = ("B", "A") if axis == 0 else ("A", "B")
    matrix = torch.arange(1.0, 7.0).reshape((3, 2) if axis == 0 else (2, 3))
    full = recover_tensor(matrix, side, kept)
    expected = torch.zeros((7, 2) if axis == 0 else (2, 7))
    for position, index in enumerate([1, 4, 5]):
        expected.select(axis, index).copy_(matrix.select(axis, position))
    assert torch.equal(full, expected)
    assert recover_tensor(matrix, other, kept) is matrix
    assert recover_tensor(matrix, side, None) is matrix


PLAIN_PEFT = """
import peft, torch
from transformers import AutoModelForCausalLM

base, adapter, ids, result = sys.argv[1:]
ids = torch.load(ids)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter)
by_name = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
with torch.no_grad():
    torch.save([model(input_ids=ids).logits, by_name(input_ids=ids).logits], result)
assert not any(name.partition(".")[0] == "loram_ray" for name in sys.modules)
"""


def test_plain_peft_loads_a_recovered_adapter_where_loram_ray_is_not_installed(
    tmp_path: Path,
) -> None:
    base, pruned = make_pruned(tmp_path)
    targets = [*LINEARS, "lm_head"]
    trained, _ = train_randomly(pruned, tmp_path / "trained", target_modules=targets)
    recovered = recover(trained, base, tmp_path / "recovered")
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [base, recovered, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    run_python(PLAIN_PEFT, tmp_path, *arguments, with_loram_ray=False)

    # Ours: each weight of the base plus alpha / r times the scattered product.
    model = load_model(base, "fp32")
    expected_plain = logits_of(model, IDS)
    tensors = load_file(recovered / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" in name:
                module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                model.get_submodule(module).weight += 8 / 4 * (b @ a)
    expected = logits_of(model, IDS)
    assert (expected - expected_plain).abs().max() > 1e-2
    for found in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recovering_twice_is_skipped_and_an_occupied_output_is_refused(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(pruned, tmp_path / "trained")
    config = lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "recovered")
    assert not lr.recover(config).skipped
    before = tiny.tree(tmp_path)
    assert lr.recover(config).skipped
    with pytest.raises(lr.LoramError, match="recover.output must be a new or empty directory"):
        recover(trained, base, pruned)
    assert tiny.tree(tmp_path) == before


def one_value_changed(base: Path, target: Path) -> Path:
    """A copy of a base that differs in one value of one weight."""
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.post_attention_layernorm.weight"][17] += 2**-20
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["one value", "another seed", "another config", "pruned"])
def test_another_base_is_refused_and_nothing_written(tmp_path: Path, kind: str) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(pruned, tmp_path / "trained")
    if kind == "one value":
        other = one_value_changed(base, tmp_path / "other")
    elif kind == "another seed":
        other = tiny.write_base(tmp_path / "other", seed=5)
    elif kind == "another config":
        other = Path(shutil.copytree(base, tmp_path / "other"))
        config = json.loads((other / "config.json").read_text())
        config["rms_norm_eps"] = 1e-5
        (other / "config.json").write_text(json.dumps(config))
    else:
        other = pruned
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=r"recover.base .* has fingerprint"):
        recover(trained, other, tmp_path / "parent" / "recovered")
    assert tiny.tree(tmp_path) == before


def test_a_copy_of_the_base_elsewhere_is_the_same_base(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(pruned, tmp_path / "trained")
    tensors = load_file(base / "model.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    # Sharded otherwise, and written by another version.
    names = sorted(tensors, reverse=True)
    for i, part in enumerate([names[:9], names[9:]]):
        save_file({name: tensors[name] for name in part}, copy / f"{i}.safetensors")
    index = {name: f"{int(i >= 9)}.safetensors" for i, name in enumerate(names)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((base / "config.json").read_text())
    config |= {"transformers_version": "5.0.0", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config))
    found = load_file(recover(trained, copy, tmp_path / "a") / "adapter_model.safetensors")
    expected = load_file(recover(trained, base, tmp_path / "b") / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _replace_plan(trained: Path, tmp_path: Path, base: Path) -> None:
    config = lr.PruneConfig(
        base=str(base), output=tmp_path / "other", ratio=0.5, layers=(1, 3), seed=99
    )
    shutil.copy(lr.prune(config).output / "pruning_plan.safetensors", trained)


def _cut(name: str) -> Callable[[Path, Path, Path], None]:
    def spoil(trained: Path, tmp_path: Path, base: Path) -> None:
        (trained / name).write_bytes((trained / name).read_bytes()[:-3])

    return spoil


def _remove(name: str) -> Callable[[Path, Path, Path], None]:
    return lambda trained, tmp_path, base: (trained / name).unlink()


def _change_a_weight(trained: Path, tmp_path: Path, base: Path) -> None:
    content = bytearray((trained / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (trained / "adapter_model.safetensors").write_bytes(content)


SPOILT = {
    "plan replaced": (
        _replace_plan,
        r"pruning_plan.safetensors does not match the SHA-256 in its manifest",
    ),
    "plan cut": (_cut("pruning_plan.safetensors"), r"pruning_plan.safetensors has \d+ bytes"),
    "plan removed": (_remove("pruning_plan.safetensors"), "pruning_plan.safetensors is missing"),
    "weights cut": (_cut("adapter_model.safetensors"), r"adapter_model.safetensors has \d+ bytes"),
    "a bit of the weights changed": (
        _change_a_weight,
        "adapter_model.safetensors does not match the SHA-256",
    ),
    "configuration removed": (_remove("adapter_config.json"), "adapter_config.json is missing"),
    "manifest removed": (_remove("manifest.json"), "but no manifest.json; copy the whole"),
    "manifest cut": (_cut("manifest.json"), "is not a manifest"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_adapter_is_refused_and_nothing_written(tmp_path: Path, kind: str) -> None:
    spoil, message = SPOILT[kind]
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(pruned, tmp_path / "trained")
    spoil(trained, tmp_path, base)
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=message):
        recover(trained, base, tmp_path / "parent" / "recovered")
    assert tiny.tree(tmp_path) == before


def test_an_adapter_under_another_plan_s_shapes_is_refused(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    adapted = with_random_adapter(load_model(pruned, "fp32"))
    config = lr.PruneConfig(
        base=str(base), output=tmp_path / "other", ratio=0.25, layers=(1, 3), seed=2
    )
    mixed = write_trained(lr.prune(config).output, adapted, tmp_path / "mixed").output
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=r"for lora_[AB] of model.layers.1.*require 72"):
        recover(mixed, base, tmp_path / "recovered")
    assert tiny.tree(tmp_path) == before


def test_an_adapter_of_the_base_itself_has_no_plan_to_recover_by(tmp_path: Path) -> None:
    base, pruned = make_pruned(tmp_path)
    trained, _ = train_randomly(base, tmp_path / "trained")
    with pytest.raises(lr.LoramError, match=r"contains no pruning_plan.safetensors"):
        recover(trained, base, tmp_path / "recovered")
    with pytest.raises(lr.LoramError, match=r"recover.adapter must be .* the output of prune"):
        recover(pruned, base, tmp_path / "recovered")


OTHER_METHODS: dict[str, dict[str, object]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "bias = all": {"bias": "all"},
    "bias = lora_only": {"bias": "lora_only"},
    "init_lora_weights = pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights = pissa_niter_2": {"init_lora_weights": "pissa_niter_2"},
    "init_lora_weights = olora": {"init_lora_weights": "OLoRA"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 4], [2, 4]]},
    "kasa_config": {"kasa_config": peft.KasaConfig()},
    "target_parameters": {
        "target_parameters": ["mlp.up_proj.weight"],
        "target_modules": ["q_proj"],
    },
    "lora_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_what_is_no_plain_lora_is_refused_and_nothing_written(tmp_path: Path, method: str) -> None:
    base, pruned = make_pruned(tmp_path, bias=True)
    trained, _ = train_randomly(pruned, tmp_path / "trained", **OTHER_METHODS[method])
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=rf"(?i){method}"):
        recover(trained, base, tmp_path / "recovered")
    assert tiny.tree(tmp_path) == before


# Methods that need data, a GPU or other layers to be trained: what their configuration says.
OTHER_CONFIGURATIONS: dict[str, dict[str, object]] = {
    "init_lora_weights = corda": {"init_lora_weights": "corda"},
    "init_lora_weights = loftq": {"init_lora_weights": "loftq"},
    "init_lora_weights = lora_ga": {"init_lora_weights": "lora_ga"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "megatron_config": {"megatron_config": {"tensor_parallel_size": 2}},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "peft_type is LOHA": {"peft_type": "LOHA"},
}


@pytest.mark.parametrize("method", OTHER_CONFIGURATIONS)
def test_configurations_of_other_methods_are_refused(tmp_path: Path, method: str) -> None:
    base, pruned = make_pruned(tmp_path)
    adapted = with_random_adapter(load_model(pruned, "fp32"))
    for setting, value in OTHER_CONFIGURATIONS[method].items():
        setattr(adapted.peft_config["default"], setting, value)
    trained = write_trained(pruned, adapted, tmp_path / "trained").output
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=method):
        recover(trained, base, tmp_path / "recovered")
    assert tiny.tree(tmp_path) == before
