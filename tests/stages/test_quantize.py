"""The quantize stage against transformers' own way to a model in NF4; real bitsandbytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import loram_ray as lr
from helpers import adapters, families, masked, tiny
from helpers.nf4_tensors import decoded, stored
from helpers.training import config as training
from helpers.training import metrics, run_directly
from loram_ray.artifacts.adapter import ADAPTER_FILE
from loram_ray.artifacts.manifest import hash_file, read_manifest
from loram_ray.artifacts.tensorfile import Checkpoint, TensorSpec
from loram_ray.config import load_run
from loram_ray.masks import MASKS_FILE
from loram_ray.models import nf4
from loram_ray.models.loading import load_model
from loram_ray.models.quantisation import NF4 as FORM
from loram_ray.plan import PruningPlan

IDS = adapters.token_ids(tiny.VOCABULARY)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
PARTS = {
    "",
    ".absmax",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".quant_state.bitsandbytes__nf4",
}
# Sizes of a Llama whose blocks of 64 weights end within rows, and whose last block is not full.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "tied": {"tied": True},
    "biases": {"bias": True},
    "odd columns": {"intermediate": 90},
    "last blocks that are not full": {"hidden": 40, "head_dim": 2, "intermediate": 44},
}


def prune(base: Path, output: Path, **settings: object) -> Path:
    config = {"ratio": 0.5, "layers": (1, 3), "round_neurons_to": 2, **settings}
    return lr.prune(lr.PruneConfig(base=str(base), output=output, **config)).output


def quantize(model: Path, output: Path, **settings: object) -> Path:
    return lr.quantize(lr.QuantizeConfig(model=model, output=output, **settings)).output


def load(directory: Path) -> Any:
    return load_model(directory, "fp32").eval()


def peer(pruned: Path, output: Path) -> tuple[Any, Path]:
    """What transformers makes of a pruned model when it quantises it on loading."""
    model = AutoModelForCausalLM.from_pretrained(pruned, quantization_config=NF4)
    model.save_pretrained(output)
    return model, output


def assert_the_same(directory: Path, expected: Path) -> None:
    found, wanted = stored(directory), stored(expected)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def logits_of(model: Any) -> torch.Tensor:
    """Logits by the way that every CPU and GPU takes, not by the repacked weights of some."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return adapters.logits_of(model, IDS)


@pytest.fixture(scope="module")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(base, tmp_path_factory.mktemp("quantize") / "pruned")


@pytest.fixture(scope="module")
def quantized(pruned: Path) -> Path:
    return quantize(pruned, pruned.parent / "quantized")


@pytest.mark.parametrize("case", CASES)
def test_every_stored_tensor_is_transformers_own(tmp_path: Path, case: str) -> None:
    base = tiny.write_base(tmp_path / "base", seed=2, **CASES[case])
    pruned = prune(base, tmp_path / "pruned", round_neurons_to=1)
    odd = PruningPlan.load(pruned).layers[1].neurons.numel() % 2
    assert odd == (case == "odd columns")
    expected, saved = peer(pruned, tmp_path / "peer")
    output = quantize(pruned, tmp_path / "quantized")
    assert_the_same(output, saved)
    found = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(logits_of(found), logits_of(expected))
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (output, saved))
    assert ours["quantization_config"] == theirs["quantization_config"]


def test_a_weight_in_several_pieces_is_stored_as_bitsandbytes_stores_it_whole() -> None:
    weight = torch.randn(48, 90, generator=torch.Generator().manual_seed(4))
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = {"": packed, **{f".{k}": v for k, v in state.as_dict(packed=True).items()}}
    pieces = nf4.quantize_weight(weight, piece=64 * 7)
    assert pieces.keys() == expected.keys()
    for name, tensor in pieces.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_s_tensors_are_transformers_own(tmp_path: Path, family: str) -> None:
    pruned = prune(families.write_base(tmp_path / "base", family), tmp_path / "pruned")
    expected, saved = peer(pruned, tmp_path / "peer")
    output = quantize(pruned, tmp_path / "quantized")
    assert_the_same(output, saved)
    found = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(logits_of(found), logits_of(expected))
    names = set(stored(output))
    linears = {name.removesuffix(".absmax") for name in names if name.endswith("weight.absmax")}
    plan = PruningPlan.load(output)
    inside = {
        f"{module}.weight"
        for layer in range(plan.geometry.num_layers)
        for module, _, _ in plan.architecture.modules(layer, plan.geometry)
    }
    assert linears == inside  # each expert's linears too; routers, head and embeddings not


