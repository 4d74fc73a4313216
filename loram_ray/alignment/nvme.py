"""Fill gaps in DeepSpeed's support for optimizer state and parameters on NVMe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.errors import LoramError


def require_async_io(ds_config: Mapping[str, Any]) -> None:
    """Refuse NVMe offload if DeepSpeed cannot build its asynchronous I/O.

    Raises:
        LoramError: If the machine lacks libaio or a compiler.
    """
    zero = ds_config["zero_optimization"]
    for key, ours in (
        ("offload_optimizer", "offload_optimiser"),
        ("offload_param", "offload_parameters"),
    ):
        if zero.get(key, {}).get("device") == "nvme":
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not AsyncIOBuilder().is_compatible(verbose=False):
                raise LoramError(
                    f"align.{ours} = nvme needs libaio with headers and a C++ compiler on the "
                    "workers' machines; install libaio-dev and g++, or offload to cpu"
                )


def size_swap_buffers(ds_config: dict[str, Any], models: Iterable[Path], workers: int) -> None:
    """Set the size of parameter swap buffers to the largest partition, in place.

    DeepSpeed's default of 10^8 elements is too small for an eighth of a 70B model's embeddings, and
    wastes gigabytes for small models. An explicit ``buffer_size`` is kept.

    Args:
        ds_config: Configuration returned by `deepspeed_config`.
        models: Directories of the partitioned models.
        workers: Number of workers.
    """
    parameters = ds_config["zero_optimization"].get("offload_param", {})
    if parameters.get("device") == "nvme" and "buffer_size" not in parameters:
        largest = 0
        for model in models:
            with Checkpoint(model) as checkpoint:
                largest = max(largest, *(prod(spec.shape) for spec in checkpoint.specs.values()))
        parameters["buffer_size"] = -(-largest // workers)


def require_all_swapped(engine: Any) -> None:
    """Refuse an optimizer on NVMe with parts too small for DeepSpeed to swap.

    Such parts are missing from its checkpoints, so a run could not resume from them.

    Raises:
        LoramError: If there is such a part.
    """
    swapper = engine.optimizer.optimizer_swapper
    sizes = engine.optimizer.fp16_partitioned_groups_flat_numel
    if small := [size for size in sizes if not swapper.is_swappable_tensor(numel=size)]:
        raise LoramError(
            "align.offload_optimiser = nvme needs at least 1 MiB in each part of a worker's "
            f"optimiser state, got a part of {min(small)} float32 values; use fewer workers, "
            "change sub_group_size in align.deepspeed, or offload to cpu"
        )


def load_swapped(engine: Any, checkpoint: Path, tag: str) -> dict[str, Any]:
    """Load a checkpoint with optimizer state on NVMe so that training resumes exactly.

    DeepSpeed only copies its swap files. A fresh engine would ignore the moments in them, since it
    knows of none before its first step; that step is therefore run here without gradients and at a
    learning rate of zero. AdamW's step count and the learning rate, which would restart, are
    restored.

    Args:
        engine: Engine with its optimizer on NVMe.
        checkpoint: Directory of the checkpoint.
        tag: Name of the state in the checkpoint.

    Returns:
        The saved client state, including ``steps``.
    """
    zero, optimiser = engine.optimizer, engine.optimizer.optimizer
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    for number, part in enumerate(zero.fp32_partitioned_groups_flat):
        zero._optimizer_states_and_gradient_swap_in(number)
        part.grad = torch.zeros_like(part)
        zero._optimizer_step(number)
        zero._optimizer_states_and_gradient_swap_out(number)
    _, state = engine.load_checkpoint(str(checkpoint), tag=tag, load_module_strict=False)
    for of_part in optimiser.state.values():
        if isinstance(of_part["step"], torch.Tensor):
            of_part["step"].fill_(state["steps"])
        else:
            of_part["step"] = state["steps"]
    rates = engine.lr_scheduler.get_last_lr()
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    return dict(state)
