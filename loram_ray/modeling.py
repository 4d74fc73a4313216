"""Loading base and pruned models.

The pruned classes themselves are in `modeling_pruned`, which is copied beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loram_ray.errors import LoramError
from loram_ray.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(
    directory: Path | str,
    precision: str = "bf16",
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a base, pruned, aligned, quantised or merged model directory.

    A quantised model's linears stay in NF4 and multiply in the precision, but for those that
    bitsandbytes cannot compute on CPUs (`nf4.mend_on_cpu`).

    Args:
        directory: the model.
        precision: ``bf16`` or ``fp32``.
        device: where its weights go.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None is transformers' choice.

    Raises:
        LoramError: an attention that the family or the machine does not have.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[precision],
            device_map={"": device},
            attn_implementation=attention,
        )
    except (ImportError, ValueError) as error:
        if attention is None:
            raise
        raise LoramError(
            f"attention = {attention} cannot be used for {directory} "
            f"({' '.join(str(error).split()):.300}); install what it needs or leave it out"
        ) from error
    if getattr(model, "is_loaded_in_4bit", False):
        from loram_ray.nf4 import compute_in, mend_on_cpu

        for parameter in model.parameters():  # transformers leaves what is not quantised as stored
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[precision])
        compute_in(model, DTYPES[precision])
        mend_on_cpu(model)
    return model


def parameters_and_bytes(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Count parameters, a quantised one as its weights, and the bytes that hold them."""
    count = nbytes = 0
    for parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        count += parameter.numel() if state is None else math.prod(state.shape)
        nbytes += parameter.nbytes
        if state is not None:
            nbytes += sum(part.nbytes for part in state.as_dict(packed=True).values())
    return count, nbytes


def load_pruned(directory: Path | str, precision: str = "bf16") -> PreTrainedModel:
    """Load a pruned or aligned model as an ordinary `PreTrainedModel`.

    Args:
        directory: written by prune, align or quantize.
        precision: ``bf16`` or ``fp32``.

    Raises:
        LoramError: the directory holds no pruning plan.
    """
    PruningPlan.load(directory)
    return load_model(directory, precision)
