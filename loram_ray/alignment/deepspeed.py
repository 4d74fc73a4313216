"""DeepSpeed's dictionary, and weights in and out of its partitions.

Nothing here holds a whole model where ZeRO-3 shares it out: tensors go one by one from safetensors
into partitions, and one by one from partitions to safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from loram_ray.config import AlignConfig
from loram_ray.errors import LoramError
from loram_ray.modeling import DTYPES
from loram_ray.tensorfile import Checkpoint, CheckpointWriter, TensorSpec


def deepspeed_config(config: AlignConfig) -> dict[str, Any]:
    """Build DeepSpeed's dictionary from the stage's settings; a pure function."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size
        // (config.micro_batch_size * config.workers),
        "gradient_clipping": config.optimiser.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.optimiser.learning_rate,
                "weight_decay": config.optimiser.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 2**31,
    }


def import_deepspeed() -> Any:
    """Import DeepSpeed, without the CPU communication kernel that it would compile at start.

    On CPU DeepSpeed builds a shared-memory all-reduce with the machine's C++ compiler: a minute at
    the first start, a race between workers, and a failure where there is no compiler. Declared
    incompatible, DeepSpeed uses torch's gloo instead.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_partitioned(directory: Path, ds_config: dict[str, Any], precision: str) -> PreTrainedModel:
    """Build a model and read its weights tensor by tensor, into ZeRO-3 partitions where asked.

    Args:
        directory: pruned or aligned model.
        ds_config: DeepSpeed's dictionary.
        precision: ``bf16`` or ``fp32``.

    Raises:
        LoramError: the weights lack a parameter of the model.
    """
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    with _default_dtype(DTYPES[precision]), no_init_weights():
        config = AutoConfig.from_pretrained(directory)
        with _partitioning(ds_config) if partitioned else nullcontext():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    with Checkpoint(directory) as checkpoint, torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in checkpoint.location:
                raise LoramError(f"{directory} lacks tensor {name}; prune the base again")
            with _whole([parameter], partitioned, write=True) as writable:
                if writable:
                    parameter.copy_(checkpoint.read(name))
    return model  # type: ignore[no-any-return]


def export_partitioned(
    model: nn.Module, source: Path, target: Path, partitioned: bool, writes: bool
) -> dict[str, str]:
    """Write a model's weights as safetensors, with the names, dtypes and order of ``source``.

    Every worker must call this: partitions are gathered one parameter at a time.

    Args:
        model: the trained model, its parameters named as in ``source``.
        source: directory of the weights that the model was loaded from.
        target: directory to write into.
        partitioned: True under ZeRO-3.
        writes: True on the one worker that writes.

    Returns:
        SHA-256 of each file, empty on the other workers.
    """
    with Checkpoint(source) as checkpoint:
        specs = checkpoint.specs
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not writes:
        for name in specs:
            with _whole([parameters[name]], partitioned, write=False):
                pass
        return {}
    with CheckpointWriter(target, specs) as writer:
        for name, spec in specs.items():
            with _whole([parameters[name]], partitioned, write=False):
                writer.write(name, _as_stored(parameters[name], spec))
    return writer.hashes


def _as_stored(parameter: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return parameter.detach().to(device="cpu", dtype=spec.dtype)


def _partitioning(ds_config: dict[str, Any]) -> Any:
    return import_deepspeed().zero.Init(config_dict_or_path=ds_config)


@contextmanager
def _whole(parameters: list[Any], partitioned: bool, write: bool) -> Iterator[bool]:
    """Have parameters whole inside the block; yields True where they may be written."""
    if not partitioned:
        yield True
        return
    deepspeed = import_deepspeed()
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield torch.distributed.get_rank() == 0


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
