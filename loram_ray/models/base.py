"""The model that a stage reads: its directory, its ``config.json`` and its weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture
from loram_ray.artifacts.manifest import (
    fingerprint,
    read_manifest,
    read_model_config,
    require_stage,
)
from loram_ray.errors import LoramError
from loram_ray.models.files import family_described, resolve_base
from loram_ray.models.weights import ModelCheckpoint
from loram_ray.units import Geometry


class BaseModel:
    """A model directory whose parts are read lazily, each once.

    Use it as a context manager to close the files of its weights.

    Args:
        directory: Directory of the model.
        key: Configuration key that named the model, for messages.
        place: Value of that key, for messages; the directory by default.
    """

    def __init__(self, directory: Path, key: str, place: str | Path | None = None) -> None:
        self.directory = directory
        self.key = key
        self.place = directory if place is None else place

    @classmethod
    def open(cls, place: str | Path, key: str) -> BaseModel:
        """Open a model, downloading a hub id once into the hub's cache.

        Args:
            place: Directory or hub id of the model.
            key: Configuration key that named it, for messages.

        Raises:
            LoramError: If it is neither a directory nor a model on the hub that this machine can
                read.
        """
        return cls(resolve_base(place, key), key, place)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``, cached; copy it before changing it."""
        return read_model_config(self.directory)

    @cached_property
    def family(self) -> Architecture:
        """Family of the model."""
        return family_described(self.config, self.directory)

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes of the model."""
        return self.family.geometry(self.config)

    @property
    def positions(self) -> int | None:
        """Maximum sequence length in tokens, or None if the configuration does not set it."""
        return self.config.get("max_position_embeddings")

    @property
    def is_pruned(self) -> bool:
        """Whether the model is pruned or derives from a pruned model."""
        return self.config.get("pruned_linears") is not None

    @cached_property
    def checkpoint(self) -> ModelCheckpoint:
        """The open weights, checked against ``config.json``."""
        return ModelCheckpoint(self.directory, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model, see `manifest.fingerprint`."""
        return fingerprint(self.checkpoint, self.config)

    def identify(self) -> tuple[str, str]:
        """Return the directory's digest and the fingerprint of its base.

        A directory that a stage wrote is checked against its manifest. A merged model, like any
        directory without a manifest, is its own base.

        Raises:
            LoramError: If it is not a model directory, or is damaged.
        """
        family_described(self.config, self.directory)
        manifest = None
        if read_manifest(self.directory) is not None:
            stages = ("prune", "align", "quantize", "merge")
            manifest = require_stage(self.directory, stages, self.key)
        if manifest is not None and manifest.stage != "merge":
            ModelCheckpoint(
                self.directory, self.config
            ).close()  # raises an error if the model is damaged
            return manifest.digest, manifest.base_fingerprint
        with self:
            return self.fingerprint, self.fingerprint

    def weight(self, module: str) -> torch.Tensor:
        """Return the weight of a linear, ``[out, in]``.

        Raises:
            LoramError: If it contains NaN or infinity.
        """
        return self.checkpoint.read(f"{module}.weight")

    def require_full(self, reason: str = "") -> None:
        """Check that the model is neither pruned nor quantised.

        Args:
            reason: Why a quantised model is rejected; the message appends it to "is quantised".

        Raises:
            LoramError: If it is pruned or quantised.
        """
        if self.is_pruned:
            raise LoramError(
                f"{self.key} must be a model that is not pruned, but {self.place} is; use its base"
            )
        if self.config.get("quantization_config"):
            raise LoramError(
                f"{self.key} must be in full precision, but {self.place} is quantised{reason}; use "
                "the model that it was quantised from"
            )

    def close(self) -> None:
        """Close the files of the weights if they are open."""
        checkpoint = self.__dict__.pop("checkpoint", None)
        if checkpoint is not None:
            checkpoint.close()

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
