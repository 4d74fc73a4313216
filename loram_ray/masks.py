"""Masks of unstructured pruning: one bit per weight, in a separate file beside the plan."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from loram_ray.artifacts.tensorfile import TensorFile, TensorSpec
from loram_ray.errors import LoramError

MASKS_FILE = "pruning_masks.safetensors"
_BITS = 8


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask, bool ``[out, in]``, into uint8 ``[out, ceil(in / 8)]``, lowest bit first."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % _BITS))
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    return (padded.view(rows, -1, _BITS) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack uint8 ``[out, ceil(columns / 8)]`` into a mask, bool ``[out, columns]``."""
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :columns]


def packed_spec(shape: tuple[int, ...]) -> TensorSpec:
    """Return the shape and dtype of the packed mask for a weight ``[out, in]``."""
    return TensorSpec((shape[0], -(-shape[1] // _BITS)), torch.uint8)


@dataclass(frozen=True)
class Masks:
    """Masks of a model: which weights of each pruned linear are kept.

    Masks are read one linear at a time, as those of a 70B model take 9 GB.

    Attributes:
        path: File with one packed mask per module path.
        shapes: Shape ``[out, in]`` of each masked weight, by module path.
        sha256: SHA-256 digest of the file.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    sha256: str

    @cached_property
    def file(self) -> TensorFile:
        """The open masks file.

        Raises:
            LoramError: The file is missing, corrupt, or does not match the plan.
        """
        file = TensorFile(self.path)
        if file.specs != {name: packed_spec(shape) for name, shape in self.shapes.items()}:
            file.close()
            raise LoramError(f"{self.path} does not match its pruning plan; restore the file")
        return file

    def packed(self, module: str) -> torch.Tensor:
        """Read the packed mask of a linear, uint8 ``[out, ceil(in / 8)]``."""
        return self.file.read(module)

    def read(self, module: str) -> torch.Tensor:
        """Read the mask of a linear, bool ``[out, in]``: True where the weight is kept."""
        return unpack(self.packed(module), self.shapes[module][1])

    def link_into(self, directory: Path) -> Path:
        """Hard-link the file into a directory, or copy it if the file system has no hard links."""
        target = directory / MASKS_FILE
        if target != self.path:
            target.unlink(missing_ok=True)
            try:
                os.link(self.path, target)
            except OSError:
                shutil.copyfile(self.path, target)
        return target
