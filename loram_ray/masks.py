"""Masks of non-structured pruning: one bit a weight, in a file of their own beside the plan."""

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
    """Return the mask, bool ``[out, columns]``, of uint8 ``[out, ceil(columns / 8)]``."""
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :columns]


def packed_spec(shape: tuple[int, ...]) -> TensorSpec:
    """Shape and dtype of the packed mask of a weight ``[out, in]``."""
    return TensorSpec((shape[0], -(-shape[1] // _BITS)), torch.uint8)


@dataclass(frozen=True)
class Masks:
    """The masks of a model: which weights of each pruned linear were kept.

    They are read one linear at a time: a 70B model's are 9 GB.

    Attributes:
        path: the file, a packed mask for each module path.
        shapes: shape ``[out, in]`` of each masked weight, by module path.
        sha256: of the file.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    sha256: str

    @cached_property
    def file(self) -> TensorFile:
        """The open file.

        Raises:
            LoramError: it is missing, corrupt, or holds other masks than the plan says.
        """
        file = TensorFile(self.path)
        if file.specs != {name: packed_spec(shape) for name, shape in self.shapes.items()}:
            file.close()
            raise LoramError(f"{self.path} holds other masks than its plan says; restore it")
        return file

    def packed(self, module: str) -> torch.Tensor:
        """The packed mask of a linear, uint8 ``[out, ceil(in / 8)]``."""
        return self.file.read(module)

    def read(self, module: str) -> torch.Tensor:
        """The mask of a linear, bool ``[out, in]``: True where the weight was kept."""
        return unpack(self.packed(module), self.shapes[module][1])

    def place_in(self, directory: Path) -> Path:
        """Have the file in a directory: as a link where the file system can, else as a copy."""
        target = directory / MASKS_FILE
        if target != self.path:
            target.unlink(missing_ok=True)
            try:
                os.link(self.path, target)
            except OSError:
                shutil.copyfile(self.path, target)
        return target
