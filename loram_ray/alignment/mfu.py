"""Model FLOPs utilisation: what training does of what its devices could."""

from __future__ import annotations

import re

import torch
from torch import nn

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) peak of NVIDIA's data sheets, 10^12 operations a second."""


def peak_tflops() -> float | None:
    """Peak of this worker's device, 10^12 operations a second; None for the CPU and others."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device: str) -> float | None:
    """Peak of a device by its name, in which one of `PEAK_TFLOPS` stands as words of its own."""
    found = (p for known, p in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", device))
    return next(found, None)


def flops_per_token(linear_weights: int) -> float:
    """Operations of a training step for each token.

    Two for each weight of a linear forward and four backward (Kaplan et al., arXiv 2001.08361).
    The products of attention itself are left out: at a few hundred tokens they are a few percent.
    """
    return 6.0 * linear_weights


def linear_weights(model: nn.Module) -> int:
    """Weights of a model's linears, the output head among them; partitioned ones count whole."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            total += getattr(weight, "ds_numel", weight.numel())
    return total
