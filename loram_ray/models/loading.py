"""Loading of base and pruned models.

The pruned classes are in `modeling_pruned`, which is copied beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loram_ray.artifacts.tensorfile import require_finite
from loram_ray.errors import LoramError
from loram_ray.models.weights import ModelCheckpoint
from loram_ray.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_ADAPTER = "no adapter"
"""Folder in which Transformers looks for an adapter's configuration. By default it is the model's,
and Transformers would silently apply an adapter next to the weights.
"""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(
    directory: Path | str,
    precision: str = "bf16",
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a base, pruned, aligned, quantised or merged model directory.

    The linears of a quantised model stay in NF4 and multiply in ``precision``, except those that
    bitsandbytes cannot compute on CPUs (`nf4.work_around_cpu_kernels`).

    Args:
        directory: Directory of the model.
        precision: Precision of weights and activations, ``bf16`` or ``fp32``.
        device: Device of the weights.
        attention: Attention implementation, ``sdpa``, ``eager`` or ``flash_attention_2``; None lets
            transformers choose.

    Raises:
        LoramError: If the weights do not match the model's configuration or are not finite, or the
            attention is not available for the family or on the machine.
    """
    from transformers import AutoModelForCausalLM

    with ModelCheckpoint(directory):
        pass
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=DTYPES[precision],
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            adapter_kwargs={"subfolder": _NO_ADAPTER},
        )
    except (ImportError, ValueError) as error:
        reason = f"{' '.join(str(error).split()):.300}"
        if attention is None:
            raise LoramError(
                f"{directory} cannot be loaded ({reason}); restore its config.json"
            ) from error
        raise LoramError(
            f"attention = {attention} cannot be used for {directory} ({reason}); install what it "
            "needs, or remove it"
        ) from error
    _require_finite(model, directory)
    if getattr(model, "is_loaded_in_4bit", False):
        from loram_ray.models.nf4 import compute_in, work_around_cpu_kernels

        for parameter in model.parameters():  # Transformers keeps the rest in the stored dtype
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[precision])
        compute_in(model, DTYPES[precision])
        work_around_cpu_kernels(model)
    return model


def _require_finite(model: PreTrainedModel, directory: Path | str) -> None:
    """Check that loaded weights, and the scales of quantised ones, are finite."""
    for name, parameter in model.named_parameters():
        require_finite(name, parameter, directory)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for part, scale in state.as_dict(packed=False).items():
                if isinstance(scale, torch.Tensor):
                    require_finite(f"{name}.{part}", scale, directory)
                elif isinstance(scale, float):
                    require_finite(f"{name}.{part}", torch.tensor(scale), directory)


def parameters_and_bytes(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Return the number of parameters, counted before quantisation, and their size in bytes."""
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
        directory: Directory written by prune, align or quantize.
        precision: Precision of weights and activations, ``bf16`` or ``fp32``.

    Raises:
        LoramError: If the directory holds no pruning plan.
    """
    PruningPlan.load(directory)
    return load_model(directory, precision)
