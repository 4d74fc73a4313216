"""The model that a stage reads: where it is, what its ``config.json`` says, and its weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture, Geometry
from loram_ray.artifacts.manifest import (
    fingerprint,
    read_manifest,
    read_model_config,
    require_stage,
)
from loram_ray.errors import LoramError
from loram_ray.models.files import family_described, resolve_base
from loram_ray.models.weights import ModelCheckpoint


class BaseModel:
    """A model directory; each of its parts is read once, when it is first used.

    Use it as a context manager, which closes the files of its weights.

    Args:
        directory: the model.
        key: configuration key that named it, for messages.
        place: what the key said, for messages; default: the directory.
    """

    def __init__(self, directory: Path, key: str, place: str | Path | None = None) -> None:
        self.directory = directory
        self.key = key
        self.place = directory if place is None else place

    @classmethod
    def open(cls, place: str | Path, key: str) -> BaseModel:
        """Find a model, downloading a hub id once into the hub's cache.

        Args:
            place: a directory or a hub id.
            key: configuration key it came from, for messages.

        Raises:
            LoramError: neither a directory nor a model that the hub has and this machine may read.
        """
        return cls(resolve_base(place, key), key, place)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``, which is read once: copy it to change it."""
        return read_model_config(self.directory)

    @cached_property
    def family(self) -> Architecture:
        """The model's family."""
        return family_described(self.config, self.directory)

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the model."""
        return self.family.geometry(self.config)

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None where its config does not say."""
        return self.config.get("max_position_embeddings")

    @property
    def is_pruned(self) -> bool:
        """Whether prune made it, or a stage made it from such a model."""
        return self.config.get("pruned_linears") is not None

    @cached_property
    def checkpoint(self) -> ModelCheckpoint:
        """The weights, opened and checked against ``config.json``."""
        return ModelCheckpoint(self.directory, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model from others, see `manifest.fingerprint`."""
        return fingerprint(self.checkpoint, self.config)

    def identify(self) -> tuple[str, str]:
        """Return the directory's digest and the fingerprint of the base that it comes from.

        A directory that a stage wrote is checked against its manifest. A merged model is a base in
        its own right, as any other directory is.

        Raises:
            LoramError: not a model directory, or damaged.
        """
        family_described(self.config, self.directory)
        manifest = None
        if read_manifest(self.directory) is not None:
            stages = ("prune", "align", "quantize", "merge")
            manifest = require_stage(self.directory, stages, self.key)
        if manifest is not None and manifest.stage != "merge":
            ModelCheckpoint(self.directory, self.config).close()  # refuses a damaged model
            return manifest.digest, manifest.base_fingerprint
        with self:
            return self.fingerprint, self.fingerprint

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a linear, ``[out, in]``.

        Raises:
            LoramError: it holds NaN or infinity.
        """
        return self.checkpoint.read(f"{module}.weight")

    def require_full(self, reason: str = "") -> None:
        """Refuse a model that is pruned or quantised.

        Args:
            reason: why a quantised one is refused, to follow on "is quantised".
        """
        if self.is_pruned:
            raise LoramError(
                f"{self.key} must be a model that is not pruned, {self.place} is; give its base"
            )
        if self.config.get("quantization_config"):
            raise LoramError(
                f"{self.key} must be in full precision, {self.place} is quantised{reason}; give "
                "the model that was quantised"
            )

    def close(self) -> None:
        """Close the files of the weights, if they were opened."""
        checkpoint = self.__dict__.pop("checkpoint", None)
        if checkpoint is not None:
            checkpoint.close()

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
