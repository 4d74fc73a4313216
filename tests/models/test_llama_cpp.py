"""GGUF files in llama.cpp itself, against transformers and its tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import loram_ray as lr
from helpers import families, tiny
from helpers.llama_cpp import running
from loram_ray.models.gguf_vocabulary import _SPLITS
from loram_ray.models.tokenizer import load_tokenizer

TYPES = ("f32", "f16", "bf16", "q8_0")
TOLERANCES = {"f32": 1e-4, "f16": 0.01, "bf16": 0.1, "q8_0": 0.25}
"""Of a log-probability. Errors up to 4e-6, 0.004, 0.05 and 0.18 were seen: llama.cpp rounds what a
matrix is multiplied with to the matrix's type, too."""

SIZES = {"hidden_size": 64, "head_dim": 8, "intermediate_size": 96}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wider heads": ("llama", {"head_dim": 16}),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA_3_1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
IDS = torch.randint(3, tiny.VOCABULARY, (48,), generator=torch.Generator().manual_seed(1)).tolist()
LENGTHS = (1, 7, 48)


def write(directory: Path, case: str, **changes: Any) -> Path:
    family, settings = CASES[case]
    return families.write_base(directory, family, **{**SIZES, **settings, **changes})


def export(model: Path, output: Path, kind: str = "f32") -> Path:
    result = lr.export(lr.ExportConfig(model=str(model), output=output, type=kind))
    return result.output / result.manifest.details["file"]


def error_of(path: Path, base: Path, lengths: tuple[int, ...] = LENGTHS) -> float:
    """The largest difference of a log-probability from transformers' in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    sampled = tiny.tokenizer().get_vocab()["a"]
    with running(path) as runtime:
        found = [runtime.log_probabilities(IDS[:n], tiny.VOCABULARY, sampled) for n in lengths]
    errors = [(row - expected[n - 1]).abs().max() for row, n in zip(found, lengths, strict=True)]
    return float(torch.stack(errors).max())  # NaN if a token has no probability


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", case)
    errors = {kind: error_of(export(base, tmp_path / kind, kind), base) for kind in TYPES}
    assert all(errors[kind] <= TOLERANCES[kind] for kind in TYPES), errors


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Undo the order that llama.cpp wants of rotated rows: 8 heads of 8."""
    return rows.unflatten(0, (8, 4, 2)).transpose(1, 2).reshape(rows.shape)


def without_head(columns: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(columns[:, :8]), columns[:, 8:]], dim=1)


FAULTS = {
    "rotary order": ("llama", "q_proj.weight", halves),
    "a head is missing": ("llama", "o_proj.weight", without_head),
    "biases are missing": ("qwen2", "_proj.bias", torch.zeros_like),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_file_exceeds_every_tolerance(fault: str, tmp_path: Path) -> None:
    case, name, change = FAULTS[fault]
    base = write(tmp_path / "base", case)
    faulty = write(tmp_path / "faulty", case)
    tensors = load_file(faulty / "model.safetensors")
    changed = {
        key: change(tensor) if key.endswith(name) else tensor for key, tensor in tensors.items()
    }
    save_file(changed, faulty / "model.safetensors", {"format": "pt"})
    errors = {kind: error_of(export(faulty, tmp_path / kind, kind), base) for kind in TYPES}
    assert all(errors[kind] > 4 * TOLERANCES[kind] for kind in TYPES), errors


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    ],
)
def test_a_sliding_window_is_the_context_that_is_written(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = write(tmp_path / "base", case, **changes)
    path = export(base, tmp_path / "out")
    fields = gguf.GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    assert fields[f"{architecture}.context_length"].contents() == 32
    assert error_of(path, base, (1, 7, 31)) <= TOLERANCES["f32"]
    with pytest.raises(ValueError, match="exceeds the available context size"):
        error_of(path, base, (48,))


def test_a_window_that_no_layer_has_changes_nothing(tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}
    base = write(tmp_path / "base", "qwen2", **changes)
    assert error_of(export(base, tmp_path / "out"), base) <= TOLERANCES["f32"]


@pytest.mark.parametrize(
    ("case", "changes", "refusal"),
    [
        ("llama", {"hidden_act": "gelu"}, r"hidden_act must be silu .* got gelu"),
        ("qwen3", {"attention_bias": True}, r"attention_bias must be false .* Qwen3"),
        ("qwen2", {"head_dim": 16}, r"hidden_size = 64 for export of Qwen2, got 128"),
        ("qwen2", {"rope_parameters": LLAMA_3_1}, r"scaling .* only for Llama and Mistral"),
        ("qwen3", {"rope_parameters": LLAMA_3_1}, r"scaling .* only for Llama and Mistral"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_before_anything_is_written(
    case: str, changes: dict[str, Any], refusal: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", case, **changes)
    with pytest.raises(lr.LoramError, match=refusal) as error:
        export(base, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), BYTES])
        for split, name in _SPLITS.items()
    },
}
TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs, does it?",
    "  two spaces, a\ttab \n\n  and lines\r\n",
    "3.14159 = 2024-11-30 12,000,000",
    "Gruß, naïve café; Привет, мир! 你好世界 こんにちは 👩‍👩‍👧 ½ ٣",
    "<|im_start|>user\nHello <|im_end|>there<|endoftext|>",
    " leading, trailing ",
    "I'LL they've WE'RE x'y",
    "   ",
    "a",
]


def trained(pre_tokenizer: str, begins: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=tiny.SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if begins:
        bos = tiny.SPECIAL[1]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tiny.SPECIAL[1], eos_token=tiny.SPECIAL[0]
    )


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_llama_cpp_tokenizes_as_the_tokenizer_does(
    pre_tokenizer: str, begins: bool, tmp_path: Path
) -> None:
    tokenizer = trained(pre_tokenizer, begins)
    base = write(tmp_path / "base", "llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(base)
    path = export(base, tmp_path / "out")
    tokenizer = load_tokenizer(base)
    with running(path) as runtime:
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert len(ids) < len(text.encode()) + begins or len(text) < 4  # merges are used
            assert runtime.tokens(text) == ids, text
            assert (ids[0] == 1) is (begins or text.startswith("<|im_start|>"))
            assert runtime.text(ids[begins:]) == text


def test_a_vocabulary_without_merges_is_loaded_and_splits_into_bytes(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "llama")
    file = base / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"] = []
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(base)
    path = export(base, tmp_path / "out")
    with running(path) as runtime:
        for text in (*TEXTS, "\x00" * 8):
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
    whole = path.read_bytes()
    name = b"tokenizer.ggml.merges"
    assert whole.count(name) == 1
    path.write_bytes(whole.replace(name, b"tokenizer.ggml.nerges"))
    with pytest.raises(RuntimeError), running(path):
        pass


@pytest.mark.slow
def test_the_real_model_and_its_tokenizer_are_the_same(real_base: Path, tmp_path: Path) -> None:
    path = export(real_base, tmp_path / "out")
    tokenizer = load_tokenizer(real_base)
    model = AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32).eval()
    ids = tokenizer("The capital of France is Paris, and that of Italy is")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    sampled = tokenizer.convert_tokens_to_ids("a")
    with running(path) as runtime:
        found = runtime.log_probabilities(ids, len(expected), sampled)
        for text in TEXTS:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
    assert float((found - expected).abs().max()) < 1e-3
    assert tokenizer.decode([int(found.argmax())]) == " Rome"
