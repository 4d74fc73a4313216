"""Start DeepSpeed's engine on a pruned model, from scratch or from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from loram_ray.alignment.checkpoints import TAG, Progress
from loram_ray.alignment.deepspeed_config import (
    deepspeed_config,
    import_deepspeed,
    load_partitioned,
)
from loram_ray.alignment.nvme import (
    load_swapped,
    require_all_swapped,
    require_async_io,
    size_swap_buffers,
)
from loram_ray.alignment.objective import AlignmentModel
from loram_ray.config import AlignConfig


def start_engine(
    config: AlignConfig,
    user_config: Mapping[str, Any],
    teacher: Path | None,
    workers: int,
    checkpoint: Path | None,
    universal: bool,
) -> tuple[Any, Progress]:
    """Start DeepSpeed from a checkpoint, or from the pruned model.

    Args:
        config: Configuration of the stage.
        user_config: DeepSpeed configuration supplied by the user.
        teacher: Directory of the base, if distillation is live.
        workers: Number of workers.
        checkpoint: Checkpoint returned by `checkpoints.last_checkpoint`.
        universal: Whether the checkpoint is universal, as returned by
            `checkpoints.last_checkpoint`.

    Returns:
        The engine, whose module is an `AlignmentModel`, and its progress.

    Raises:
        LoramError: If a part of an optimizer on NVMe could not be restored later.
    """
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)  # uses Ray Train's process group
    torch.manual_seed(config.seed)
    ds_config = deepspeed_config(config, user_config, workers)
    require_async_io(ds_config)
    size_swap_buffers(ds_config, [config.pruned, *([teacher] if teacher else [])], workers)
    if universal:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    model = load_partitioned(config.pruned, ds_config, config.precision)
    model.train()
    freeze(model, config.frozen)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = None
    if teacher is not None:  # ZeRO-3 also partitions the base
        base = load_partitioned(teacher, ds_config, config.precision)
        base.requires_grad_(False)
    engine, *_ = deepspeed.initialize(
        model=AlignmentModel(model, config, base),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: _schedule(optimizer, config),
        dist_init_required=False,
    )
    swapped = engine.zero_nvme_offload_optimizer()
    if swapped:
        require_all_swapped(engine)
    if checkpoint is None:
        return engine, Progress(0, 0.0)
    if swapped:
        state = load_swapped(engine, checkpoint, TAG)
    else:
        _, state = engine.load_checkpoint(str(checkpoint), tag=TAG, load_module_strict=False)
    return engine, Progress(int(state["steps"]), float(state["seconds"]))


def _schedule(optimizer: torch.optim.Optimizer, config: AlignConfig) -> Any:
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    warmup = config.optimiser.warmup_steps
    if config.optimiser.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    return get_cosine_schedule_with_warmup(optimizer, warmup, config.total_steps)


def freeze(model: Any, frozen: Collection[str]) -> None:
    """Freeze parts of a causal LM; see ``align.frozen``."""
    if "lm_head" in frozen:
        model.get_output_embeddings().requires_grad_(False)
    if "embeddings" in frozen:
        model.get_input_embeddings().requires_grad_(False)
    if "norms" in frozen:
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(False)
