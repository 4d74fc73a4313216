"""GPUs that people have or rent, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_MIB = 2**20
CONTEXT = 600 * _MIB
"""Bytes that CUDA, cuBLAS and bitsandbytes hold beside PyTorch's tensors; an assumption."""
GAPS = 0.05
"""Share of the memory that PyTorch's allocator loses between tensors; an assumption."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as sellers call it.
        memory: bytes that its driver reports.
    """

    name: str
    memory: int

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return int((self.memory - CONTEXT) * (1 - GAPS))

    def processes(self, needed: float) -> int:
        """How many processes that need so many bytes of tensors it holds beside each other."""
        return int(self.memory // (needed / (1 - GAPS) + CONTEXT))


GPUS = tuple(
    Gpu(name, mebibytes * _MIB)
    for name, mebibytes in (
        ("RTX 3060", 12288),
        ("T4", 15360),
        ("RTX 4060 Ti 16 GB", 16380),
        ("RTX 4000 Ada", 20475),
        ("A10G", 23028),
        ("L4", 23034),
        ("RTX 3090, RTX 4090", 24564),
        ("RTX 5090", 32607),
        ("A100 40 GB", 40960),
        ("L40S", 46068),
        ("A100 80 GB, H100", 81559),
        ("H200", 143771),
    )
)
"""From the smallest to the largest."""


def fitting(needed: float) -> Iterator[Gpu]:
    """GPUs that hold so many bytes of tensors, the smallest first."""
    return (gpu for gpu in GPUS if gpu.usable >= needed)
