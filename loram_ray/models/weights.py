"""Weights of a model directory, as every stage opens them.

The model is ``model.safetensors``, or the shards of ``model.safetensors.index.json``. Other files
are ignored: pickled weights, an adapter, weights of other precisions, subfolders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture
from loram_ray.artifacts.manifest import read_model_config
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.errors import LoramError
from loram_ray.models.tensors import family_in, require_described

_COMPARED_BYTES = 2**22


class ModelCheckpoint(Checkpoint):
    """The weights of a model directory, with names and shapes checked against ``config.json``.

    Only headers are read on opening; values are checked when each tensor is read.

    Args:
        directory: Directory of a base, pruned, aligned, quantised or merged model.
        config: Content of its ``config.json``; read from the directory by default.

    Raises:
        LoramError: If a file or a tensor is missing, a tensor has another shape, or the
            configuration does not describe it.
    """

    def __init__(self, directory: Path | str, config: dict[str, Any] | None = None) -> None:
        self.config = read_model_config(directory) if config is None else config
        super().__init__(directory)
        try:
            self._require_once()
            require_described(self.directory, self.config, self.specs, self.entry)
        except BaseException:
            self.close()
            raise

    def _require_once(self) -> None:
        """Reject a tensor in two shards: transformers reads the last, whatever the index says."""
        for file_name, file in self.files.items():
            for name in file.specs:
                if self.location[name] != file_name:
                    raise LoramError(
                        f"{self.directory} has tensor {name} twice, in {self.location[name]} and "
                        f"{file_name}; download the model again"
                    )

    @property
    def family(self) -> Architecture:
        """Family of the model."""
        return family_in(self.config)

    def has_own_head(self) -> bool:
        """Return whether the stored output head differs from the embeddings.

        transformers does not tie a stored head whose values differ from those of the stored
        embeddings, whatever ``config.json`` says.
        """
        family = self.family
        if not family.is_tied(self.config):
            return True
        head, embeddings = f"{family.output_head}.weight", f"{family.embeddings}.weight"
        if head not in self.location:
            return False
        spec = self.specs[head]
        step = max(1, _COMPARED_BYTES * spec.shape[0] // max(spec.nbytes, 1))
        parts = torch.arange(spec.shape[0]).split(step)
        return not all(
            torch.equal(self.read_rows(head, rows), self.read_rows(embeddings, rows))
            for rows in parts
        )
