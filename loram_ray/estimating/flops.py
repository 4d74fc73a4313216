"""Operations, traffic and what is offloaded in a step of alignment, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from loram_ray.config import AlignConfig
from loram_ray.estimating.footprint import ADAM_MOMENTS, BYTES
from loram_ray.estimating.shapes import ModelShapes

GPUS_PER_NODE = 8
NVLINK = 360e9
"""Each way, of a GPU: 80% of the 450e9 of an H100's data sheet."""
PCIE = 50e9
"""Each way, between a GPU and its host: 80% of PCIe 5.0 x16."""
DISK = 3e9
"""Of a GPU's share of its node's NVMe disks."""
HOST_MEMORY = 300e9
"""Of a node, as AdamW on the CPU reads and writes it."""

_FP32 = 4
_ADAM_TRAFFIC = 7 * _FP32  # reads weight, gradient and both moments; writes all but the gradient


@dataclass(frozen=True)
class Work:
    """Operations that a token costs.

    Attributes:
        forward: of the pruned model.
        backward: of the pruned model.
        recomputed: forward operations done again in the backward pass.
        base: of the base's forward pass, where distillation is live.
    """

    forward: float
    backward: float
    recomputed: float
    base: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.recomputed + self.base


def work_of(config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None) -> Work:
    """Operations a token, in linears and in the products of attention.

    Two for each weight forward, four backward, but two where the output head is frozen (Kaplan et
    al., arXiv 2001.08361); attention's two products over the whole sequence (PaLM, arXiv
    2204.02311, appendix B). The head is computed again for each chunk, and a layer where
    activations are checkpointed, but for its last linear: torch stops when it has all that was
    saved. The last position predicts nothing.
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
    """Operations a token of a forward pass over so many tokens, of the layers and of the head."""
    attention = 4.0 * length * sum(layer.query for layer in model.layers)
    return 2.0 * model.layer_weights + attention, 2.0 * model.head_weights


def traffic_of(
    config: AlignConfig, pruned: ModelShapes, teacher: ModelShapes | None, gpus: int
) -> float:
    """Bytes that a GPU sends in a step, and receives.

    A ring sends ``(n - 1) / n`` of a tensor to gather or scatter it, twice that to sum it (ZeRO,
    arXiv 1910.02054, section 7). DeepSpeed's ZeRO-1 and 2 sum gradients on all GPUs, ZeRO-2 after
    every micro-batch, and gather the weights once. ZeRO-3 gathers weights forward and backward and
    scatters gradients, for every micro-batch; the base's it gathers forward only, and its head
    again backward.
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
    """Seconds of a step that what is offloaded costs.

    Gradients go to the host and weights come back, AdamW runs on the CPU in the host's memory; from
    a disk come the optimiser's state, too, and go back. Offloaded weights come with each gathering.
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
