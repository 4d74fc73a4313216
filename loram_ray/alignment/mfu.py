"""Compute model FLOPs utilisation (MFU), the share of the devices' peak that training uses."""

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
"""Dense bf16 (V100: fp16) peaks from NVIDIA's data sheets, in TFLOPS."""


def peak_tflops() -> float | None:
    """Return the peak of this worker's device in TFLOPS; None for CPUs and unknown devices."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device: str) -> float | None:
    """Return the peak of a device whose name contains a key of `PEAK_TFLOPS` as whole words."""
    found = (p for known, p in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", device))
    return next(found, None)


def flops_per_token(linear_weights: int) -> float:
    """Return the operations of a training step per token.

    Each weight of a linear takes two forward and four backward (Kaplan et al., arXiv 2001.08361).
    The attention products are ignored; they are a few percent at a few hundred tokens.
    """
    return 6.0 * linear_weights


def linear_weights(model: nn.Module) -> int:
    """Count the weights of a model's linears, including the output head and all partitions."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            total += getattr(weight, "ds_numel", weight.numel())
    return total
