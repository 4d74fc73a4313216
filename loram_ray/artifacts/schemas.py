"""Schemas of this package's own files, with types and bounds: manifests, plans and indices.

This module is imported only where a file is read, so the mathematics does not need pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from loram_ray.artifacts import FORMAT
from loram_ray.errors import shown
from loram_ray.utils.names import is_inside, name_error
from loram_ray.utils.parsing.documents import Document


class _File(Document):
    """Entry of a file in a manifest."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class WrittenManifest(Document):
    """Schema of a manifest."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    identity: str
    base_fingerprint: str
    parents: dict[str, str]
    settings: dict[str, Any]
    details: dict[str, Any] = {}
    files: dict[str, _File] = {}
    versions: dict[str, str] = {}
    created: float = 0.0
    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)

    @field_validator("files")
    @classmethod
    def _in_the_directory(cls, files: dict[str, _File]) -> dict[str, _File]:
        for name in files:
            if not is_inside(name):
                raise ValueError(f"must name files in its directory, got {shown(name)}")
        return files


_Size = Annotated[int, Field(ge=1, le=10**7)]


class _Geometry(Document):
    """Schema of a stored `Geometry`."""

    model_config = ConfigDict(extra="forbid")

    num_layers: Annotated[int, Field(ge=1, le=10**4)]
    hidden_size: _Size
    intermediate_size: _Size
    num_heads: Annotated[int, Field(ge=1, le=10**5)]
    num_kv_heads: Annotated[int, Field(ge=1, le=10**5)]
    head_dim: Annotated[int, Field(ge=1, le=10**5)]
    num_experts: Annotated[int, Field(ge=0, le=10**5)] = 0


class _Masks(Document):
    """Schema of stored `Masks`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    shapes: dict[str, Annotated[list[_Size], Field(min_length=2, max_length=2)]]


class WrittenPlan(Document):
    """Schema of a stored `PruningPlan`."""

    format: str
    model_type: str
    geometry: _Geometry
    method: str
    ratio: float = Field(ge=0, lt=1)
    seed: int = Field(ge=0, lt=2**64)
    layer_range: Annotated[
        list[Annotated[int, Field(ge=0, le=10**4)]], Field(min_length=2, max_length=2)
    ]
    base_fingerprint: str
    pattern: str
    masks: _Masks | None


class WrittenIndex(Document):
    """Schema of the index of sharded files."""

    weight_map: dict[str, str]

    @field_validator("weight_map")
    @classmethod
    def _beside_it(cls, weight_map: dict[str, str]) -> dict[str, str]:
        for name in set(weight_map.values()):
            if (fault := name_error(name)) is not None:
                raise ValueError(f"must name files that are {fault}, got {shown(name)}")
        return weight_map
