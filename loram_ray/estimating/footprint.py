"""Bytes of a GPU in alignment, by arithmetic.

They are those that DeepSpeed 0.19 keeps with the settings of `deepspeed_config`; of a user's own
DeepSpeed dictionary, bucket and sub-group sizes, live parameters and ``overlap_comm`` count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram_ray.config import AlignConfig
from loram_ray.estimating.shapes import LayerSizes, ModelShapes
from loram_ray.losses import CHUNK

BYTES = {"bf16": 2, "fp32": 4}
ADAM_MOMENTS = 8
_FP32 = 4
_BUCKET, _LIVE, _SUB_GROUP = 5e8, 1e9, 1e9  # elements; DeepSpeed's defaults
_LOGIT = {"causal_lm": 12, "cached": 20, "live": 28}  # float32 logits and what is made of them


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at their largest, part by part.

    Attributes:
        weights: of the pruned model.
        base: of the base beside it, where distillation is live.
        optimiser: float32 weights, where there are others, and AdamW's two moments.
        gradients: while the backward pass runs.
        buckets: in which DeepSpeed reduces gradients.
        gathered: weights that ZeRO-3 has whole for the layers at work.
        activations: kept for the backward pass, and what the pass itself needs.
        logits: of the chunk at work, where that needs more than a layer's backward pass.
        update: gradients and temporaries of the optimiser's step; the backward pass's are gone.
        host: bytes of the GPU's share of its node's memory, or disk, that was offloaded.
        peak: what must fit.
    """

    weights: float
    base: float
    optimiser: float
    gradients: float
    buckets: float
    gathered: float
    activations: float
    logits: float
    update: float
    host: float
    peak: float


def memory_of(
    config: AlignConfig,
    zero: Mapping[str, Any],
    pruned: ModelShapes,
    teacher: ModelShapes | None,
    gpus: int,
) -> Memory:
    """Bytes of one GPU.

    ZeRO-1 keeps gradients whole until a step's last micro-batch, ZeRO-2 its share of them, twice
    where they accumulate (what was and what comes), ZeRO-3 its share, once; all in the model's
    precision, since ``data_types`` is not set. (DeepSpeed: ``zero/stage_1_and_2.py``,
    ``zero/stage3.py``, ``fp16/unfused_optimizer.py``.) Padding of partitions is left out.

    Args:
        config: the stage's configuration.
        zero: DeepSpeed's ``zero_optimization``.
        pruned: the pruned model.
        teacher: the base, where it runs beside it.
        gpus: how many share it out.
    """
    stage, width = zero["stage"], BYTES[config.precision]
    offloads, streams = config.offload_optimiser != "none", config.offload_parameters != "none"
    trained = pruned.trained
    share = trained / gpus if stage else trained
    partitions = gpus if stage == 3 else 1
    weights = width * pruned.parameters / partitions
    base = width * teacher.parameters / partitions if teacher is not None else 0.0
    master = 0 if width == _FP32 and stage in (0, 3) else _FP32
    optimiser = (master + ADAM_MOMENTS) * share
    accumulates = config.accumulation(gpus) > 1
    gradients = width * {0: trained, 1: trained, 2: share * (1 + accumulates), 3: share}[stage]
    bucket = zero.get("reduce_bucket_size", _BUCKET)
    if stage == 0:
        bucket = min(bucket, trained)
    buckets = width * bucket * (2 if zero.get("overlap_comm") and stage in (1, 2) else 1)
    gathered, host = 0.0, 0.0
    if stage == 3:
        everything = [pruned, teacher] if teacher is not None else [pruned]
        live = zero.get("stage3_max_live_parameters", _LIVE) + max(m.largest for m in everything)
        gathered = width * min(sum(m.parameters for m in everything), live)
    unit = min(share, zero.get("sub_group_size", _SUB_GROUP)) if stage == 3 else share
    update = 2 * _FP32 * unit + (width * trained if stage == 0 else 0)
    update += width * share + buckets if stage == 3 else 0
    if offloads:
        host += optimiser + (_FP32 + 2 * width) * share
        optimiser, update = 0.0, buckets if stage == 3 else 0.0
        gradients = {0: gradients, 1: gradients, 2: width * pruned.largest, 3: 0.0}[stage]
    if streams:
        host += weights + base
        weights, base = 0.0, 0.0
    activations, logits = activations_of(config, pruned, teacher)
    backward = gradients + buckets + gathered + activations + logits
    return Memory(
        weights=weights,
        base=base,
        optimiser=optimiser,
        gradients=gradients,
        buckets=buckets,
        gathered=gathered,
        activations=activations,
        logits=logits,
        update=update,
        host=host,
        peak=weights + base + optimiser + max(backward, update),
    )


def activations_of(
    config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None
) -> tuple[float, float]:
    """Bytes of activations at their largest, and of logits at the same time.

    Korthikanti et al. (arXiv 2205.05198, section 4) count what autograd saves of a GPT layer; this
    is their count for RMSNorm, gated MLPs, GQA and an attention that keeps no scores. The largest
    moment is at a chunk of the output head, or in the backward pass of a layer, or, with the base
    beside it, at a layer of the base.
    """
    width = BYTES[config.precision]
    positions = config.micro_batch_size * config.corpus.sequence_length
    layers = [saved_by_layer(layer, width) for layer in pruned.layers]
    kept = sum(layers)
    at_layer = max(2 * width * layer.neurons for layer in pruned.layers) + width * pruned.hidden
    if config.activation_checkpointing:
        kept = width * pruned.hidden * len(layers)
        at_layer += max(layers)
    at_head = (_FP32 + 2 * width) * pruned.hidden  # of the last norm, and the positions predicted
    at_base = 0
    if teacher is not None:
        at_head += 2 * width * teacher.hidden
        at_base = width * (3 * max(x.neurons for x in teacher.layers) + 3 * teacher.hidden)
    logits = min(CHUNK, positions) * pruned.vocabulary * _LOGIT[source_of(config)]
    elsewhere = positions * max(at_layer, at_head + at_base)
    if positions * at_head + logits >= elsewhere:
        return positions * (kept + at_head), logits
    return positions * kept + elsewhere, 0.0


def saved_by_layer(layer: LayerSizes, width: int) -> int:
    """Bytes that autograd saves of a Llama layer for each position.

    Norms save their input in float32, its normalised value and their output; attention the rotated
    queries and keys, the values, its output and a float32 logarithm a head; the MLP the gate before
    and after its activation, the other branch and their product.

    Args:
        layer: the layer.
        width: bytes of an activation.
    """
    norms = (_FP32 + 2 * width) * layer.norms + 2 * _FP32  # and two float32 root mean squares
    attention = width * 2 * (layer.query + layer.key) + _FP32 * layer.heads
    return norms + attention + width * 4 * layer.neurons


def source_of(config: AlignConfig) -> str:
    """What the pruned model learns from: ``causal_lm``, ``cached`` or ``live``."""
    if config.objective == "causal_lm":
        return "causal_lm"
    return config.distillation.targets
