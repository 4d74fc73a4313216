"""What an alignment will need: memory of a GPU, time of a step, hours and cost, by arithmetic.

Seconds rest on the assumptions in `Cluster` and on the rates in `work`; nothing is measured. All
sizes are bytes, all rates bytes or operations a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loram_ray.alignment.deepspeed_config import deepspeed_config
from loram_ray.alignment.mfu import PEAK_TFLOPS, flops_per_token
from loram_ray.config import AlignConfig
from loram_ray.estimating.flops import (
    GPUS_PER_NODE,
    NVLINK,
    Work,
    forward_of,
    offload_seconds,
    traffic_of,
    work_of,
)
from loram_ray.estimating.footprint import BYTES, Memory, memory_of, source_of
from loram_ray.estimating.shapes import ModelShapes

GB = 1e9
GPU_MEMORY = 80 * GB
"""An H100 has 85.5e9; CUDA, NCCL and the allocator's gaps are given the rest."""


@dataclass(frozen=True)
class Cluster:
    """The machines, as they are assumed.

    Attributes:
        gpus: workers of alignment, one GPU each.
        mfu: share of the GPUs' peak that all operations performed, recomputation among them, reach
            while nothing is waited for.
        bandwidth: of a node's network, each way; eight 400 Gb/s adapters have 400e9.
        price: of a GPU for an hour.
    """

    gpus: int
    mfu: float = 0.4
    bandwidth: float = 400e9
    price: float = 2.5


@dataclass(frozen=True)
class Targets:
    """The base's pass over the corpus, where its likeliest tokens are computed beforehand.

    Attributes:
        workers: copies of the base, on all GPUs.
        hours: of the whole pass.
        cost: of all GPUs for as long.
        stored: bytes of the targets, at most: compression makes them fewer.
        base: bytes of the base's weights on one GPU.
    """

    workers: int
    hours: float
    cost: float
    stored: float
    base: float


@dataclass(frozen=True)
class Estimate:
    """What an alignment on so many GPUs will need.

    Attributes:
        gpus: how many.
        memory: of one of them.
        fits: whether that is at most `GPU_MEMORY`.
        by_stage: peak bytes at each ZeRO stage, all else being equal.
        traffic: bytes that a GPU sends in a step, and receives.
        compute_s: seconds of a step's operations.
        traffic_s: seconds of the traffic between GPUs.
        offload_s: seconds of moving what is offloaded, and of AdamW on the CPU.
        step_s: seconds of a step.
        mfu: what ``metrics.jsonl`` would say.
        steps: of the whole alignment.
        hours: of the whole alignment.
        cost: of all GPUs for as long, the targets' pass not counted.
        work: operations a token.
        targets: the base's pass, where there is one.
        notes: what to change, in lines.
    """

    gpus: int
    memory: Memory
    fits: bool
    by_stage: dict[int, float]
    traffic: float
    compute_s: float
    traffic_s: float
    offload_s: float
    step_s: float
    mfu: float
    steps: int
    hours: float
    cost: float
    work: Work
    targets: Targets | None
    notes: tuple[str, ...]


def estimate(
    config: AlignConfig,
    users: Mapping[str, Any],
    pruned: ModelShapes,
    base: ModelShapes,
    cluster: Cluster,
) -> Estimate:
    """Estimate an alignment on so many GPUs, whatever ``align.workers`` says.

    A step's seconds are the longer of computing and traffic where DeepSpeed overlaps them (ZeRO-3,
    which fetches weights ahead and reduces gradients on a stream of its own), and their sum where
    it does not (0 to 2, whose ``overlap_comm`` is off by default). What is offloaded is added. The
    optimiser's own operations are left out: they are a hundredth of a step.

    Args:
        config: the stage's configuration.
        users: a DeepSpeed dictionary of the user's own.
        pruned: the pruned model, as it is trained.
        base: its base.
        cluster: the machines.
    """
    gpus = cluster.gpus
    teacher = base if source_of(config) == "live" else None
    zero = deepspeed_config(config, users, gpus)["zero_optimization"]
    memory = memory_of(config, zero, pruned, teacher, gpus)
    work = work_of(config, pruned, teacher)
    peak = (config.peak_tflops or PEAK_TFLOPS["H100"]) * 1e12

    length = config.corpus.sequence_length
    positions = config.accumulation(gpus) * config.micro_batch_size * length
    compute = positions * work.total / (peak * cluster.mfu)
    traffic = traffic_of(config, pruned, teacher, gpus)
    traffic_s = traffic / (NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, cluster.bandwidth))
    offload = offload_seconds(config, pruned, teacher, gpus)
    overlaps = zero.get("overlap_comm", zero["stage"] == 3)
    step = (max(compute, traffic_s) if overlaps else compute + traffic_s) + offload
    hours = step * config.total_steps / 3600
    tokens = config.batch_size * length
    useful = flops_per_token(pruned.layer_weights + pruned.head_weights) * tokens
    return Estimate(
        gpus=gpus,
        memory=memory,
        fits=memory.peak <= GPU_MEMORY,
        by_stage={
            stage: memory_of(changed, {**zero, "stage": stage}, pruned, teacher, gpus).peak
            for stage, changed in _stages(config)
        },
        traffic=traffic,
        compute_s=compute,
        traffic_s=traffic_s,
        offload_s=offload,
        step_s=step,
        mfu=useful / (step * gpus * peak),
        steps=config.total_steps,
        hours=hours,
        cost=hours * gpus * cluster.price,
        work=work,
        targets=_targets_of(config, base, cluster, peak),
        notes=tuple(
            note
            for note in (
                _on_memory(config, zero, pruned, teacher, gpus, memory.peak),
                _on_batches(config, gpus),
                _on_base(config, base),
            )
            if note
        ),
    )


