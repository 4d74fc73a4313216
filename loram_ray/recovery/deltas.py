"""Changes to merge into a base: a LoRA, or the dense delta of a masked LoRA."""

from __future__ import annotations

from pathlib import Path

import torch

from loram_ray.artifacts.adapter import Adapter
from loram_ray.artifacts.adapter_names import tensor_name
from loram_ray.artifacts.manifest import digest_of, hash_file
from loram_ray.artifacts.tensorfile import Checkpoint, index_file
from loram_ray.recovery.scatter import merged_weight

DELTA = "delta"
"""Stem of the files of a dense delta, with one float32 tensor ``<module>.weight`` per module."""


class LoraChange:
    """Weight change given by a PEFT LoRA directory.

    Attributes:
        directory: Directory of the LoRA.
        modules: Paths of the linears that it changes.
        adapter: The open LoRA.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.adapter = Adapter(directory, key)
        self.directory, self.modules = self.adapter.directory, self.adapter.modules

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the content."""
        return digest_of([self.adapter.config, hash_file(self.adapter.file.path)])

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape ``[out, in]`` of the weight to change."""
        specs = self.adapter.specs
        rows, columns = (specs[tensor_name(module, side)].shape for side in "BA")
        return rows[0], columns[1]

    def added_to(self, weight: torch.Tensor, module: str) -> torch.Tensor:
        """Return the changed weight, summed in float32, in the weight's dtype."""
        a, b = (self.adapter.read(module, side) for side in "AB")
        return merged_weight(weight, a, b, self.adapter.scale(module))

    def applied(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Return the change of a module's output for ``x [..., in]``, in the dtype of ``x``."""
        a, b = (self.adapter.read(module, side).to(x) for side in "AB")
        return self.adapter.scale(module) * (x @ a.T @ b.T)

    def close(self) -> None:
        """Close the LoRA's file."""
        self.adapter.close()


class DeltaChange:
    """Weight change given by a dense delta, read one linear at a time.

    Attributes:
        directory: Directory of the delta.
        modules: Paths of the linears that it changes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checkpoint = Checkpoint(directory, DELTA)
        self.modules = [name.removesuffix(".weight") for name in self._checkpoint.location]

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the content."""
        return digest_of([hash_file(file.path) for file in self._checkpoint.files.values()])

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape ``[out, in]`` of the weight to change."""
        rows, columns = self._checkpoint.specs[f"{module}.weight"].shape
        return rows, columns

    def added_to(self, weight: torch.Tensor, module: str) -> torch.Tensor:
        """Return the changed weight, summed in float32, in the weight's dtype."""
        return (weight.float() + self._checkpoint.read(f"{module}.weight")).to(weight.dtype)

    def applied(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Return the change of a module's output for ``x [..., in]``, in the dtype of ``x``."""
        return x @ self._checkpoint.read(f"{module}.weight").to(x).T

    def close(self) -> None:
        """Close the delta's files."""
        self._checkpoint.close()


Change = LoraChange | DeltaChange


def is_delta(directory: Path) -> bool:
    """Return whether a directory holds a dense delta."""
    return any((directory / name).exists() for name in (f"{DELTA}.safetensors", index_file(DELTA)))


def open_change(directory: Path, key: str) -> Change:
    """Open the LoRA or dense delta of a directory; close it after use.

    Args:
        directory: Directory written by recover or train, or any PEFT LoRA directory.
        key: Configuration key that named it, for messages.

    Raises:
        LoramError: If the directory holds neither, or is damaged.
    """
    return DeltaChange(directory) if is_delta(directory) else LoraChange(directory, key)
