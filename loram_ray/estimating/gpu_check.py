"""Check that a training run fits a GPU before loading anything onto it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loram_ray.artifacts.manifest import read_model_config
from loram_ray.config import TrainConfig
from loram_ray.errors import LoramError
from loram_ray.estimating.gpus import GAPS
from loram_ray.estimating.memory_trace import training_memory
from loram_ray.models.files import family_of

_GB = 1e9
_SHORTEST = 128


def require_memory(config: TrainConfig, free: int, adapters: int = 1) -> None:
    """Refuse a training run that needs more memory than a GPU has free.

    Mixtures of experts are not checked, since their routing depends on the data.

    Args:
        config: Configuration of the stage.
        free: Free bytes on the GPU.
        adapters: Number of adapters trained at a time on one copy of the model.

    Raises:
        LoramError: If the memory does not suffice; the message suggests settings that fit.
    """
    settings, family = read_model_config(config.model), family_of(config.model)
    if family.geometry(settings).num_experts:
        return
    quantized = "quantization_config" in settings
    usable = free * (1 - GAPS)

    def needed(config: TrainConfig) -> int:
        return training_memory(settings, family, config, quantized).for_adapters(adapters)

    asked = needed(config)
    if asked <= usable:
        return
    remedy = next(
        (_described(changes) for changes, changed in _smaller(config) if needed(changed) <= usable),
        "use a larger GPU" if quantized else "quantise the model or use a larger GPU",
    )
    if adapters > 1:
        remedy = f"lower batch.adapters_per_worker = {adapters}, or {remedy}"
    raise LoramError(
        f"train needs {asked / _GB:.1f} GB of GPU memory for {config.model}, but "
        f"{usable / _GB:.1f} GB are free; {remedy}"
    )


def _smaller(config: TrainConfig) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
    """Yield changes that need less and less memory, each with the changed configuration."""
    changes: dict[str, Any] = {}
    if not config.activation_checkpointing:
        changes["activation_checkpointing"] = True
        yield changes, config.model_copy(update=changes)
    batch, length = config.micro_batch_size, config.max_length
    while batch > 1 or length > _SHORTEST:
        if batch > 1:
            batch = max(n for n in range(1, batch) if config.batch_size % n == 0)
            changes["micro_batch_size"] = batch
        else:
            length = max(_SHORTEST, length // 2)
            changes["max_length"] = length
        yield changes, config.model_copy(update=changes)


def _described(changes: dict[str, Any]) -> str:
    return "set " + ", ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())
