"""Opening the weights of a model directory: every stage reads them through here.

``model.safetensors``, or the shards of ``model.safetensors.index.json``, is the model, whatever
else is beside it: pickled weights, an adapter, weights of other precisions, a subfolder.
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
    """The weights of a model directory, whose names and shapes are those of its ``config.json``.

    Only headers are read; values are checked tensor by tensor, where they are read.

    Args:
        directory: a base, pruned, aligned, quantised or merged model.
        config: content of its ``config.json``, if that was read.

    Raises:
        LoramError: a file or a tensor is missing, a tensor has another shape, or there is one that
            the configuration has no place for.
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
        """Refuse a tensor in two shards: transformers reads the last, not what the index says."""
        for file_name, file in self.files.items():
            for name in file.specs:
                if self.location[name] != file_name:
                    raise LoramError(
                        f"{self.directory} holds tensor {name} twice, in {self.location[name]} and "
                        f"{file_name}; download the model again"
                    )

    @property
    def family(self) -> Architecture:
        """The model's family."""
        return family_in(self.config)

    def has_own_head(self) -> bool:
        """Whether the output head differs from the embeddings, whatever ``config.json`` says.

        transformers does not tie a stored head whose values differ from those of the stored
        embeddings.
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
