"""NF4 with double quantisation, as transformers stores it: bitsandbytes' tensors of one linear.

Blocks of 64 weights share an 8-bit scale, and blocks of 256 scales a float32 one (QLoRA, section 3,
https://arxiv.org/abs/2305.14314): 4.127 bits a weight. bitsandbytes quantises a weight at once, for
which it forms 16 differences for each element; here a weight is quantised in pieces, whose blocks
are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.models.quantisation import NF4

QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 2**21  # elements, whole blocks
_CODES, _CODES_OF_SCALES = 16, 256


def quantization_config() -> BitsAndBytesConfig:
    """Configuration for transformers of what is written here, with bfloat16 products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4.name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, NF4.compute),
    )


def linears_to_quantize(directory: Path) -> list[str]:
    """Paths of the linears that transformers would quantise on loading this model.

    They are all but the output head, what is tied and the last module. Only the configuration is
    read.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return linears_of(model)


def linears_of(model: PreTrainedModel) -> list[str]:
    """Paths of the linears of a model, on any device, that transformers would quantise."""
    kept = HfQuantizer.get_modules_to_not_convert(
        model, None, list(model._keep_in_fp32_modules or ())
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, kept)
    ]


def scales(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block of a weight, float32 ``[ceil(elements / 64)]``."""
    flat = weight.detach().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % NF4.block))
    return padded.view(-1, NF4.block).abs().amax(-1).float()


def stored_specs(weight: TensorSpec, mean_scale: torch.Tensor) -> dict[str, TensorSpec]:
    """Shape and dtype of each stored tensor of a linear, by what follows ``weight`` in its name.

    All but one follow from the weight's. The mean of its scales is written out as text, in a tensor
    that is as long as the text.

    Args:
        weight: ``[out, in]``.
        mean_scale: of `scales`.
    """
    blocks = -(-math.prod(weight.shape) // NF4.block)
    state = _state(
        weight,
        codes=torch.empty(_CODES),
        scale_codes=torch.empty(blocks, dtype=torch.uint8),
        mean_scale=mean_scale,
        nested=bnb.QuantState(
            absmax=torch.empty(-(-blocks // NF4.block_of_scales)),
            code=torch.empty(_CODES_OF_SCALES),
            blocksize=NF4.block_of_scales,
            dtype=torch.float32,
        ),
    )
    packed = TensorSpec((-(-math.prod(weight.shape) // 2), 1), torch.uint8)
    parts = {
        f".{part}": TensorSpec(tuple(tensor.shape), tensor.dtype)
        for part, tensor in state.as_dict(packed=True).items()
    }
    return {"": packed, **parts}


def quantize_weight(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantise a weight ``[out, in]`` on its device; the names are those of `stored_specs`."""
    packed, found = [], []
    codes = torch.empty(0)
    for piece in weight.detach().reshape(-1).split(_PIECE):
        part, state = bnb.quantize_4bit(piece, blocksize=NF4.block, quant_type=NF4.name)
        packed.append(part)
        found.append(state.absmax)
        codes = state.code
    scale = torch.cat(found)
    mean_scale = scale.mean()
    scale_codes, nested = bnb.quantize_blockwise(scale - mean_scale, blocksize=NF4.block_of_scales)
    spec = TensorSpec(tuple(weight.shape), weight.dtype)
    state = _state(spec, codes, scale_codes, mean_scale, nested)
    parts = {f".{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {"": torch.cat(packed), **parts}


def dequantize_weight(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight ``[out, in]`` that training computes with, in the dtype that it had.

    Args:
        stored: its tensors; the names are those of `stored_specs`.
    """
    packed = stored[""]
    parts = {part: tensor for part, tensor in stored.items() if part}
    return _dequantized(packed, bnb.QuantState.from_dict(parts, packed.device))


def mend_on_cpu(model: PreTrainedModel) -> list[str]:
    """Make a quantised model that is on the CPU compute, and pass gradients, as on a GPU.

    bitsandbytes' kernels for CPUs (0.50.2) are wrong in two ways. Where AVX512 has bfloat16, a
    forward pass without gradients repacks a weight for good, after which no gradient passes: that
    is turned off. A linear whose inputs are no multiple of the block of 64 is computed with scales
    of other blocks: it is held in the model's precision instead.

    Returns:
        The linears that are held so.
    """
    held = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit) or module.weight.device.type != "cpu":
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % NF4.block:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _whole(module, model.dtype))
            held.append(name)
    return held


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have a quantised model multiply in a type, whatever its configuration names.

    bitsandbytes takes the type of the configuration, bfloat16, for inputs of any other: float32
    inputs were rounded, and on CPUs without such instructions the products took twice the time.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype  # the type that a backward pass makes it in


def _whole(linear: Linear4bit, dtype: torch.dtype) -> torch.nn.Linear:
    """A linear of the same weight, not quantised any more."""
    weight = _dequantized(linear.weight.data, linear.weight.quant_state)
    with torch.device("meta"):
        whole = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    whole.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    whole.bias = linear.bias
    return whole


def _dequantized(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantise a weight as one row, whose blocks are all full but the last.

    That is what bitsandbytes' kernel for CPUs reads rightly; the state is spent.
    """
    shape = state.shape
    state.shape = torch.Size([math.prod(shape)])
    return bnb.dequantize_4bit(packed, state).reshape(shape)


def _state(
    weight: TensorSpec,
    codes: torch.Tensor,
    scale_codes: torch.Tensor,
    mean_scale: torch.Tensor,
    nested: bnb.QuantState,
) -> bnb.QuantState:
    """What bitsandbytes keeps beside the packed weight, and turns into tensors and text."""
    return bnb.QuantState(
        absmax=scale_codes,
        shape=torch.Size(weight.shape),
        code=codes,
        blocksize=NF4.block,
        quant_type=NF4.name,
        dtype=weight.dtype,
        offset=mean_scale,
        state2=nested,
    )
