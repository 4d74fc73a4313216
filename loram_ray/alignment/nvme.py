"""What DeepSpeed leaves to do where the optimiser's state or the parameters are on NVMe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.errors import LoramError


def require_async_io(ds_config: Mapping[str, Any]) -> None:
    """Refuse to offload to NVMe where DeepSpeed cannot build what reads and writes there.

    Raises:
        LoramError: this machine lacks libaio, or a compiler.
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
                    f"align.{ours} = nvme needs libaio with its headers and a C++ compiler on the "
                    "machines of the workers; install them (libaio-dev, g++) or offload to cpu"
                )


def size_swap_buffers(ds_config: dict[str, Any], models: Iterable[Path], workers: int) -> None:
    """Make buffers of parameters on NVMe as large as the largest partition, in place.

    DeepSpeed's have 10^8 elements, whatever a model has: an eighth of a 70B model's embeddings does
    not fit, and for a small model it is gigabytes. A user's own ``buffer_size`` stays.

    Args:
        ds_config: of `deepspeed_config`.
        models: directories of the models that are partitioned.
        workers: how many there are.
    """
    parameters = ds_config["zero_optimization"].get("offload_param", {})
    if parameters.get("device") == "nvme" and "buffer_size" not in parameters:
        largest = 0
        for model in models:
            with Checkpoint(model) as checkpoint:
                largest = max(largest, *(prod(spec.shape) for spec in checkpoint.specs.values()))
        parameters["buffer_size"] = -(-largest // workers)


def require_all_swapped(engine: Any) -> None:
    """Refuse an optimiser on NVMe of which a part is too small for DeepSpeed to swap.

    Such parts are not in its checkpoints, and a run could not go on from them.

    Raises:
        LoramError: there is one.
    """
    swapper = engine.optimizer.optimizer_swapper
    sizes = engine.optimizer.fp16_partitioned_groups_flat_numel
    if small := [size for size in sizes if not swapper.is_swappable_tensor(numel=size)]:
        raise LoramError(
            "align.offload_optimiser = nvme needs at least a MiB of each worker's part of the "
            f"optimiser, it has {min(small)} numbers of 4 bytes in one; use fewer workers, change "
            "sub_group_size in align.deepspeed, or offload to cpu"
        )


def load_swapped(engine: Any, checkpoint: Path, tag: str) -> dict[str, Any]:
    """Load a checkpoint of an optimiser on NVMe, so that training goes on as if never cut.

    DeepSpeed copies the files that it swapped and no more. A fresh engine would not read the
    moments among them, for it knows of none before its first step, which is therefore done here
    without gradients, at a learning rate of zero; and it would begin AdamW's count of steps and the
    learning rate anew.

    Args:
        engine: whose optimiser is on NVMe.
        checkpoint: directory of it.
        tag: name of the state in it.

    Returns:
        What was saved as the client's state, ``steps`` among it.
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
