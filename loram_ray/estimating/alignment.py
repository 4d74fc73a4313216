"""Estimate an alignment analytically: memory per GPU, time per step, hours and cost.

Times rest on the assumptions in `Cluster` and the rates in `flops`; nothing is measured. Sizes are
in bytes, rates in bytes or operations per second.
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
from loram_ray.estimating.gpus import Cluster
from loram_ray.estimating.shapes import ModelShapes

GB = 1e9
GPU_MEMORY = 80 * GB
"""An H100 has 85.5e9 bytes; the rest is for CUDA, NCCL and allocator fragmentation."""


@dataclass(frozen=True)
class Targets:
    """Estimate of the base's forward pass over the corpus that caches top-k targets.

    Attributes:
        workers: Number of copies of the base on all GPUs.
        hours: Duration of the pass.
        cost: Cost of all GPUs for the pass.
        stored: Upper bound on the bytes of the targets, before compression.
        base: Bytes of the base's weights per GPU.
    """

    workers: int
    hours: float
    cost: float
    stored: float
    base: float


@dataclass(frozen=True)
class Estimate:
    """Estimate of an alignment on a given number of GPUs.

    Attributes:
        gpus: Number of GPUs.
        memory: Memory per GPU.
        fits: Whether the peak is at most `GPU_MEMORY`.
        by_stage: Peak bytes at each ZeRO stage with otherwise equal settings.
        traffic: Bytes that a GPU sends, and receives, per step.
        compute_s: Seconds of computation per step.
        traffic_s: Seconds of communication between GPUs per step.
        offload_s: Seconds of offload transfers and of AdamW on the CPU per step.
        step_s: Seconds per step.
        mfu: Model FLOPs utilisation as reported in ``metrics.jsonl``.
        steps: Number of steps of the alignment.
        hours: Duration of the alignment.
        cost: Cost of all GPUs for the alignment, without the pass for the targets.
        work: Operations per token.
        targets: Estimate of the targets' pass, if there is one.
        notes: Suggested changes, one per line.
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
    user_config: Mapping[str, Any],
    pruned: ModelShapes,
    base: ModelShapes,
    cluster: Cluster,
) -> Estimate:
    """Estimate an alignment on the cluster's GPUs, regardless of ``align.workers``.

    A step takes the longer of computation and communication if DeepSpeed overlaps them (ZeRO-3
    prefetches weights and reduces gradients on its own stream), and their sum otherwise (stages 0
    to 2, whose ``overlap_comm`` is off by default), plus the time of offloading. The optimizer's
    own operations are about 1% of a step and are left out.

    Args:
        config: Configuration of the stage.
        user_config: DeepSpeed configuration supplied by the user.
        pruned: Shapes of the pruned model as it is trained.
        base: Shapes of the base.
        cluster: Assumptions about the cluster.
    """
    gpus = cluster.gpus
    teacher = base if source_of(config) == "live" else None
    zero = deepspeed_config(config, user_config, gpus)["zero_optimization"]
    memory = memory_of(config, zero, pruned, teacher, gpus)
    work = work_of(config, pruned, teacher)
    peak = (config.peak_tflops or PEAK_TFLOPS["H100"]) * 1e12
    length = config.corpus.sequence_length
    positions = config.accumulation(gpus) * config.micro_batch_size * length
    compute = positions * work.total / (peak * cluster.mfu)
    traffic = traffic_of(config, pruned, teacher, gpus)
    traffic_s = traffic / (NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, cluster.bandwidth))
    offload = offload_seconds(config, pruned, teacher, gpus)
    step = _overlapped(zero, compute, traffic_s) + offload
    hours = step * config.total_steps / 3600
    notes = (
        _on_memory(config, zero, pruned, teacher, gpus, memory.peak),
        _on_batches(config, gpus),
        _on_base(config, base),
    )
    useful = flops_per_token(pruned.layer_weights + pruned.head_weights)
    useful *= config.batch_size * length
    return Estimate(
        gpus=gpus,
        memory=memory,
        fits=memory.peak <= GPU_MEMORY,
        by_stage=_peak_by_stage(config, zero, pruned, teacher, gpus),
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
        notes=tuple(filter(None, notes)),
    )