def test_the_directory_is_complete(pruned: Path, quantized: Path) -> None:
    before = {path.name for path in pruned.iterdir()}
    assert {path.name for path in quantized.iterdir()} == before | {"README.md"}
    assert PruningPlan.load(quantized).digest == PruningPlan.load(pruned).digest
    tokens = AutoTokenizer.from_pretrained(quantized)("1+1=").input_ids
    assert tokens == AutoTokenizer.from_pretrained(pruned)("1+1=").input_ids
    manifest, parent = read_manifest(quantized), read_manifest(pruned)
    assert manifest is not None and parent is not None
    assert manifest.stage == "quantize"
    assert manifest.parents == {"model": parent.digest}
    assert manifest.base_fingerprint == parent.base_fingerprint
    for name, entry in manifest.files.items():
        assert hash_file(quantized / name) == entry["sha256"]


def test_what_is_kept_stays_as_it_was(pruned: Path, quantized: Path) -> None:
    before, after = stored(pruned), stored(quantized)
    weights = {name.removesuffix(".absmax") for name in after if name.endswith("weight.absmax")}
    for name in weights:
        parts = {stem.removeprefix(name) for stem in after if stem.startswith(f"{name}")}
        assert parts == PARTS
        assert after[name].dtype == torch.uint8 and after[name].numel() == before[name].numel() / 2
    kept = set(before) - weights
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= kept
    for name in kept:
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neurons", [64, 2])
def test_what_is_loaded_computes_what_is_stored(
    tmp_path: Path, neurons: int, dtype: torch.dtype
) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=dtype)
    pruned = prune(base, tmp_path / "pruned", ratio=0.3, round_neurons_to=neurons)
    quantized = quantize(pruned, tmp_path / "quantized")
    before = stored(pruned)
    expected = load(pruned)
    for name, module in expected.named_modules():
        if f"{name}.weight.absmax" in stored(quantized):
            weight = decoded(quantized, f"{name}.weight")
            # QLoRA's own number: NF4 errs by about 0.1 of a normal weight's root mean square
            error = (weight - before[f"{name}.weight"]).norm() / weight.norm()
            assert 0.05 < error < 0.15
            module.weight.data = weight
    found = load(quantized)
    inputs = {m.in_features for m in found.modules() if type(m).__name__ == "Linear4bit"}
    assert inputs and all(size % 64 == 0 for size in inputs)  # the others are held whole
    results = []
    for model in (expected, found):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.square().mean().backward()
        results.append((logits.detach(), embedded.grad))
    for ours, wanted in zip(*results, strict=True):  # bfloat16 anywhere would err by 4e-3
        assert (ours - wanted).norm() < 1e-5 * wanted.norm()


