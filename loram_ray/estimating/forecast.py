"""What a recipe will need: sizes, memory of the user's training, the publisher's alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_ray.alignment.deepspeed_config import read_users
from loram_ray.architectures import architecture_of
from loram_ray.config import AlignConfig, PruneConfig, TrainConfig, load_run, section_of
from loram_ray.errors import LoramError
from loram_ray.estimating.alignment import Cluster, Estimate, estimate
from loram_ray.estimating.base_configs import base_config
from loram_ray.estimating.gpus import GPUS, fitting
from loram_ray.estimating.memory_trace import TrainingMemory, training_memory, without_nf4
from loram_ray.estimating.shapes import config_after, empty_model, require_dense, shapes_of
from loram_ray.estimating.sizes import NF4_BY_NAME, Sizes, sizes_of
from loram_ray.models.loading import DTYPES

_UNREAD = "train.data=unread"
_AS_THE_PAPER = (
    _UNREAD,
    "train.lora.lm_head=true",
    "train.activation_checkpointing=true",
)
"""How a user trains where the recipe, a publisher's, does not say it; the rest are defaults."""


@dataclass(frozen=True)
class Forecast:
    """What a recipe will need.

    Attributes:
        prune: how the base is pruned.
        train: how a user trains.
        base: size of the base.
        pruned: size of what pruning leaves; of masked weights all are stored.
        nf4: memory of training on the pruned model in NF4.
        whole: memory of training on it in ``train.precision``.
        alignment: what the publisher's alignment needs on its workers; None without one.
    """

    prune: PruneConfig
    train: TrainConfig
    base: Sizes
    pruned: Sizes
    nf4: TrainingMemory
    whole: TrainingMemory
    alignment: Estimate | None

    def reductions(self) -> dict[str, float]:
        """How many times smaller than the base in bfloat16 the pruned model is."""
        fewer = self.base.parameters / self.pruned.parameters
        return {
            "bf16": fewer,
            "nf4_nominal": NF4_BY_NAME * fewer,
            "nf4_stored": self.base.bf16 / self.pruned.nf4_stored,
        }

    def as_json(self) -> dict[str, Any]:
        """All of it, in bytes."""
        return {
            "base": asdict(self.base),
            "pruned": asdict(self.pruned),
            "base_parameters": self.base.parameters,
            "pruned_parameters": self.pruned.parameters,
            "reduction": self.reductions(),
            "train": {
                "micro_batch_size": self.train.micro_batch_size,
                "max_length": self.train.max_length,
                "peak_bytes": _parts(self.nf4),
                "fits": _names(self.nf4),
                "adapters_per_actor": _adapters(self.nf4),
                "actors_per_gpu": _actors(self.nf4),
                self.train.precision: {
                    "peak_bytes": _parts(self.whole),
                    "fits": _names(self.whole),
                    "adapters_per_actor": _adapters(self.whole),
                    "actors_per_gpu": _actors(self.whole),
                },
            },
            "align": None if self.alignment is None else asdict(self.alignment),
        }


def forecast(
    config: Path | None, overrides: Sequence[str] = (), config_of_base: Path | None = None
) -> Forecast:
    """Work out what a run file needs; nothing is loaded but the base's ``config.json``.

    Args:
        config: the run file, with a ``prune`` section.
        overrides: ``dotted.key=value``.
        config_of_base: the base's ``config.json`` or its directory, instead of the base's own.

    Raises:
        LoramError: the run file is wrong, the base's shapes are not known, its family is not
            supported, or it is a mixture of experts.
    """
    says = config is not None and load_run(config).train is not None
    run = load_run(config, ((_UNREAD,) if says else _AS_THE_PAPER) + tuple(overrides))
    prune: PruneConfig = section_of(run, "prune")
    train: TrainConfig = section_of(run, "train")
    shapes = base_config(prune.base, config_of_base)
    family = architecture_of(shapes.get("model_type"))
    require_dense(family, shapes)
    base = empty_model(shapes)
    pruned = config_after(shapes, prune, base)
    alignment = None if run.align is None else _alignment(shapes, prune, run.align)
    sizes = sizes_of(empty_model(pruned))
    try:
        nf4 = training_memory(pruned, family, train, quantized=True)
    except ValueError as error:
        raise LoramError(
            f"train.lora.targets must name linears of the model, got {train.lora.targets} "
            f"({error}); see the model's modules"
        ) from error
    return Forecast(
        prune=prune,
        train=train,
        base=sizes_of(base),
        pruned=sizes,
        nf4=nf4,
        whole=without_nf4(nf4, DTYPES[train.precision].itemsize * sizes.parameters),
        alignment=alignment,
    )


def _alignment(shapes: dict[str, Any], prune: PruneConfig, align: AlignConfig) -> Estimate:
    pruned, base = shapes_of(shapes, prune, align.frozen)
    return estimate(align, read_users(align.deepspeed), pruned, base, Cluster(align.workers))


def _parts(memory: TrainingMemory) -> dict[str, int]:
    return {"total": memory.total, **asdict(memory)}


def _names(memory: TrainingMemory) -> list[str]:
    return [gpu.name for gpu in fitting(memory.total)]


def _actors(memory: TrainingMemory) -> dict[str, int]:
    """How many actors, each with a copy of the model and one adapter, share a GPU."""
    return {gpu.name: gpu.processes(memory.total) for gpu in GPUS}


def _adapters(memory: TrainingMemory) -> dict[str, int]:
    """How many adapters at a time the GPUs hold, on one copy of the model."""
    return {gpu.name: memory.most(gpu.usable) for gpu in GPUS}
