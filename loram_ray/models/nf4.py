"""NF4 with double quantisation, stored as in transformers: bitsandbytes' tensors of one linear.

Blocks of 64 weights share an 8-bit scale, and blocks of 256 scales share a float32 scale (QLoRA,
section 3, https://arxiv.org/abs/2305.14314): 4.127 bits per weight. bitsandbytes quantises a whole
weight at once and needs 16 differences per element; here a weight is quantised in pieces, with the
same blocks.
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
from loram_ray.models.quantisation import NF4, Quantisation

QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 2**21
_CODES, _CODES_OF_SCALES = 16, 256


def quantization_config(form: Quantisation = NF4) -> BitsAndBytesConfig:
    """Return transformers' configuration of these weights, with bfloat16 products."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form.name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, form.compute),
    )


def linears_to_quantize(directory: Path) -> list[str]:
    """Return the paths of the linears that transformers would quantise on loading this model.

    These are all but the output head, tied modules and the last module. Only the configuration is
    read.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return linears_of(model)


def linears_of(model: PreTrainedModel) -> list[str]:
    """Return the paths of a model's linears, on any device, that transformers would quantise."""
    kept = HfQuantizer.get_modules_to_not_convert(
        model, None, list(model._keep_in_fp32_modules or ())
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, kept)
    ]


def scales(weight: torch.Tensor) -> torch.Tensor:
    """Return the maximum magnitude of each block, float32 ``[ceil(elements / 64)]``."""
    flat = weight.detach().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % NF4.block))
    return padded.view(-1, NF4.block).abs().amax(-1).float()


def stored_specs(
    weight: TensorSpec, mean_scale: torch.Tensor, form: Quantisation = NF4
) -> dict[str, TensorSpec]:
    """Return the shape and dtype of each stored tensor of a linear, by the suffix after ``weight``.

    All but one follow from the weight's shape and dtype. The mean of its scales is stored as text,
    and the length of that tensor is the length of the text.

    Args:
        weight: Shape ``[out, in]`` and dtype of the weight.
        mean_scale: Mean of the weight's scales, see `scales`.
        form: Format of the codes.
    """
    blocks = -(-math.prod(weight.shape) // form.block)
    state = _state(
        weight,
        codes=torch.empty(_CODES),
        scale_codes=torch.empty(blocks, dtype=torch.uint8),
        mean_scale=mean_scale,
        nested=bnb.QuantState(
            absmax=torch.empty(-(-blocks // form.block_of_scales)),
            code=torch.empty(_CODES_OF_SCALES),
            blocksize=form.block_of_scales,
            dtype=torch.float32,
        ),
        form=form,
    )
    packed = TensorSpec((-(-math.prod(weight.shape) // 2), 1), torch.uint8)
    parts = {
        f".{part}": TensorSpec(tuple(tensor.shape), tensor.dtype)
        for part, tensor in state.as_dict(packed=True).items()
    }
    return {"": packed, **parts}


def quantize_weight(
    weight: torch.Tensor, piece: int = _PIECE, form: Quantisation = NF4
) -> dict[str, torch.Tensor]:
    """Quantise a weight ``[out, in]`` on its device; names are those of `stored_specs`.

    Args:
        weight: Weight to quantise.
        piece: Number of elements to quantise at a time, a multiple of the block size.
        form: Format of the codes.
    """
    packed, found = [], []
    codes = torch.empty(0)
    for elements in weight.detach().reshape(-1).split(piece):
        part, state = bnb.quantize_4bit(elements, blocksize=form.block, quant_type=form.name)
        packed.append(part)
        found.append(state.absmax)
        codes = state.code
    scale = torch.cat(found)
    mean_scale = scale.mean()
    scale_codes, nested = bnb.quantize_blockwise(scale - mean_scale, blocksize=form.block_of_scales)
    spec = TensorSpec(tuple(weight.shape), weight.dtype)
    state = _state(spec, codes, scale_codes, mean_scale, nested, form)
    parts = {f".{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {"": torch.cat(packed), **parts}


def dequantize_weight(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight ``[out, in]`` that training computes with, in its original dtype.

    Args:
        stored: Stored tensors of the weight; names are those of `stored_specs`.
    """
    packed = stored[""]
    parts = {part: tensor for part, tensor in stored.items() if part}
    return _dequantized(packed, bnb.QuantState.from_dict(parts, packed.device))


def work_around_cpu_kernels(model: PreTrainedModel) -> list[str]:
    """Make a quantised model on the CPU compute and backpropagate as on a GPU.

    bitsandbytes' CPU kernels (0.50.2) are wrong in two ways. With AVX512 bfloat16, a forward pass
    without gradients repacks a weight permanently, and no gradient passes afterwards; this path is
    turned off. A linear whose number of inputs is not a multiple of the block size 64 uses the
    scales of other blocks; its weight is dequantised to the model's precision instead.

    Returns:
        Names of the dequantised linears.
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
    """Set the dtype in which a quantised model multiplies, whatever its configuration says.

    By default bitsandbytes uses the dtype of the configuration, bfloat16, for all inputs. It rounds
    float32 inputs, and on CPUs without bfloat16 instructions the products take twice as long.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype  # for dequantisation in backward


def _whole(linear: Linear4bit, dtype: torch.dtype) -> torch.nn.Linear:
    """Return an unquantised linear with the same weight."""
    weight = _dequantized(linear.weight.data, linear.weight.quant_state)
    with torch.device("meta"):
        whole = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    whole.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    whole.bias = linear.bias
    return whole


def _dequantized(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantise a weight as one row, in which all blocks but the last are full.

    bitsandbytes' CPU kernel only reads this layout correctly. The state must not be used again.
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
    form: Quantisation,
) -> bnb.QuantState:
    """Return the state that bitsandbytes saves, as tensors and text, with the packed weight."""
    return bnb.QuantState(
        absmax=scale_codes,
        shape=torch.Size(weight.shape),
        code=codes,
        blocksize=form.block,
        quant_type=form.name,
        dtype=weight.dtype,
        offset=mean_scale,
        state2=nested,
    )
