"""Estimate the memory of a GPU in alignment analytically.

The estimate follows DeepSpeed 0.19 with the settings of `deepspeed_config`. From a user's own
DeepSpeed configuration it takes bucket and sub-group sizes, live parameters and ``overlap_comm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loram_ray.config import AlignConfig
from loram_ray.estimating.shapes import LayerSizes, ModelShapes
from loram_ray.losses import CHUNK

BYTES = {"bf16": 2, "fp32": 4}
ADAM_MOMENTS = 8
_FP32 = 4
_BUCKET, _LIVE, _SUB_GROUP = 5e8, 1e9, 1e9  # elements; DeepSpeed's defaults
_LOGIT = {"causal_lm": 12, "cached": 20, "live": 28}  # float32 logits and tensors derived from them


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one GPU by component.

    Attributes:
        weights: Weights of the pruned model.
        base: Weights of the base, if distillation is live.
        optimiser: Float32 master weights, if any, and AdamW's two moments.
        gradients: Gradients during the backward pass.
        buckets: DeepSpeed's buckets for reducing gradients.
        gathered: Weights that ZeRO-3 gathers for the active layers.
        activations: Activations saved for the backward pass, and its own temporaries.
        logits: Logits of the current chunk, if they need more than a layer's backward pass.
        update: Gradients and temporaries of the optimizer step, after those of the backward pass
            are freed.
        host: Offloaded bytes in the GPU's share of its node's memory or disk.
        peak: Total that must fit.
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
    """Estimate the memory of one GPU.

    ZeRO-1 keeps whole gradients until the last micro-batch of a step, ZeRO-2 keeps its share of
    them, twice if they accumulate (the sum and the new ones), and ZeRO-3 keeps its share once; all
    in the model's precision, since ``data_types`` is not set. (DeepSpeed:
    ``zero/stage_1_and_2.py``, ``zero/stage3.py``, ``fp16/unfused_optimizer.py``.) Padding of
    partitions is ignored.

    Args:
        config: Configuration of the stage.
        zero: DeepSpeed's ``zero_optimization`` section.
        pruned: Shapes of the pruned model.
        teacher: Shapes of the base, if distillation is live.
        gpus: Number of GPUs that share the model.
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
    buckets = _buckets(zero, trained, width)
    gathered = _gathered(zero, [pruned, teacher] if teacher is not None else [pruned], width)
    update = _update(zero, trained, share, width, buckets)
    host = 0.0
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


def _buckets(zero: Mapping[str, Any], trained: int, width: int) -> float:
    """Return the bytes of the buckets for reducing gradients."""
    bucket = zero.get("reduce_bucket_size", _BUCKET)
    if zero["stage"] == 0:
        bucket = min(bucket, trained)
    is_double = zero.get("overlap_comm") and zero["stage"] in (1, 2)
    return width * bucket * (2 if is_double else 1)


def _gathered(zero: Mapping[str, Any], models: Sequence[ModelShapes], width: int) -> float:
    """Return the bytes of weights that ZeRO-3 gathers for the active layers."""
    if zero["stage"] != 3:
        return 0.0
    live = zero.get("stage3_max_live_parameters", _LIVE) + max(m.largest for m in models)
    return width * min(sum(m.parameters for m in models), live)


def _update(
    zero: Mapping[str, Any], trained: int, share: float, width: int, buckets: float
) -> float:
    """Return the bytes of gradients and temporaries of an optimizer step on the GPU."""
    match zero["stage"]:
        case 0:
            return 2 * _FP32 * share + width * trained
        case 3:
            unit = min(share, zero.get("sub_group_size", _SUB_GROUP))
            return 2 * _FP32 * unit + (width * share + buckets)
        case _:
            return 2 * _FP32 * share


def activations_of(
    config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None
) -> tuple[float, float]:
    """Return the peak bytes of activations, and of the logits at the same moment.

    Korthikanti et al. (arXiv 2205.05198, section 4) count the tensors that autograd saves in a GPT
    layer; this is their count for RMSNorm, gated MLPs, GQA and attention without stored scores. The
    peak occurs at a chunk of the output head, in the backward pass of a layer, or, with a live
    base, in one of the base's layers.
    """
    width = BYTES[config.precision]
    positions = config.micro_batch_size * config.corpus.sequence_length
    layers = [saved_by_layer(layer, width) for layer in pruned.layers]
    kept = sum(layers)
    at_layer = max(2 * width * layer.neurons for layer in pruned.layers) + width * pruned.hidden
    if config.activation_checkpointing:
        kept = width * pruned.hidden * len(layers)
        at_layer += max(layers)
    at_head = (_FP32 + 2 * width) * pruned.hidden  # last norm, and the predicted positions
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
    """Return the bytes per position that autograd saves in a Llama layer.

    Norms save their input in float32, the normalised value and the output; attention saves rotated
    queries and keys, values, its output and a float32 log-sum-exp per head; the MLP saves the gate
    before and after its activation, the up projection and their product.

    Args:
        layer: Sizes of the layer.
        width: Bytes per activation.
    """
    norms = (_FP32 + 2 * width) * layer.norms + 2 * _FP32  # plus two float32 root mean squares
    attention = width * 2 * (layer.query + layer.key) + _FP32 * layer.heads
    return norms + attention + width * 4 * layer.neurons


def source_of(config: AlignConfig) -> str:
    """Return the source of the training signal: ``causal_lm``, ``cached`` or ``live``."""
    if not config.distils:
        return "causal_lm"
    return config.distillation.targets
