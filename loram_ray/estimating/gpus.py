"""Common GPUs with their memory, and assumptions about a cluster of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_MIB = 2**20
CONTEXT = 600 * _MIB
"""Assumed bytes that CUDA, cuBLAS and bitsandbytes allocate outside PyTorch."""
GAPS = 0.05
"""Assumed share of memory that PyTorch's allocator loses to fragmentation."""


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the cluster.

    Attributes:
        gpus: Number of GPUs, one per alignment worker.
        mfu: Share of the peak that all operations, including recomputation, reach while computing.
        bandwidth: Network bandwidth of a node in each direction; eight 400 Gb/s adapters give
            400e9.
        price: Price of one GPU hour.
    """

    gpus: int
    mfu: float = 0.4
    bandwidth: float = 400e9
    price: float = 2.5


@dataclass(frozen=True)
class Gpu:
    """GPU model.

    Attributes:
        name: Product name.
        memory: Memory in bytes as reported by the driver.
    """

    name: str
    memory: int

    @property
    def usable(self) -> int:
        """Bytes available for tensors."""
        return int((self.memory - CONTEXT) * (1 - GAPS))

    def processes(self, needed: float) -> int:
        """Return the number of processes with this many bytes of tensors that fit side by side."""
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
"""GPUs in ascending order of memory."""


def fitting(needed: float) -> Iterator[Gpu]:
    """Iterate over the GPUs that hold this many bytes of tensors, smallest first."""
    return (gpu for gpu in GPUS if gpu.usable >= needed)