def _overlapped(zero: Mapping[str, Any], compute: float, traffic: float) -> float:
    """Return the seconds of computation and communication together."""
    overlaps = zero.get("overlap_comm", zero["stage"] == 3)
    return max(compute, traffic) if overlaps else compute + traffic


def _peak_by_stage(
    config: AlignConfig,
    zero: Mapping[str, Any],
    pruned: ModelShapes,
    teacher: ModelShapes | None,
    gpus: int,
) -> dict[int, float]:
    """Return the peak bytes at each ZeRO stage with otherwise equal settings."""
    return {
        stage: memory_of(changed, {**zero, "stage": stage}, pruned, teacher, gpus).peak
        for stage, changed in _stages(config)
    }


def _targets_of(
    config: AlignConfig, base: ModelShapes, cluster: Cluster, peak: float
) -> Targets | None:
    """Estimate the targets' pass; if the base is sharded, its GPUs work one after another."""
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
        stored=tokens * (6.0 * distillation.top_k + 4),  # int32 and float16 per entry, one float32
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
    """Suggest settings if the alignment does not fit."""
    if peak <= GPU_MEMORY:
        return None
    remedy = "no setting fits; use more GPUs"
    for name, changed in _remedies(config):
        settings = {**zero, "stage": changed.zero_stage}
        needed = memory_of(changed, settings, pruned, teacher, gpus).peak
        if needed <= GPU_MEMORY:
            remedy = f"{name} needs {needed / GB:.1f} GB"
            break
    return (
        f"align.zero_stage {config.zero_stage} needs {peak / GB:.1f} GB on each of {gpus} GPUs, "
        f"which have {GPU_MEMORY / GB:.0f} GB; {remedy}"
    )


def _on_batches(config: AlignConfig, gpus: int) -> str | None:
    """Suggest settings if workers are loaded unevenly."""
    micro_batches = config.accumulation(gpus)
    sequences = micro_batches * config.micro_batch_size * gpus
    if sequences == config.batch_size:
        return None
    return (
        f"align.batch_size {config.batch_size} is {config.batch_size / sequences:.0%} of the "
        f"{gpus} GPUs x {micro_batches} x align.micro_batch_size {config.micro_batch_size} "
        "sequences that are computed, and the rest are padding; lower align.micro_batch_size"
    )


def _on_base(config: AlignConfig, base: ModelShapes) -> str | None:
    """Suggest settings if the base does not fit in the targets' pass."""
    distillation = config.distillation
    if source_of(config) != "cached" or distillation.stream_rows is not None:
        return None
    weights = BYTES[config.precision] * base.parameters
    share = weights / distillation.gpus_per_worker
    if share <= GPU_MEMORY:
        return None
    return (
        f"align.distillation.gpus_per_worker {distillation.gpus_per_worker} puts {share / GB:.0f} "
        f"GB of the base on a GPU with {GPU_MEMORY / GB:.0f} GB; set it to "
        f"{math.ceil(weights / (0.9 * GPU_MEMORY))} or more, or set stream_rows"
    )


def _stages(config: AlignConfig) -> Iterator[tuple[int, AlignConfig]]:
    """Yield the configuration at each ZeRO stage, from 1, that supports its offloading."""
    offloads = (config.offload_optimiser, config.offload_parameters)
    first = 3 if config.offload_parameters != "none" or "nvme" in offloads else 1
    for stage in range(first, 4):
        yield stage, config.model_copy(update={"zero_stage": stage})


def _remedies(config: AlignConfig) -> Iterator[tuple[str, AlignConfig]]:
    """Yield settings that may fit, cheapest first."""
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
