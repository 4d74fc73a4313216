"""Export of a model to one GGUF file, for llama.cpp and tools built on it.

The gguf package provides names and layouts. This module adds the sizes, the order of rotated rows
that llama.cpp expects in Llama's queries and keys, and the factors of Llama 3.1's rotary
frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from loram_ray.errors import LoramError
from loram_ray.models.gguf_vocabulary import Vocabulary, read_vocabulary
from loram_ray.models.tensors import is_recomputed
from loram_ray.models.weights import ModelCheckpoint

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROTATED_IN_PAIRS = "llama"
"""Architecture whose kernels rotate adjacent pairs, where transformers rotates halves."""

_REMEDY = "convert the model with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Source:
    """A model that llama.cpp can run.

    Attributes:
        directory: Directory of the model.
        config: The model's configuration as transformers loads it.
        architecture: llama.cpp's name of the family.
        vocabulary: Vocabulary of the tokenizer.
    """

    directory: Path
    config: PreTrainedConfig
    architecture: str
    vocabulary: Vocabulary

    @property
    def slides(self) -> bool:
        """Whether any layer uses sliding-window attention.

        llama.cpp does not implement it for these families. Both agree up to the window's length, so
        that is written as the context length.
        """
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"]
        return bool(getattr(self.config, "sliding_window", None)) and "sliding_attention" in kinds

    @property
    def context_length(self) -> int:
        """Context length in tokens up to which llama.cpp and transformers agree."""
        longest = int(self.config.max_position_embeddings)
        return min(longest, int(self.config.sliding_window)) if self.slides else longest


def read_source(directory: Path, pre_tokenizer: str | None) -> Source:
    """Check a base or merged model before reading its weights.

    Args:
        directory: Directory of the model.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None detects it.

    Raises:
        LoramError: If llama.cpp does not support the family, a computation or the tokenizer.
    """
    config = AutoConfig.from_pretrained(directory)
    architecture = architecture_of(config.model_type)
    _require_computed(config, architecture)
    vocabulary = read_vocabulary(directory, config, pre_tokenizer)
    return Source(directory, config, architecture, vocabulary)


def _require_computed(config: PreTrainedConfig, architecture: str) -> None:
    """Reject configurations that llama.cpp cannot load or would compute differently.

    Raises:
        LoramError: If there is such a key; the message names the first one.
    """
    llama = architecture == _ROTATED_IN_PAIRS
    if config.hidden_act not in ("silu", "swish"):  # two names for the same function
        raise LoramError(
            f"hidden_act must be silu for export, got {config.hidden_act}, which llama.cpp does "
            "not support in this family; serve the model with vLLM"
        )
    if rotary_factors(config) is not None and not llama:
        raise LoramError(
            "export supports Llama 3.1's scaling of rotary embeddings only for Llama and Mistral, "
            f"got {config.model_type}; serve the model with vLLM"
        )
    if architecture == "qwen3" and config.attention_bias:
        raise LoramError(
            "attention_bias must be false for export, as llama.cpp has no biases in Qwen3; serve "
            "the model with vLLM"
        )
    width = _head_dim(config) * config.num_attention_heads
    if architecture == "qwen2" and width != config.hidden_size:
        raise LoramError(
            f"num_attention_heads times head_dim must equal hidden_size = {config.hidden_size} for "
            f"export of Qwen2, got {width}, which llama.cpp cannot load; serve the model with vLLM"
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write.

    Attributes:
        name: Name of the tensor in the file.
        shape: Shape of the tensor, ``[out, in]`` or ``[n]``.
        kind: Storage type of its values.
        read: Function that returns the tensor, float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]


def write_gguf(source: Source, path: Path, kind: str, advance: Callable[[int], None]) -> None:
    """Write a model, with one tensor in memory at a time.

    Args:
        source: Model to write.
        path: Path of the new file.
        kind: Storage type of matrices, ``f32``, ``bf16``, ``f16`` or ``q8_0``; vectors are float32.
        advance: Function that is called with the size in bytes of each tensor written.
    """
    from gguf import GGUFWriter

    with ModelCheckpoint(source.directory) as checkpoint:
        tensors = list(_tensors(checkpoint, source, kind))
        writer = GGUFWriter(path, source.architecture)
        try:
            _add_sizes(writer, source, kind)
            source.vocabulary.add_to(writer)
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


def size_of(source: Source, kind: str) -> int:
    """Return the total size in bytes of the tensors that `write_gguf` writes."""
    with ModelCheckpoint(source.directory) as checkpoint:
        stored = (_stored(tensor) for tensor in _tensors(checkpoint, source, kind))
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stored)


def architecture_of(model_type: str) -> str:
    """Return llama.cpp's name of a family.

    Raises:
        LoramError: If the family cannot be exported.
    """
    if model_type not in _NAMES:
        raise LoramError(
            f"export supports {', '.join(_NAMES)}, got {model_type}; convert the model with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return _NAMES[model_type]


def _tensors(checkpoint: ModelCheckpoint, source: Source, kind: str) -> Iterator[_Tensor]:
    import gguf

    config, architecture = source.config, source.architecture
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    own_head = checkpoint.has_own_head()
    for key, spec in checkpoint.specs.items():
        if is_recomputed(key):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LoramError(f"export cannot write tensor {key} to GGUF; {_REMEDY}")
        if not own_head and name == "output.weight":
            continue
        heads = 0
        if architecture == _ROTATED_IN_PAIRS and ".attn_q." in name:
            heads = config.num_attention_heads
        if architecture == _ROTATED_IN_PAIRS and ".attn_k." in name:
            heads = config.num_key_value_heads

        def read(key: str = key, heads: int = heads) -> torch.Tensor:
            tensor = checkpoint.read(key).float()
            return _in_pairs(tensor, heads) if heads else tensor

        yield _Tensor(name, spec.shape, _kind_of(spec.shape, kind), read)
    factors = rotary_factors(config)
    if factors is not None:
        shape = tuple(factors.shape)
        yield _Tensor("rope_freqs.weight", shape, _kind_of(shape, kind), lambda: factors)


def _in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows ``[heads * head_dim, ...]`` so that rows rotated together are adjacent."""
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
    """Return the shape and dtype of the array that stores a tensor."""
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
    """Return the divisors of the rotary frequencies, float32 ``[head_dim / 2]``, or None.

    Llama 3.1 divides low frequencies by the factor, keeps high ones, and interpolates those in
    between in the inverse (https://github.com/meta-llama/llama-models, ``apply_scaling``).

    Raises:
        LoramError: If the model uses another scaling.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise LoramError(
            "export supports default rotary embeddings and Llama 3.1's scaling, got rope_type "
            f"{kind}; convert the model with llama.cpp's convert_hf_to_gguf.py"
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


def _add_sizes(writer: GGUFWriter, source: Source, kind: str) -> None:
    from gguf import GGUFType, LlamaFileType

    config = source.config
    writer.add_type(GGUFType.MODEL)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_context_length(source.context_length)
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
