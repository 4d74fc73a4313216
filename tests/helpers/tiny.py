"""Tiny random models, a byte tokenizer and small data sets, for the logic under test."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = len(SPECIAL) + 256


def tokenizer() -> PreTrainedTokenizerFast:
    """Create a byte tokenizer with a chat template.

    It is a byte-level BPE with one merge, as llama.cpp does not load a BPE without merges. The
    bytes 0xFE and 0xFF are merged into a token that replaces 0xC1; UTF-8 text contains none of the
    three.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["þÿ" if byte == "Á" else byte for byte in alphabet]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("þ", "ÿ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )


def llama_config(
    *,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    hidden: int = 64,
    head_dim: int = 8,
    intermediate: int = 96,
    tied: bool = False,
    bias: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_base(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **sizes: object,
) -> Path:
    """Write a random Llama with the byte tokenizer; see `llama_config` for the sizes."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**sizes)).to(dtype)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count: int = 40) -> list[dict[str, str]]:
    """Return small sums as prompts and completions."""
    pairs = ((i % 7, i % 5) for i in range(count))
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs]


def texts(count: int = 60) -> list[dict[str, str]]:
    """Return documents of different lengths."""
    return [
        {"text": f"Document {i}: " + "the quick brown fox. " * (1 + i % 6)} for i in range(count)
    ]


def tree(directory: Path) -> dict[str, str]:
    """Return every path below a directory with the SHA-256 of its content, to detect changes."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        )
        for path in sorted(directory.rglob("*"))
    }


@contextmanager
def disk(directory: Path, size: str) -> Iterator[None]:
    """Mount an empty file system of a size such as ``400k``; skip the test if not permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def first_of(cases: Sequence[Any]) -> list[Any]:
    """Mark all but the first case of a slow test for `make thorough`."""
    return fast_of(cases, cases[0])


def fast_of(cases: Sequence[Any], *fast: Any) -> list[Any]:
    """Mark all but a few cases of a fast test for `make thorough`."""
    marks = [pytest.mark.slow, pytest.mark.thorough]
    return [
        case
        if case in fast
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
        for case in cases
    ]
