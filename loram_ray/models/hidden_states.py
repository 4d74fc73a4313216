"""Hidden states of the calibration set on disk, with one file per layer and batch.

Only the current batch is in memory, and an interrupted calibration resumes from the files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_NAME = "states"


class HiddenStates:
    """Batches of hidden states ``[sequences, tokens, hidden]``, by kind, layer and batch number.

    Args:
        folder: Directory of the files, visible to workers on all nodes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, kind: str, layer: int, batch: int, states: torch.Tensor) -> None:
        """Write one batch atomically."""
        path = self._path(kind, layer, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({_NAME: states.detach().cpu().contiguous()}, partial)
        partial.replace(path)

    def read(self, kind: str, layer: int, batch: int) -> torch.Tensor:
        """Read one batch."""
        return load_file(self._path(kind, layer, batch))[_NAME]

    def drop(self, kind: str, layer: int) -> None:
        """Remove all batches of a layer."""
        shutil.rmtree(self._folder / f"{kind}-{layer:05d}", ignore_errors=True)

    def _path(self, kind: str, layer: int, batch: int) -> Path:
        return self._folder / f"{kind}-{layer:05d}" / f"{batch:06d}.safetensors"
