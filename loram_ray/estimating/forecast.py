"""Forecast a recipe: sizes, memory of the user's training, and the publisher's alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loram_ray.alignment.deepspeed_config import read_user_config
from loram_ray.architectures import architecture_of
from loram_ray.config import AlignConfig, PruneConfig, TrainConfig, load_run, section_of
from loram_ray.errors import LoramError
from loram_ray.estimating.alignment import GB, Estimate, estimate
from loram_ray.estimating.base_configs import base_config
from loram_ray.estimating.gpus import GPUS, Cluster, fitting
from loram_ray.estimating.memory_trace import TrainingMemory, training_memory, without_nf4
from loram_ray.estimating.shapes import (
    ModelShapes,
    config_after,
    empty_model,
    require_dense,
    shapes_of,
)
from loram_ray.estimating.sizes import Sizes, sizes_of
from loram_ray.models.loading import DTYPES
from loram_ray.models.quantisation import NF4

_UNREAD = "train.data=unread"
_AS_THE_PAPER = (
    _UNREAD,
    "train.lora.lm_head=true",
    "train.activation_checkpointing=true",
)
"""Training settings for a publisher's recipe without a ``train`` section, in addition to the
defaults."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of a recipe.

    Attributes:
        prune: Pruning configuration.
        train: Training configuration.
        base: Size of the base.
        pruned: Size of the pruned model; masked weights are stored in full.
        nf4: Memory of training on the pruned model in NF4.
        whole: Memory of training on it in ``train.precision``.
        alignment: Estimate of the publisher's alignment on its workers; None without one.
    """

    prune: PruneConfig
    train: TrainConfig
    base: Sizes
    pruned: Sizes
    nf4: TrainingMemory
    whole: TrainingMemory
    alignment: Estimate | None

    def reductions(self) -> dict[str, float]:
        """Return the size ratios of the base in bfloat16 to the pruned model."""
        fewer = self.base.parameters / self.pruned.parameters
        return {
            "bf16": fewer,
            "nf4_nominal": NF4.times_fewer() * fewer,
            "nf4_stored": self.base.bf16 / self.pruned.nf4_stored,
        }

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as JSON-serialisable values, in bytes."""
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
                "adapters_per_worker": _adapters(self.nf4),
                "actors_per_gpu": _actors(self.nf4),
                self.train.precision: {
                    "peak_bytes": _parts(self.whole),
                    "fits": _names(self.whole),
                    "adapters_per_worker": _adapters(self.whole),
                    "actors_per_gpu": _actors(self.whole),
                },
            },
            "align": None if self.alignment is None else asdict(self.alignment),
        }


def forecast(
    config: Path | None, overrides: Sequence[str] = (), config_of_base: Path | None = None
) -> Forecast:
    """Forecast a run file, reading no file of the base except ``config.json``.

    Args:
        config: Run file with a ``prune`` section.
        overrides: Overrides of the form ``dotted.key=value``.
        config_of_base: ``config.json`` or its directory, used instead of the base's own.

    Raises:
        LoramError: If the run file is invalid, the base's shapes are unknown, its family is not
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
    alignment = None
    if run.align is not None:
        [alignment] = _on_clusters(shapes, prune, run.align, (), Cluster(1)).rows
    sizes = sizes_of(empty_model(pruned))
    try:
        nf4 = training_memory(pruned, family, train, quantized=True)
    except ValueError as error:
        raise LoramError(
            f"train.lora.targets must name linears of the model, got {train.lora.targets} "
            f"({error}); check the model's module names"
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


@dataclass(frozen=True)
class AlignmentForecast:
    """Forecast of an alignment on several numbers of GPUs.

    Attributes:
        pruned: Shapes of the pruned model.
        base: Shapes of the base.
        assumed: Assumptions about the cluster; its number of GPUs is not used.
        rows: Estimates, one for each number of GPUs.
    """

    pruned: ModelShapes
    base: ModelShapes
    assumed: Cluster
    rows: tuple[Estimate, ...]


def forecast_alignment(
    config: Path | None,
    overrides: Sequence[str] = (),
    config_of_base: Path | None = None,
    *,
    gpus: Sequence[int] = (),
    assumed: Cluster | None = None,
) -> AlignmentForecast:
    """Estimate a run file's alignment, reading no file of the base except ``config.json``.

    Args:
        config: Run file with ``prune`` and ``align`` sections.
        overrides: Overrides of the form ``dotted.key=value``.
        config_of_base: ``config.json`` or its directory, used instead of the base's own.
        gpus: Numbers of GPUs. Default: ``align.workers``.
        assumed: Assumptions about the cluster; its number of GPUs is not used.

    Raises:
        LoramError: If the run file or a number is invalid, or the base's shapes are unknown.
    """
    assumed = assumed or Cluster(1)
    _require_possible(gpus, assumed)
    run = load_run(config, overrides)
    prune, align = section_of(run, "prune"), section_of(run, "align")
    shapes = base_config(prune.base, config_of_base)
    return _on_clusters(shapes, prune, align, gpus, assumed)


def _require_possible(gpus: Sequence[int], assumed: Cluster) -> None:
    mfu, bandwidth, price = assumed.mfu, assumed.bandwidth, assumed.price
    rules = {
        "--gpus": (all(count >= 1 for count in gpus), "at least 1", list(gpus)),
        "--mfu": (0 < mfu <= 1, "above 0 and at most 1", mfu),
        "--bandwidth": (0 < bandwidth < math.inf, "above 0 GB/s", bandwidth / GB),
        "--price": (0 <= price < math.inf, "at least 0", price),
    }
    for name, (holds, rule, value) in rules.items():
        if not holds:
            raise LoramError(f"{name} must be {rule}, got {value}; change it")


def _on_clusters(
    shapes: dict[str, Any],
    prune: PruneConfig,
    align: AlignConfig,
    gpus: Sequence[int],
    assumed: Cluster,
) -> AlignmentForecast:
    pruned, base = shapes_of(shapes, prune, align.frozen)
    user_config = read_user_config(align.deepspeed)
    clusters = [replace(assumed, gpus=count) for count in gpus or (align.workers,)]
    rows = tuple(estimate(align, user_config, pruned, base, cluster) for cluster in clusters)
    return AlignmentForecast(pruned, base, assumed, rows)


def _parts(memory: TrainingMemory) -> dict[str, int]:
    return {"total": memory.total, **asdict(memory)}


def _names(memory: TrainingMemory) -> list[str]:
    return [gpu.name for gpu in fitting(memory.total)]


def _actors(memory: TrainingMemory) -> dict[str, int]:
    """Return the number of actors per GPU, with one model copy and one adapter in each."""
    return {gpu.name: gpu.processes(memory.total) for gpu in GPUS}


def _adapters(memory: TrainingMemory) -> dict[str, int]:
    """Return the number of adapters that each GPU trains at a time on one copy of the model."""
    return {gpu.name: memory.max_adapters(gpu.usable) for gpu in GPUS}