def test_bytes_and_parameters_are_those_stored(pruned: Path, quantized: Path) -> None:
    manifest = read_manifest(quantized)
    assert manifest is not None
    details = manifest.details
    before, after = stored(pruned), stored(quantized)
    weights = [name.removesuffix(".absmax") for name in after if name.endswith("weight.absmax")]
    elements = sum(before[name].numel() for name in weights)
    kept = sum(t.nbytes for name, t in before.items() if name not in weights)
    assert details["bytes"] == sum(tensor.nbytes for tensor in after.values())
    assert details["bytes_before"] == sum(tensor.nbytes for tensor in before.values())
    assert details["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert details["quantized_tensors"] == len(weights)
    assert details["quantized_parameters"] == elements
    assert details["nominal_bytes"] == kept + elements // 2
    assert details["nominal_bytes"] < details["bytes"] < details["bytes_before"]


def test_a_large_weight_takes_4_127_bits_an_element() -> None:
    """QLoRA, section 3: 4 bits, 8 / 64 for scales, 32 / (64 * 256) for scales of scales."""
    weight = TensorSpec((4096, 4096), torch.bfloat16)
    specs = nf4.stored_specs(weight, torch.tensor(0.05))
    maps_and_text = sum(s.nbytes for n, s in specs.items() if "map" in n or "quant_state" in n)
    nbytes = sum(spec.nbytes for spec in specs.values()) - maps_and_text
    assert nbytes * 8 / 4096**2 == 4 + 8 / 64 + 32 / (64 * 256)
    assert maps_and_text < 2048


@pytest.mark.parametrize("max_shard_bytes", [30_000, 120_000])
def test_shards_hold_what_one_file_does(
    tmp_path: Path, quantized: Path, base: Path, max_shard_bytes: int
) -> None:
    pruned = prune(base, tmp_path / "pruned", max_shard_bytes=100_000)
    output = quantize(pruned, tmp_path / "quantized", max_shard_bytes=max_shard_bytes)
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert_the_same(output, quantized)
    assert torch.equal(
        adapters.logits_of(load(output), IDS), adapters.logits_of(load(quantized), IDS)
    )


def test_it_loads_without_loram_ray(quantized: Path, tmp_path: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
"""
    adapters.run_python(script, tmp_path, quantized, with_loram_ray=False)


def test_it_is_skipped_where_it_is_complete(pruned: Path, quantized: Path) -> None:
    before = tiny.tree(quantized)
    assert lr.quantize(lr.QuantizeConfig(model=pruned, output=quantized)).skipped
    assert tiny.tree(quantized) == before


def test_one_weight_is_in_memory_at_a_time(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        tensors.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in tensors))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    quantize(pruned, tmp_path / "quantized")
    assert len(tensors) > 40
    assert most <= 2  # the next one is read before the last one's name is bound anew


def test_the_card_says_what_it_is(pruned: Path, tmp_path: Path) -> None:
    output = quantize(pruned, tmp_path / "small", base="meta-llama/Llama-3.1-70B")
    card = (output / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    said = yaml.safe_load(head)
    assert said["base_model"] == "meta-llama/Llama-3.1-70B"
    assert said["base_model_relation"] == "quantized"
    assert said["tags"] == ["loram", "pruned", "random", "nf4", "bitsandbytes"]
    assert body.lstrip().startswith("# small\n")
    manifest = read_manifest(output)
    assert manifest is not None
    assert "NF4 with double quantisation" in body and f"{manifest.details['bytes']:,} bytes" in body
    assert body.index("## Quantisation") < body.index("## Use")
    assert str(tmp_path) not in card


def test_the_card_s_commands_fit_together(quantized: Path) -> None:
    lines = (quantized / "README.md").read_text().splitlines()
    commands = {line.split()[1]: line.split() for line in lines if line.startswith("loram ")}
    assert list(commands) == ["train", "recover"]
    runs = {
        stage: load_run(None, [word for word in words[2:] if "=" in word])
        for stage, words in commands.items()
    }
    train, recover = runs["train"].train, runs["recover"].recover
    assert train is not None and recover is not None
    assert recover.adapter == train.output
    assert f"`{recover.output}/` is a standard PEFT adapter" in "\n".join(lines)


def test_the_card_of_an_aligned_model_goes_on(pruned: Path, tmp_path: Path) -> None:
    aligned = tmp_path / "aligned"
    shutil.copytree(pruned, aligned)
    card = (
        "---\ntags:\n- loram\nbase_model: a/b\n---\n\n# aligned\n\nText.\n\n## Corpus\n\nPages.\n"
    )
    (aligned / "README.md").write_text(f"{card}\n## Use\n\nThus.\n")
    manifest = json.loads((aligned / "manifest.json").read_text())
    entry = {
        "bytes": (aligned / "README.md").stat().st_size,
        "sha256": hash_file(aligned / "README.md"),
    }
    manifest.update(stage="align", files={**manifest["files"], "README.md": entry})
    (aligned / "manifest.json").write_text(json.dumps(manifest))
    found = (quantize(aligned, tmp_path / "quantized") / "README.md").read_text()
    headings = [line for line in found.splitlines() if line.startswith("#")]
    assert headings == ["# quantized", "## Corpus", "## Quantisation", "## Use"]
    assert "Pages." in found and "Thus." in found and "base_model: a/b" in found


@pytest.mark.slow
def test_a_quantisation_killed_half_way_leaves_nothing(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", layers=24, hidden=256, intermediate=512, head_dim=32)
    pruned = prune(base, tmp_path / "pruned", layers=(1, 23))
    code = (
        "import sys; import loram_ray as lr;"
        "lr.quantize(lr.QuantizeConfig(model=sys.argv[1], output=sys.argv[2]))"
    )
    output = tmp_path / "quantized"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pruned), str(output)], env=os.environ
    )
    partial = tmp_path / ".quantized.partial" / "model.safetensors"
    deadline = time.monotonic() + 240
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    result = lr.quantize(lr.QuantizeConfig(model=pruned, output=output))
    assert not result.skipped and not partial.parent.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "pruned", "quantized"}


def test_a_masked_model_is_refused(base: Path, tmp_path: Path) -> None:
    pruned = masked.prune(base, tmp_path / "masked")
    assert (pruned / MASKS_FILE).exists()
    assert refusal(pruned, tmp_path) == (
        f"quantize.model must be structurally pruned, but {pruned} has 2:4 masks, which need full "
        "precision; prune with a structured method"
    )


def refusal(model: Path, folder: Path) -> str:
    """The message of a refused quantisation, which must have written nothing."""
    before = set(folder.iterdir())
    with pytest.raises(lr.LoramError) as caught:
        quantize(model, folder / "refused")
    assert set(folder.iterdir()) == before
    return str(caught.value)


def test_a_quantised_model_is_refused(quantized: Path, tmp_path: Path) -> None:
    assert "is already quantised; use the model" in refusal(quantized, tmp_path)


def test_what_is_not_pruned_is_refused(base: Path, tmp_path: Path) -> None:
    line = "quantize.model must be a directory written by prune or align"
    assert line in refusal(base, tmp_path)
    assert line in refusal(tmp_path / "nowhere", tmp_path)


def test_a_damaged_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pruned, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert "SHA-256" in refusal(damaged, tmp_path) or "bytes" in refusal(damaged, tmp_path)


def test_other_stages_refuse_a_quantised_model(quantized: Path, tmp_path: Path) -> None:
    corpus = {"sources": [{"path": str(tmp_path / "t.jsonl")}]}
    with pytest.raises(lr.LoramError, match=r"align.pruned .* contains the output of quantize"):
        lr.align(
            lr.AlignConfig(
                pruned=quantized, output=tmp_path / "out", corpus=corpus, objective="causal_lm"
            )
        )
    with pytest.raises(lr.LoramError, match=r"prune.base must be a model that is not pruned"):
        prune(quantized, tmp_path / "out")


def test_paths_follow_from_the_run() -> None:
    settings = ["base=b", "output=o", "quantize={}"]
    assert load_run(None, settings).quantize == lr.QuantizeConfig(
        model=Path("o/pruned"), output=Path("o/quantized"), base="b"
    )
    aligned = load_run(None, [*settings, "align.corpus.sources=[{path: t.jsonl}]"]).quantize
    assert aligned is not None and aligned.model == Path("o/aligned")


def gradients(model: peft.PeftModel) -> dict[str, torch.Tensor | None]:
    for parameter in model.parameters():
        parameter.grad = None
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradients_pass_after_an_evaluation(quantized: Path) -> None:
    """On CPUs with AVX512 for bfloat16, bitsandbytes repacks weights at the first evaluation."""
    model = adapters.with_random_adapter(load(quantized))
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    after = gradients(model)
    assert len(before) == 2 * 4 * 7
    for name, gradient in before.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(after[name], gradient), name  # type: ignore[arg-type]


def test_training_on_it_is_plain_peft_s(quantized: Path, tmp_path: Path) -> None:
    eight = tiny.write_jsonl(tmp_path / "eight.jsonl", tiny.questions(8))
    settings = training(quantized, eight, tmp_path, batch_size=8, micro_batch_size=4)
    ours = metrics(run_directly(settings, tmp_path / "ours") / "work", "loss")

    from helpers.training import as_row, plain_losses
    from loram_ray.corpus.batches import padded
    from loram_ray.corpus.examples import load_examples
    from loram_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(quantized)
    examples = [e for _, e in load_examples(tokenizer, str(eight), 64, 0.0, "train.data")]
    batch = padded([as_row(e) for e in examples], tokenizer.eos_token_id)
    torch.manual_seed(settings.seed)
    frozen = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    for module in frozen.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32  # as the precision is
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=adapters.LINEARS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(frozen, lora).train()
    losses = plain_losses(model, batch)
    assert ours == pytest.approx(losses, rel=1e-3)  # its backward pass rounds weights to bfloat16
    assert ours[-1] < ours[0]


@pytest.mark.slow
def test_an_adapter_trained_on_it_is_recovered_and_merged(
    base: Path, pruned: Path, quantized: Path, tmp_path: Path, embedded_ray: None
) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(8))
    trained = lr.train(training(quantized, data, tmp_path / "trained", precision="bf16"))
    whole = sum(tensor.numel() for tensor in stored(pruned).values())
    manifest = read_manifest(quantized)
    assert manifest is not None
    assert trained.manifest.details["model_parameters"] == whole
    held = sum(  # a CPU holds the linears whose rows do not end with a block of 64 in bfloat16
        2 * tensor.numel()
        for name, tensor in stored(pruned).items()
        if name.removesuffix("weight") + "weight.absmax" in stored(quantized)
        and tensor.shape[1] % 64
    )
    assert trained.manifest.details["model_bytes"] <= manifest.details["bytes"] + held
    assert trained.manifest.parents["model"] == manifest.digest
    b = load_file(trained.output / ADAPTER_FILE)
    assert all(t.abs().max() > 0 for name, t in b.items() if "lora_B" in name)

    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained.output, base=str(base), output=tmp_path / "adapter")
    )
    merged = lr.merge(
        lr.MergeConfig(base=str(base), adapter=recovered.output, output=tmp_path / "merged")
    )
    on_base = peft.PeftModel.from_pretrained(load_model(base, "fp32"), str(recovered.output))
    found = adapters.logits_of(load(merged.output), IDS)
    torch.testing.assert_close(found, adapters.logits_of(on_base, IDS), rtol=1e-4, atol=1e-5)

    scores = lr.evaluate(
        lr.EvaluateConfig(
            model=str(quantized),
            adapter=trained.output,
            data=str(data),
            output=tmp_path / "scores",
        )
    ).manifest.details
    assert scores["answer_perplexity"] > 1
    assert scores["model_parameters"] == whole


def test_the_form_s_settings_identify_directories_written_before() -> None:
    assert FORM.settings == {
        "type": "nf4", "blocksize": 64, "double": True, "compute": "bfloat16"
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(48, 80), (64, 192), (3, 5)])
def test_the_form_s_shapes_are_those_that_are_stored(shape: tuple[int, int]) -> None:
    spec = TensorSpec(shape, torch.bfloat16)
    stored = nf4.stored_specs(spec, torch.tensor(0.03))
    expected = FORM.stored_shapes("w", shape, double=True)
    assert {f"w{part}" for part in stored} == set(expected)
    for part, written in stored.items():
        assert expected[f"w{part}"] in (None, written.shape)
