"""Count parameters and bytes of a base and of its pruned model, also in NF4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loram_ray.artifacts.tensorfile import TensorSpec
from loram_ray.models.quantisation import NF4

_BF16 = 2


@dataclass(frozen=True)
class Sizes:
    """Size of a model.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        bf16: Bytes in bfloat16.
        nf4_nominal: Bytes at four bits per parameter, embeddings included, as the paper counts.
        nf4_stored: Bytes of the tensors that `quantize` writes: codes, scales, and unquantised
            weights (embeddings, ``lm_head``, norms) in bfloat16. The mean of a weight's scales is
            stored as text, for which a typical length is assumed.
        nf4_loaded: Bytes of the same tensors on a GPU, without the text.
    """

    parameters: int
    bf16: int
    nf4_nominal: float
    nf4_stored: int
    nf4_loaded: int


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Return the sizes of a model, regardless of its device and dtype."""
    from loram_ray.models.nf4 import linears_of

    count = sum(parameter.numel() for parameter in model.parameters())
    stored = loaded = _BF16 * count
    for name in linears_of(model):
        weight = model.get_parameter(f"{name}.weight")
        parts = _nf4_parts(tuple(weight.shape))
        stored += sum(parts.values()) - _BF16 * weight.numel()
        loaded += sum(n for part, n in parts.items() if "quant_state" not in part)
        loaded -= _BF16 * weight.numel()
    return Sizes(count, _BF16 * count, _BF16 * count / NF4.times_fewer(8 * _BF16), stored, loaded)


def _nf4_parts(shape: tuple[int, ...]) -> dict[str, int]:
    from loram_ray.models.nf4 import stored_specs

    usual = torch.tensor(0.0314159)
    specs = stored_specs(TensorSpec(shape, torch.bfloat16), usual)
    return {part: spec.nbytes for part, spec in specs.items()}
