"""Model directories against their config.json: names, shapes, finiteness, and what is beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loram_ray as lr
from helpers import families, tiny
from helpers.adapters import logits_of, token_ids
from loram_ray.alignment.deepspeed_config import load_partitioned
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.evaluation.scoring import with_adapter
from loram_ray.models.loading import load_model
from loram_ray.models.tensors import expected_shapes
from loram_ray.models.weights import ModelCheckpoint

IDS = token_ids(tiny.VOCABULARY)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in families.FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in ("llama", "mistral", "qwen3_moe")),
    ("gemma2", {"tie_word_embeddings": False}),
    *(
        (family, {"attention_bias": True})
        for family in ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "qwen3_moe")
    ),
    ("llama", {"mlp_bias": True, "num_key_value_heads": None}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("phi3", {"num_key_value_heads": 8}),
]


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite a directory's single file after a change of its tensors."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    return directory


def change_config(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v != "gone"}))
    return directory


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_tensors_that_a_config_describes_are_those_that_transformers_saves(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = families.write_base(tmp_path / "base", family, **changes)
    saved = {n: tuple(t.shape) for n, t in load_file(base / "model.safetensors").items()}
    assert expected_shapes(read_model_config(base)) == saved


@pytest.mark.parametrize("family", families.FAMILIES)
def test_keys_that_a_config_leaves_out_are_the_class_s_own(family: str) -> None:
    """Llama 1 says no number of KV heads, Gemma not that its head is tied."""
    from transformers import AutoConfig

    left_out = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias")
    sizes = {**families._SIZES, **families.FAMILIES[family], "num_attention_heads": 32}
    sizes = {k: v for k, v in sizes.items() if k not in left_out} | {"hidden_size": 128}
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stock = {n: tuple(p.shape) for n, p in model.named_parameters()}
    found = expected_shapes({"model_type": family, **sizes})
    fused = (".experts.", "block_sparse_moe", ".mlp.gate.weight")  # other names on disk
    assert {n: s for n, s in found.items() if not any(part in n for part in fused)} == {
        n: s for n, s in stock.items() if not any(part in n for part in fused)
    }


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_we_write_of_each_family_is_opened(family: str, tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", family)
    pruned = lr.prune(
        lr.PruneConfig(base=str(base), output=tmp_path / "p", ratio=0.5, layers=(1, 3))
    ).output
    quantized = lr.quantize(
        lr.QuantizeConfig(base=str(base), model=pruned, output=tmp_path / "q")
    ).output
    for directory in (base, pruned, quantized):
        with ModelCheckpoint(directory) as checkpoint:
            assert checkpoint.family.model_type == family
    assert logits_of(load_model(quantized, "fp32"), IDS).isfinite().all()


def _without(*names: str) -> Callable[[Path], Path]:
    return lambda base: change_tensors(base, lambda t: [t.pop(n) for n in names] and None)


def _with(name: str, tensor: torch.Tensor) -> Callable[[Path], Path]:
    return lambda base: change_tensors(base, lambda t: t.update({name: tensor}))


def _remove_a_shard(base: Path) -> Path:
    tiny.write_base(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    sorted(base.glob("model-*.safetensors"))[1].unlink()
    return base


def _promise_too_much(base: Path) -> Path:
    tiny.write_base(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"]["model.layers.0.self_attn.q_proj.bias"] = sorted(
        said["weight_map"].values()
    )[0]
    index.write_text(json.dumps(said))
    return base


def _store_twice(base: Path) -> Path:
    tiny.write_base(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    last = sorted(base.glob("model-*.safetensors"))[-1]
    save_file({**load_file(last), "model.embed_tokens.weight": torch.zeros(259, 64)}, last)
    return base


DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no head": (_without("lm_head.weight"), r"lacks tensor lm_head.weight \(259, 64\), which its"),
    "no norms": (
        _without("model.norm.weight", "model.layers.2.input_layernorm.weight"),
        r"lacks tensor model.norm.weight \(64,\) and 1 more",
    ),
    "no projection": (
        _without("model.layers.3.self_attn.k_proj.weight"),
        r"lacks tensor model.layers.3.self_attn.k_proj.weight \(32, 64\)",
    ),
    "no embeddings": (_without("model.embed_tokens.weight"), "lacks tensor model.embed_tokens"),
    "a projection turned": (
        _with("model.layers.0.mlp.up_proj.weight", torch.ones(64, 96)),
        r"up_proj.weight of shape \(64, 96\), but its config.json requires \(96, 64\)",
    ),
    "a norm with a row": (
        _with("model.norm.weight", torch.ones(1, 64)),
        r"\(1, 64\), but its",
    ),
    "integers": (
        _with("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        "weights must be floating point",
    ),
    "a bias that config.json does not say": (
        _with("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
        "has tensor model.layers.0.self_attn.q_proj.bias",
    ),
    "more layers said": (
        lambda b: change_config(b, num_hidden_layers=5),
        "lacks tensor .*layers.4",
    ),
    "fewer layers said": (lambda b: change_config(b, num_hidden_layers=3), "has tensor .*rs.3"),
    "biases said": (
        lambda b: change_config(b, attention_bias=True),
        r"lacks tensor model.layers.0.self_attn.q_proj.bias \(64,\) and 15 more",
    ),
    "other heads": (
        lambda b: change_config(b, num_key_value_heads=2),
        r"k_proj.*\(32, 64\), but",
    ),
    "heads that KV heads do not divide": (
        lambda b: change_config(b, num_key_value_heads=3),
        "must be a multiple of num_key_value_heads = 3",
    ),
    "another head size": (
        lambda b: change_config(b, head_dim=16),
        r"q_proj.weight of .*\(64, 64\)",
    ),
    "another vocabulary": (
        lambda b: change_config(b, vocab_size=300),
        "embed_tokens.*res .300",
    ),
    "a vocabulary in words": (
        lambda b: change_config(b, vocab_size="259"),
        "vocab_size must be a valid integer",
    ),
    "layers that are no number": (
        lambda b: change_config(b, num_hidden_layers=True),
        "num_hidden_layers must be a valid integer",
    ),
    "no hidden size": (lambda b: change_config(b, hidden_size="gone"), "hidden_size must be given"),
    "weights in another file": (
        lambda b: change_config(b, transformers_weights="other.safetensors"),
        "transformers_weights in .* must not be set",
    ),
    "a missing shard": (_remove_a_shard, "model-00002-of-.* could not be read"),
    "an index that promises too much": (_promise_too_much, "lacks tensor .*q_proj.bias"),
    "a tensor in two shards": (_store_twice, "has tensor model.embed_tokens.weight twice"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_weights_that_are_not_the_config_s(
    damage: str, base: Path, tmp_path: Path
) -> None:
    spoil, message = DAMAGES[damage]
    spoilt = spoil(shutil.copytree(base, tmp_path / "base"))
    before = tiny.tree(tmp_path)
    for read in READERS.values():
        with pytest.raises(lr.LoramError, match=message) as caught:
            read(spoilt, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert tiny.tree(tmp_path) == before


def _evaluate(model: Path, output: Path) -> None:
    data = tiny.write_jsonl(output.parent.parent / "data.jsonl", tiny.questions(2))
    lr.evaluate(lr.EvaluateConfig(model=str(model), output=output, data=str(data)))


READERS: dict[str, Callable[[Path, Path], object]] = {
    "prune": lambda m, o: lr.prune(
        lr.PruneConfig(base=str(m), output=o, ratio=0.25, layers=(1, 2))
    ),
    "export": lambda m, o: lr.export(lr.ExportConfig(model=str(m), output=o)),
    "load": lambda m, o: load_model(m),
    "evaluate": _evaluate,
    "train": lambda m, o: lr.train(lr.TrainConfig(model=m, data="missing.jsonl", output=o)),
    "align's engine": lambda m, o: load_partitioned(m, {"zero_optimization": {"stage": 0}}, "fp32"),
}


def test_quantised_weights_and_what_config_json_says_of_them_agree(
    base: Path, pruned: Path, tmp_path: Path
) -> None:
    says_so = shutil.copytree(base, tmp_path / "says")
    change_config(says_so, quantization_config={"load_in_4bit": True})
    with pytest.raises(
        lr.LoramError, match="q_proj.weight in full precision, but quantization_config"
    ):
        load_model(says_so)
    change_config(says_so, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(lr.LoramError, match="must be bitsandbytes with load_in_4bit, got gptq"):
        load_model(says_so)
    quantized = lr.quantize(
        lr.QuantizeConfig(base=str(base), model=pruned, output=tmp_path / "q")
    ).output
    name = "model.layers.1.mlp.up_proj.weight"
    cases: dict[str, Callable[[Path], Path]] = {
        "quantised, but its config": lambda d: change_config(d, quantization_config=None),
        f"lacks tensor {name}.absmax": _without(f"{name}.absmax"),
        f"lacks tensor {name}.nested_absmax": _without(f"{name}.nested_absmax"),
        f"{name}.absmax of shape": _with(f"{name}.absmax", torch.ones(3, dtype=torch.uint8)),
        f"tensor {name}.nested_absmax of .* must be finite": lambda d: change_tensors(
            d, lambda t: t[f"{name}.nested_absmax"].fill_(torch.nan) and None
        ),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        with pytest.raises(lr.LoramError, match=message):
            load_model(spoil(shutil.copytree(quantized, tmp_path / str(number))))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_by_whoever_reads_it(
    value: float, base: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][5, 7] = value

    spoilt = change_tensors(shutil.copytree(base, tmp_path / "base"), spoil)
    before = tiny.tree(tmp_path)
    readers = {k: v for k, v in READERS.items() if k not in ("train", "evaluate")}
    for read in readers.values():
        with pytest.raises(
            lr.LoramError, match=r"tensor model.layers.2.mlp.down_proj.weight of .* must be finite"
        ) as caught:
            read(spoilt, tmp_path / "out")
        assert "1 of its 6144 values" in str(caught.value)
    assert tiny.tree(tmp_path) == before


def test_absurd_numbers_of_layers_and_experts_are_refused_before_their_tensors_are_listed(
    tmp_path: Path,
) -> None:
    """Listed, with 10^5 experts, they would be 10^9 names."""
    directory = families.write_base(tmp_path / "base", "qwen3_moe")
    config = json.loads((directory / "config.json").read_text())
    config.update(num_hidden_layers=10**4)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(lr.LoramError, match="describes 10,000 layers of 4 experts"):
        ModelCheckpoint(directory)


def test_what_transformers_computes_itself_may_be_stored(base: Path, tmp_path: Path) -> None:
    """Llama-2 checkpoints of 2023 have a rotary_emb.inv_freq in each layer."""
    old = shutil.copytree(base, tmp_path / "old")
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)
    }
    change_tensors(old, lambda t: t.update(frequencies))
    expected = logits_of(load_model(base, "fp32"), IDS)
    assert torch.equal(logits_of(load_model(old, "fp32"), IDS), expected)
    aligned = load_partitioned(old, {"zero_optimization": {"stage": 0}}, "fp32")
    assert torch.equal(logits_of(aligned, IDS), expected)


def test_a_head_that_differs_from_the_embeddings_is_the_model_s_everywhere(tmp_path: Path) -> None:
    """transformers does not tie a stored head of other values, whatever config.json says."""
    base = tiny.write_base(tmp_path / "base", tied=True)
    torch.manual_seed(5)
    change_tensors(base, lambda t: t.update({"lm_head.weight": torch.randn(259, 64)}))
    expected = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), IDS)
    with ModelCheckpoint(base) as checkpoint:
        assert checkpoint.has_own_head()
    for found in (
        load_model(base, "fp32"),
        load_partitioned(base, {"zero_optimization": {"stage": 0}}, "fp32"),
    ):
        assert torch.equal(logits_of(found, IDS), expected)
    change_tensors(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    with ModelCheckpoint(base) as checkpoint:
        assert not checkpoint.has_own_head()


def _adapter(base: Path, target: Path, **settings: Any) -> Path:
    """A LoRA that changes much, as PEFT saves it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    )
    peft.get_peft_model(model, config).save_pretrained(target)
    return target


