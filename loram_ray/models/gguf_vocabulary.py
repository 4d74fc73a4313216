"""Vocabulary of a byte-level BPE tokenizer, as GGUF stores it and llama.cpp reads it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from loram_ray.errors import LoramError, shown
from loram_ray.models.tokenizer import added_around, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
_KNOWN = (
    "a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe "
    "command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone "
    "exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gigachat glm4 glm5 gpt-2 gpt-4o "
    "gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan hunyuan-dense jais "
    "jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano "
    "joyai-llm k2-horizon kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 "
    "llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo "
    "phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe seed-coder smaug-bpe smollm "
    "solar-open stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking "
    "youtu"
)
"""llama.cpp's names of byte-level BPE pre-tokenizers; it rejects files with any other."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_REMEDY = "convert the model with llama.cpp's convert_hf_to_gguf.py"
_NEVER_MERGED = ("\u0100\u0100", "\u0100\u0100")
"""A merge that never applies, because llama.cpp rejects a BPE vocabulary without merges. Each of
its two parts is two bytes long, and without other merges every symbol is one byte.
"""


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a tokenizer that GGUF stores.

    Attributes:
        tokens: Tokens by id, one for each row of the embeddings.
        kinds: Token types by id.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        merges: Merges in order, each with its two parts separated by a space.
        special: Ids of special tokens, by llama.cpp's names.
        begins: Whether the tokenizer prepends BOS to a text.
        ends: Whether the tokenizer appends EOS to a text.
        templates: The chat template, several templates by name, or None.
    """

    tokens: list[str]
    kinds: list[TokenType]
    pre_tokenizer: str
    merges: list[str]
    special: dict[str, int]
    begins: bool
    ends: bool
    templates: str | list[dict[str, str]] | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.templates is not None:
            writer.add_chat_template(self.templates)


def read_vocabulary(
    directory: Path, config: PreTrainedConfig, pre_tokenizer: str | None
) -> Vocabulary:
    """Read the tokenizer of a model directory.

    Args:
        directory: Directory of the model.
        config: The model's configuration as transformers loads it.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None detects it.

    Raises:
        LoramError: If GGUF cannot store the tokenizer, or llama.cpp cannot load it.
    """
    if pre_tokenizer is not None:
        _require_known(pre_tokenizer)
    tokenizer = load_tokenizer(directory)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    _require_byte_level(backend, directory)
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    merges = backend["model"]["merges"] or [_NEVER_MERGED]
    begins, ends = _added(tokenizer, directory)
    return Vocabulary(
        tokens,
        kinds,
        pre_tokenizer or _recognised(backend["pre_tokenizer"] or {}, directory),
        [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges],
        _special(tokenizer, config),
        begins,
        ends,
        _templates(tokenizer.chat_template, directory),
    )


def _require_known(pre_tokenizer: str) -> None:
    """Check that llama.cpp knows a pre-tokenizer."""
    known = _KNOWN.split()
    if pre_tokenizer not in known:
        near = get_close_matches(pre_tokenizer, known, n=3, cutoff=0.0)
        raise LoramError(
            "export.pre_tokenizer must be llama.cpp's name of a pre-tokenizer, got "
            f"{shown(pre_tokenizer)}; use e.g. {', '.join(near)}"
        )


def _require_byte_level(backend: dict[str, Any], directory: Path) -> None:
    """Reject tokenizers that differ from llama.cpp's byte-level BPE.

    Raises:
        LoramError: If there is a difference; the message names the first one.
    """
    model = backend["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise LoramError(
            f"export supports byte-level BPE vocabularies, but {directory} has another kind; "
            f"{_REMEDY}"
        )
    normalizer = backend["normalizer"] or {}
    for part in normalizer.get("normalizers", [normalizer] if normalizer else []):
        if part["type"] != "NFC":
            raise LoramError(
                f"{directory}/tokenizer.json must have no normalizer other than NFC for export, "
                f"got {part['type']}, which llama.cpp's BPE does not support; export another model"
            )
    if any(part.get("add_prefix_space") for part in _parts(backend["pre_tokenizer"] or {})):
        raise LoramError(
            f"add_prefix_space must be false in {directory}/tokenizer.json for export, as "
            "llama.cpp's BPE adds no space before a text; export another model"
        )


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[TokenType]]:
    from gguf import TokenType

    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        tokens.append(words.get(number, f"[PAD{number}]"))
        if number not in words:
            kinds.append(TokenType.UNUSED)
        elif number not in added:
            kinds.append(TokenType.NORMAL)
        else:
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
    return tokens, kinds


def _special(tokenizer: Any, config: PreTrainedConfig) -> dict[str, int]:
    """Return the ids of special tokens, from the configuration where the tokenizer sets none."""
    found = {}
    for name in _SPECIAL:
        of_config = getattr(config, f"{name}_token_id", None)
        number = getattr(tokenizer, f"{name}_token_id")
        if number is None and type(of_config) is int and 0 <= of_config < config.vocab_size:
            number = of_config
        if number is not None:
            found[name] = number
    return found


def _added(tokenizer: Any, directory: Path) -> tuple[bool, bool]:
    """Return whether the tokenizer prepends BOS to a text, and whether it appends EOS.

    Raises:
        LoramError: If it adds other tokens, for which GGUF has no field.
    """
    opening, closing = added_around(tokenizer)
    bos, eos = (tokenizer.bos_token_id,), (tokenizer.eos_token_id,)
    if opening not in ((), bos) or closing not in ((), eos):
        words = tokenizer.convert_ids_to_tokens([*opening, *closing])
        raise LoramError(
            f"{directory} must have a tokenizer that adds at most its bos_token before a text and "
            f"its eos_token after it, but it adds {' '.join(words)}; set them in its "
            "tokenizer_config.json"
        )
    return bool(opening), bool(closing)


def _templates(
    given: str | dict[str, str] | None, directory: Path
) -> str | list[dict[str, str]] | None:
    """Return chat templates in gguf's format: one template, or several by name.

    Raises:
        LoramError: If a name is not a valid key in GGUF.
    """
    if not isinstance(given, dict):
        return given
    for name in given:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise LoramError(
                "names of chat templates must consist of letters, digits and _ in GGUF, but "
                f"{directory} has {name!r}; rename it in its tokenizer files"
            )
    return [{"name": name, "template": template} for name, template in given.items()]


def _parts(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _recognised(pre_tokenizer: dict[str, Any], directory: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer."""
    parts = _parts(pre_tokenizer)
    match [part.get("type") for part in parts]:
        case ["ByteLevel"] if parts[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"]:
            expression = parts[0]["pattern"].get("Regex")
            if expression in _SPLITS and not parts[1]["use_regex"]:
                return _SPLITS[expression]
    raise LoramError(
        f"export.pre_tokenizer must be given, as that of {directory} is not recognised; look up "
        "llama.cpp's name in its convert_hf_to_gguf.py"
    )