def _targets_of(
    config: AlignConfig, base: ModelShapes, cluster: Cluster, peak: float
) -> Targets | None:
    """The pass before training; sharded over GPUs, the base's layers work one GPU after another."""
    distillation = config.distillation
    if source_of(config) != "cached":
        return None
    length = config.corpus.sequence_length
    tokens = config.total_steps * config.batch_size * length
    workers = distillation.copies(cluster.gpus)
    hours = tokens * sum(forward_of(base, length)) / (workers * peak * cluster.mfu) / 3600
    weights = BYTES[config.precision] * base.parameters / distillation.gpus_per_worker
    return Targets(
        workers=workers,
        hours=hours,
        cost=hours * cluster.gpus * cluster.price,
        stored=tokens * (6.0 * distillation.top_k + 4),  # int32 and float16 a token, one float32
        base=0.0 if distillation.stream_rows is not None else weights,
    )


def _on_memory(
    config: AlignConfig,
    zero: Mapping[str, Any],
    pruned: ModelShapes,
    teacher: ModelShapes | None,
    gpus: int,
    peak: float,
) -> str | None:
    """What to set where it does not fit."""
    if peak <= GPU_MEMORY:
        return None
    remedy = "no setting here fits; use more GPUs"
    for name, changed in _remedies(config):
        settings = {**zero, "stage": changed.zero_stage}
        needed = memory_of(changed, settings, pruned, teacher, gpus).peak
        if needed <= GPU_MEMORY:
            remedy = f"{name} needs {needed / GB:.1f} GB"
            break
    return (
        f"align.zero_stage {config.zero_stage} needs {peak / GB:.1f} GB of each of {gpus} GPUs, "
        f"more than {GPU_MEMORY / GB:.0f} GB; {remedy}"
    )


def _on_batches(config: AlignConfig, gpus: int) -> str | None:
    """What to set where workers have less to do than others."""
    micro_batches = config.accumulation(gpus)
    sequences = micro_batches * config.micro_batch_size * gpus
    if sequences == config.batch_size:
        return None
    return (
        f"align.batch_size {config.batch_size} is {config.batch_size / sequences:.0%} of what "
        f"{gpus} GPUs x {micro_batches} x align.micro_batch_size {config.micro_batch_size} "
        "compute, the rest has no labels; lower align.micro_batch_size"
    )


def _on_base(config: AlignConfig, base: ModelShapes) -> str | None:
    """What to set where the base of the targets' pass does not fit."""
    distillation = config.distillation
    if source_of(config) != "cached" or distillation.stream_rows is not None:
        return None
    weights = BYTES[config.precision] * base.parameters
    share = weights / distillation.gpus_per_worker
    if share <= GPU_MEMORY:
        return None
    return (
        f"align.distillation.gpus_per_worker {distillation.gpus_per_worker} puts "
        f"{share / GB:.0f} GB of the base on a GPU, more than {GPU_MEMORY / GB:.0f} GB; set it to "
        f"{math.ceil(weights / (0.9 * GPU_MEMORY))} or more, or set stream_rows"
    )


def _stages(config: AlignConfig) -> Iterator[tuple[int, AlignConfig]]:
    """The configuration at each ZeRO stage from 1 that allows what it offloads."""
    offloads = (config.offload_optimiser, config.offload_parameters)
    first = 3 if config.offload_parameters != "none" or "nvme" in offloads else 1
    for stage in range(first, 4):
        yield stage, config.model_copy(update={"zero_stage": stage})


def _remedies(config: AlignConfig) -> Iterator[tuple[str, AlignConfig]]:
    """What may make it fit, the cheapest first."""
    for saving in (False, True):
        for stage, changed in _stages(config):
            update = {"activation_checkpointing": saving or config.activation_checkpointing}
            text = ", activation_checkpointing true" if saving else ""
            yield f"zero_stage {stage}{text}", changed.model_copy(update=update)
    last = changed.model_copy(update={**update, "offload_optimiser": "cpu"})
    text += ", offload_optimiser cpu"
    yield f"zero_stage 3{text}", last
    last = last.model_copy(update={"offload_parameters": "cpu"})
    yield f"zero_stage 3{text}, offload_parameters cpu", last