def test_an_adapter_beside_the_weights_is_not_put_on(base: Path, tmp_path: Path) -> None:
    both = shutil.copytree(base, tmp_path / "both")
    for file in _adapter(base, tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, both)
    found = load_model(both, "fp32")
    assert not hasattr(found, "peft_config")
    assert torch.equal(logits_of(found, IDS), logits_of(load_model(base, "fp32"), IDS))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "sub/model.safetensors",
    ],
)
def test_other_weights_beside_model_safetensors_are_not_read(
    name: str, base: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(base, tmp_path / "both")
    other = load_file(base / "model.safetensors")
    other = {key: torch.zeros_like(tensor) for key, tensor in other.items()}
    (both / name).parent.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(other, both / name)
    else:
        save_file(other, both / name, {"format": "pt"})
    (both / "model.safetensors.index.json").write_text('{"weight_map": {"x": "y.safetensors"}}')
    expected = logits_of(load_model(base, "fp32"), IDS)
    assert torch.equal(logits_of(load_model(both, "fp32"), IDS), expected)
    with ModelCheckpoint(both) as checkpoint:
        assert checkpoint.entry == "model.safetensors"


def test_pickled_weights_alone_are_refused(base: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(base / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(lr.LoramError, match="convert pickled weights"):
        load_model(pickled)


def test_an_adapter_that_does_not_fit_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    a = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def spoilt(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        directory = shutil.copytree(adapter, tmp_path / name)
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        return directory

    cases = {
        "must be finite": spoilt("nan", lambda t: t[a].fill_(torch.nan)),
        "it lacks .*layers.1.self_attn.q_proj.lora_A": spoilt("less", lambda t: t.pop(a)),
        "no parameter .*layers.9": spoilt(
            "more", lambda t: t.update({a.replace("layers.1", "layers.9"): t[a] + 0})
        ),
        "does not match the model": spoilt("other", lambda t: t.update({a: t[a][:, :32].clone()})),
    }
    for message, directory in cases.items():
        with pytest.raises(lr.LoramError, match=message):
            with_adapter(load_model(base, "fp32"), str(base), directory, "evaluate.adapter")
    nan = tmp_path / "nan"
    with pytest.raises(lr.LoramError, match="q_proj.lora_A.weight of .* must be finite"):
        lr.merge(lr.MergeConfig(base=str(base), adapter=nan, output=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


PLAIN: dict[str, tuple[dict[str, Any], str | None]] = {
    "an expression with patterns": (
        {
            "target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj",
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 8},
            "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32},
        },
        None,
    ),
    "all linears": ({"target_modules": "all-linear"}, None),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "contains .*embed_tokens"),
    "a saved head": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "modules_to_save",
    ),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_loras_of_plain_peft_merge_as_peft_has_them_or_are_refused(
    kind: str, tmp_path: Path
) -> None:
    settings, refusal = PLAIN[kind]
    base = tiny.write_base(tmp_path / "base", tied=True)
    adapter = _adapter(base, tmp_path / "adapter", lora_alpha=8, **settings)
    config = lr.MergeConfig(base=str(base), adapter=adapter, output=tmp_path / "out")
    if refusal is not None:
        with pytest.raises(lr.LoramError, match=refusal):
            lr.merge(config)
        assert not (tmp_path / "out").exists()
        return
    merged = load_model(lr.merge(config).output, "fp32")
    beside = peft.PeftModel.from_pretrained(load_model(base, "fp32"), str(adapter))
    torch.testing.assert_close(logits_of(merged, IDS), logits_of(beside, IDS), rtol=1e-5, atol=1e-5)


def test_a_lora_in_a_pickle_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(lr.LoramError, match="but contains adapter_model.bin, which can run code"):
        lr.merge(lr.MergeConfig(base=str(base), adapter=adapter, output=tmp_path / "out"))
