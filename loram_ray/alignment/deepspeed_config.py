"""Build DeepSpeed's configuration, and move weights into and out of its partitions.

Under ZeRO-3 no function here holds a whole model: tensors move one at a time between safetensors
and partitions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loram_ray.artifacts.tensorfile import CheckpointWriter, TensorSpec
from loram_ray.config import AlignConfig
from loram_ray.errors import LoramError
from loram_ray.models.loading import DTYPES
from loram_ray.models.tensors import is_recomputed
from loram_ray.models.weights import ModelCheckpoint
from loram_ray.runtime.memory import freed_memory_returned
from loram_ray.utils.parsing import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def deepspeed_config(
    config: AlignConfig, user_config: Mapping[str, Any], workers: int
) -> dict[str, Any]:
    """Build DeepSpeed's configuration from the stage's settings.

    Args:
        config: Configuration of the stage.
        user_config: DeepSpeed configuration supplied by the user. Its values take precedence, key
            by key and at any depth; ``"auto"`` leaves a key to the settings. Keys that the settings
            determine (batch sizes, clipping, precision) must be omitted, be ``"auto"`` or agree
            with them.
        workers: Number of workers.

    Raises:
        LoramError: If it contradicts the settings or configures what the training loop handles.
    """
    return _joined(_own(config, workers), user_config, "")


def _own(config: AlignConfig, workers: int) -> dict[str, Any]:
    optimiser, accumulation = config.optimiser, config.accumulation(workers)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    for key, place in (
        ("offload_optimizer", config.offload_optimiser),
        ("offload_param", config.offload_parameters),
    ):
        if place != "none":
            folder = {"nvme_path": str(config.offload_dir)} if place == "nvme" else {}
            zero[key] = {"device": place, **folder}
    offloads = config.offload_optimiser != "none"
    return {
        # including the micro-batches without labels
        "train_batch_size": workers * accumulation * config.micro_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimiser.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
        # torch's AdamW, instead of DeepSpeed's compiled CPU optimizer
        **({"zero_force_ds_cpu_optimizer": False} if offloads else {}),
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimiser.learning_rate,
                "weight_decay": optimiser.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 2**31,
    }


_DECIDED = {
    "train_batch_size": "align.batch_size",
    "train_micro_batch_size_per_gpu": "align.micro_batch_size",
    "gradient_accumulation_steps": "align.batch_size and align.micro_batch_size",
    "gradient_clipping": "align.optimiser.max_grad_norm",
    "bf16.enabled": "align.precision",
    "zero_optimization.stage": "align.zero_stage",
    "optimizer.params.lr": "align.optimiser.learning_rate",
    "optimizer.params.weight_decay": "align.optimiser.weight_decay",
}
_REFUSED = {
    "scheduler": "align.optimiser.schedule and warmup_steps",
    "fp16": "align.precision (bf16 or fp32)",
    "amp": "align.precision (bf16 or fp32)",
    "activation_checkpointing": "align.activation_checkpointing",
}


def _joined(own: dict[str, Any], user_config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    joined = dict(own)
    if prefix == "optimizer." and user_config.get("type", own["type"]) != own["type"]:
        joined["params"] = {k: v for k, v in own["params"].items() if k != "torch_adam"}
    for key, value in user_config.items():
        path = f"{prefix}{key}"
        if path in _REFUSED:
            raise LoramError(
                f"align.deepspeed must not set {path}: use {_REFUSED[path]}; remove it"
            )
        if value == "auto":
            if key not in own:
                raise LoramError(
                    f"align.deepspeed must not set {path} to auto, as no other key determines it; "
                    "set a value"
                )
        elif isinstance(value, Mapping):
            inner = joined.get(key)
            joined[key] = _joined(inner if isinstance(inner, dict) else {}, value, f"{path}.")
        elif path in _DECIDED and value != own.get(key, value):
            raise LoramError(
                f"align.deepspeed sets {path} to {value}, but {_DECIDED[path]} requires "
                f"{own[key]}; change one of them or remove it from the file"
            )
        else:
            joined[key] = value
    return joined


def read_user_config(path: Path | None) -> dict[str, Any]:
    """Read the user's DeepSpeed JSON file; return an empty dictionary without one.

    Raises:
        LoramError: If it is missing or does not hold a JSON object.
    """
    if path is None:
        return {}
    return read_json(path, "align.deepspeed", remedy="fix the file")


def import_deepspeed() -> Any:
    """Import DeepSpeed without compiling its CPU communication kernel.

    On CPU, DeepSpeed compiles a shared-memory all-reduce at startup, which takes a minute, races
    between workers and fails without a compiler. Marking the kernel as incompatible makes DeepSpeed
    use torch's gloo instead.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@freed_memory_returned()
def load_partitioned(directory: Path, ds_config: dict[str, Any], precision: str) -> PreTrainedModel:
    """Build a model and load its weights tensor by tensor, into ZeRO-3 partitions if configured.

    Args:
        directory: Directory of a pruned or aligned model.
        ds_config: DeepSpeed's configuration.
        precision: ``bf16`` or ``fp32``.

    Raises:
        LoramError: If the weights do not match the model's configuration or are not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    partitioned = ds_config["zero_optimization"]["stage"] == 3
    with ModelCheckpoint(directory) as checkpoint, no_init_weights(), torch.no_grad():
        config = AutoConfig.from_pretrained(directory)
        if checkpoint.has_own_head():  # as from_pretrained does
            config.tie_word_embeddings = False
        with _partitioning(ds_config) if partitioned else nullcontext():
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
        model.tie_weights()
        for name, parameter in model.named_parameters():
            with _whole([parameter], partitioned, write=True) as writable:
                if writable:
                    parameter.copy_(checkpoint.read(name))
    return model  # type: ignore[no-any-return]


@freed_memory_returned()
def export_partitioned(
    model: nn.Module, source: Path, target: Path, partitioned: bool, writes: bool
) -> dict[str, str]:
    """Write a model's weights as safetensors with the names, dtypes and order of ``source``.

    Every worker must call this, since partitions are gathered one parameter at a time.

    Args:
        model: Trained model whose parameters are named as in ``source``.
        source: Directory from which the model was loaded.
        target: Directory to write to.
        partitioned: Whether the model is partitioned (ZeRO-3).
        writes: Whether this worker writes the files.

    Returns:
        SHA-256 of each file; empty on workers that do not write.
    """
    with ModelCheckpoint(source) as checkpoint:
        specs = {n: spec for n, spec in checkpoint.specs.items() if not is_recomputed(n)}
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
    """Gather parameters inside the context; yield whether they may be written."""
    if not partitioned:
        yield True
        return
    deepspeed = import_deepspeed()
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield torch.distributed.get_rank() == 0
