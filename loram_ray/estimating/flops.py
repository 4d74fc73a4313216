"""Estimate operations, traffic and offloading of an alignment step analytically."""

from __future__ import annotations

from dataclasses import dataclass

from loram_ray.config import AlignConfig
from loram_ray.estimating.footprint import ADAM_MOMENTS, BYTES
from loram_ray.estimating.shapes import ModelShapes

GPUS_PER_NODE = 8
NVLINK = 360e9
"""NVLink bandwidth of a GPU in each direction: 80% of an H100's nominal 450e9."""
PCIE = 50e9
"""Bandwidth between a GPU and its host in each direction: 80% of PCIe 5.0 x16."""
DISK = 3e9
"""Bandwidth of a GPU's share of its node's NVMe disks."""
HOST_MEMORY = 300e9
"""Memory bandwidth of a node that AdamW reaches on the CPU."""

_FP32 = 4
_ADAM_TRAFFIC = 7 * _FP32  # reads weight, gradient and both moments; writes all but the gradient


@dataclass(frozen=True)
class Work:
    """Operations per token.

    Attributes:
        forward: Forward pass of the pruned model.
        backward: Backward pass of the pruned model.
        recomputed: Forward operations repeated in the backward pass.
        base: Forward pass of the base, if distillation is live.
    """

    forward: float
    backward: float
    recomputed: float
    base: float

    @property
    def total(self) -> float:
        """Total number of operations."""
        return self.forward + self.backward + self.recomputed + self.base


def work_of(config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None) -> Work:
    """Return the operations per token in linear layers and attention products.

    A weight takes two operations forward and four backward, or two if the output head is frozen
    (Kaplan et al., arXiv 2001.08361); attention's two products cover the whole sequence (PaLM,
    arXiv 2204.02311, appendix B). The head is recomputed for each chunk. With activation
    checkpointing, a layer is recomputed except for its last linear, since torch stops once it has
    all saved tensors. The last position predicts nothing.
    """
    length = config.corpus.sequence_length
    layers, head = forward_of(pruned, length)
    head *= (length - 1) / length
    recomputed = head if config.zero_stage == 3 else 0.0
    if config.activation_checkpointing:
        recomputed += layers - 2.0 * pruned.hidden * sum(layer.neurons for layer in pruned.layers)
    base = 0.0
    if teacher is not None:
        base_layers, base_head = forward_of(teacher, length)
        base = base_layers + 2 * base_head * (length - 1) / length
    return Work(
        forward=layers + head,
        backward=2 * layers + head * (2 if pruned.head_trained else 1),
        recomputed=recomputed,
        base=base,
    )


def forward_of(model: ModelShapes, length: int) -> tuple[float, float]:
    """Return the forward operations per token of layers and head, for a sequence length."""
    attention = 4.0 * length * sum(layer.query for layer in model.layers)
    return 2.0 * model.layer_weights + attention, 2.0 * model.head_weights


def traffic_of(
    config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None, gpus: int
) -> float:
    """Return the bytes that a GPU sends, and receives, per step.

    A ring sends ``(n - 1) / n`` of a tensor to gather or scatter it, and twice that to all-reduce
    it (ZeRO, arXiv 1910.02054, section 7). DeepSpeed's ZeRO-1 and ZeRO-2 all-reduce gradients,
    ZeRO-2 after every micro-batch, and gather the weights once. ZeRO-3 gathers weights forward and
    backward and scatters gradients for every micro-batch; the base's weights are gathered forward
    only, and its head again in the backward pass.
    """
    width, micro_batches = BYTES[config.precision], config.accumulation(gpus)
    weights, gradients = width * pruned.parameters, width * pruned.trained
    base = width * (teacher.parameters + teacher.head_weights) if teacher is not None else 0
    whole = {
        0: 2 * gradients,
        1: 2 * gradients + gradients,
        2: micro_batches * 2 * gradients + gradients,
        3: micro_batches * (2 * weights + gradients + base),
    }[config.zero_stage]
    return whole * (gpus - 1) / gpus


def offload_seconds(
    config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None, gpus: int
) -> float:
    """Return the seconds per step spent on offloading.

    Gradients move to the host and weights back, and AdamW runs on the CPU in host memory; NVMe
    offload also reads and writes the optimizer state. Offloaded weights move with every gather.
    """
    width, share = BYTES[config.precision], pruned.trained / gpus
    rates = {"cpu": PCIE, "nvme": DISK}
    seconds = 0.0
    if config.offload_optimiser != "none":
        seconds += 2 * width * share / PCIE
        seconds += _ADAM_TRAFFIC * share * min(gpus, GPUS_PER_NODE) / HOST_MEMORY
    if config.offload_optimiser == "nvme":
        seconds += 2 * (_FP32 + ADAM_MOMENTS) * share / DISK
    if config.offload_parameters != "none":
        passes = 2 * pruned.parameters + (teacher.parameters if teacher is not None else 0)
        moved = config.accumulation(gpus) * width * passes / gpus
        seconds += moved / rates[config.offload_parameters]
    return seconds
