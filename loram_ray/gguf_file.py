"""A model as one GGUF file, for llama.cpp and what is built on it.

The gguf package knows names and layouts; what is here are the sizes, the order of rotated rows that
llama.cpp wants of Llama's queries and keys, the factors of Llama 3.1's rotary frequencies, and the
vocabulary of a byte-level BPE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from loram_ray.errors import LoramError
from loram_ray.model_tensors import is_recomputed
from loram_ray.model_weights import ModelCheckpoint
from loram_ray.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROTATED_IN_PAIRS = "llama"
"""The architecture whose kernels rotate neighbours; transformers rotates halves."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write.

    Attributes:
        name: in the file.
        shape: ``[out, in]`` or ``[n]``.
        kind: how its values are stored.
        read: gives it, float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]


def write_gguf(
    directory: Path,
    path: Path,
    kind: str,
    pre_tokenizer: str | None,
    advance: Callable[[int], None],
) -> None:
    """Write a base or merged model; one tensor is in memory at a time.

    Args:
        directory: the model.
        path: the file.
        kind: ``f32``, ``bf16``, ``f16`` or ``q8_0``, of matrices; vectors are in float32.
        pre_tokenizer: llama.cpp's name of the tokenizer's pre-tokenisation; None recognises it.
        advance: told the bytes of each tensor that was written.

    Raises:
        LoramError: a family, a tokenizer or a scaling of rotary embeddings that cannot be written.
    """
    from gguf import GGUFWriter

    config = AutoConfig.from_pretrained(directory)
    architecture = architecture_of(config.model_type)
    with ModelCheckpoint(directory) as checkpoint:
        tensors = list(_tensors(checkpoint, config, architecture, kind))
        writer = GGUFWriter(path, architecture)
        try:
            _add_sizes(writer, config, kind)
            _add_vocabulary(writer, directory, config.vocab_size, pre_tokenizer)
            for tensor in tensors:
                shape, dtype = _stored(tensor)
                nbytes = math.prod(shape) * np.dtype(dtype).itemsize
                writer.add_tensor_info(tensor.name, shape, dtype, nbytes, tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                values = _values(tensor)
                writer.write_tensor_data(values)
                advance(values.nbytes)
        finally:
            writer.close()


def size_of(directory: Path, kind: str) -> int:
    """Bytes of the tensors that `write_gguf` writes."""
    config = AutoConfig.from_pretrained(directory)
    with ModelCheckpoint(directory) as checkpoint:
        tensors = _tensors(checkpoint, config, architecture_of(config.model_type), kind)
        stored = (_stored(tensor) for tensor in tensors)
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stored)


def architecture_of(model_type: str) -> str:
    """llama.cpp's name of a family.

    Raises:
        LoramError: a family that is not written.
    """
    if model_type not in _NAMES:
        raise LoramError(
            f"export writes {', '.join(_NAMES)} as GGUF, the model is a {model_type}; convert it "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    return _NAMES[model_type]


def _tensors(
    checkpoint: ModelCheckpoint, config: PreTrainedConfig, architecture: str, kind: str
) -> Iterator[_Tensor]:
    import gguf

    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    own_head = checkpoint.has_own_head()
    for source, spec in checkpoint.specs.items():
        if is_recomputed(source):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LoramError(
                f"export knows no place for tensor {source} in GGUF; convert the model with "
                "llama.cpp's convert_hf_to_gguf.py"
            )
        if not own_head and name == "output.weight":
            continue
        heads = 0
        if architecture == _ROTATED_IN_PAIRS and ".attn_q." in name:
            heads = config.num_attention_heads
        if architecture == _ROTATED_IN_PAIRS and ".attn_k." in name:
            heads = config.num_key_value_heads

        def read(source: str = source, heads: int = heads) -> torch.Tensor:
            tensor = checkpoint.read(source).float()
            return _in_pairs(tensor, heads) if heads else tensor

        yield _Tensor(name, spec.shape, _kind_of(spec.shape, kind), read)
    factors = rotary_factors(config)
    if factors is not None:
        shape = tuple(factors.shape)
        yield _Tensor("rope_freqs.weight", shape, _kind_of(shape, kind), lambda: factors)


def _in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows ``[heads * head_dim, ...]``: those that are rotated together are neighbours."""
    parts = tensor.unflatten(0, (heads, 2, -1))
    return parts.transpose(1, 2).reshape(tensor.shape)


def _kind_of(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _stored(tensor: _Tensor) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the array that holds a tensor."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    if tensor.kind is GGMLQuantizationType.F32:
        return tensor.shape, np.float32
    if tensor.kind is GGMLQuantizationType.F16:
        return tensor.shape, np.float16
    return tuple(quant_shape_to_byte_shape(tensor.shape, tensor.kind)), np.uint8


def _values(tensor: _Tensor) -> np.ndarray[Any, Any]:
    from gguf import quants

    return quants.quantize(tensor.read().contiguous().numpy(), tensor.kind)


def rotary_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """What divides each rotary frequency (Llama 3.1), float32 ``[head_dim / 2]``, or None.

    Low frequencies are divided by the factor, high ones are left, those between are interpolated
    in the inverse (https://github.com/meta-llama/llama-models, ``apply_scaling``).

    Raises:
        LoramError: another scaling.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise LoramError(
            f"export writes rotary embeddings as they are or as Llama 3.1 scales them, the model's "
            f"rope_type is {kind}; convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    dim = _head_dim(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).float()


def _head_dim(config: PreTrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig, kind: str) -> None:
    from gguf import GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(
    writer: GGUFWriter, directory: Path, size: int, pre_tokenizer: str | None
) -> None:
    from gguf import SpecialVocab, TokenType

    tokenizer = load_tokenizer(directory)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback"):
        raise LoramError(
            f"export writes byte-level BPE vocabularies, {directory} has another; convert it with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or _recognised(backend["pre_tokenizer"], directory))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(directory, load_merges=True, n_vocab=size)
    special.chat_template = _templates(tokenizer.chat_template)
    special.add_special_token = {
        "bos": _adds(tokenizer, tokenizer.bos_token_id, 0),
        "eos": _adds(tokenizer, tokenizer.eos_token_id, -1),
    }
    special.add_to_gguf(writer, quiet=True)


def _templates(given: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    """Chat templates as gguf writes them: one, or several by name."""
    if not isinstance(given, dict):
        return given
    return [{"name": name, "template": template} for name, template in given.items()]


def _adds(tokenizer: Any, token: int | None, place: int) -> bool:
    """Whether the tokenizer itself puts a token at the beginning (0) or end (-1) of a text."""
    ids = tokenizer("a")["input_ids"]
    return token is not None and bool(ids) and ids[place] == token


def _recognised(pre_tokenizer: dict[str, Any], directory: Path) -> str:
    """llama.cpp's name of a pre-tokenisation."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [part["type"] for part in parts]:
        case ["ByteLevel"] if parts[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"]:
            expression = parts[0]["pattern"].get("Regex")
            if expression in _SPLITS and not parts[1]["use_regex"]:
                return _SPLITS[expression]
    raise LoramError(
        f"export.pre_tokenizer must be given, {directory} splits text in a way that is not "
        "recognised; llama.cpp's name of it is in its convert_hf_to_gguf.py"
    )
