"""Pruning plans: the GQA groups and neurons that pruning kept in each layer.

A plan is what recovery needs, besides the pruned model, to bring an adapter back to the base. It
maps the kept units of a layer to the kept rows or columns of each of its linears.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture, CoupledLinear, architecture_of
from loram_ray.artifacts.tensorfile import TensorFile, TensorSpec, TensorWriter
from loram_ray.criteria import STRUCTURED
from loram_ray.errors import LoramError, shown
from loram_ray.masks import MASKS_FILE, Masks
from loram_ray.units import Geometry, PerUnit, Unit
from loram_ray.utils.parsing import parse_json

PLAN_FILE = "pruning_plan.safetensors"
_FORMAT = "1"


class KeptUnits(PerUnit):
    """The kept units of one layer: ascending indices by kind of unit.

    Their shape is int64 ``[kept]``, or ``[experts, kept]`` if each expert keeps its own.
    """


@dataclass(frozen=True)
class KeptIndices:
    """The kept rows (axis 0) or columns (axis 1) of one linear's weight ``[out, in]``.

    Attributes:
        axis: Pruned dimension of the weight.
        index: Ascending kept indices along that dimension, int64 ``[kept]``.
        full_size: Size of that dimension in the base.
    """

    axis: int
    index: torch.Tensor
    full_size: int


@dataclass(frozen=True)
class PruningPlan:
    """The units or weights that pruning kept, and the settings that selected them.

    Structured pruning keeps whole units. Non-structured pruning keeps single weights, recorded in
    `masks`, and leaves every shape unchanged.

    Attributes:
        model_type: Family of the base.
        geometry: Sizes of the base.
        method: Criterion that selected the units.
        ratio: Pruned share of each pruned layer.
        seed: Random seed of the selection.
        layer_range: Pruned layers, as ``(first, end)`` with ``end`` excluded.
        base_fingerprint: Identity of the base, see `manifest.fingerprint`.
        layers: Kept units by layer number; layers not listed are unpruned.
        pattern: ``structured``, ``unstructured``, or ``n:m`` for n zeros in each m weights.
        masks: Kept weights of non-structured pruning, for which `layers` is empty.
    """

    model_type: str
    geometry: Geometry
    method: str
    ratio: float
    seed: int
    layer_range: tuple[int, int]
    base_fingerprint: str
    layers: dict[int, KeptUnits]
    pattern: str = STRUCTURED
    masks: Masks | None = None

    @property
    def architecture(self) -> Architecture:
        """The description of the base's family."""
        return architecture_of(self.model_type)

    def kept(self, module: str) -> KeptIndices | None:
        """Return the kept rows or columns of the linear at this full path; None if it is unpruned.

        A norm over pruned features has kept rows, too.
        """
        found = self.architecture.locate(module)
        if found is None or found[0] not in self.layers:
            return None
        layer, linear, expert = found
        return _kept_indices(self.geometry, linear, self.layers[layer], expert)

    def pruned_shape(self, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the pruned shape of this linear's weight ``[out, in]`` or bias ``[out]``."""
        kept = self.kept(module)
        if kept is None or (len(shape) == 1 and kept.axis == 1):
            return shape
        pruned = list(shape)
        pruned[kept.axis] = len(kept.index)
        return tuple(pruned)

    def linear_shapes(self, base_specs: dict[str, TensorSpec]) -> dict[str, tuple[int, int]]:
        """Return the pruned shape ``[out, in]`` of every changed linear, by full path."""
        shapes = {}
        for name, spec in base_specs.items():
            module = name.removesuffix(".weight")
            pruned = self.pruned_shape(module, spec.shape)
            if module != name and len(pruned) == 2 and pruned != spec.shape:
                shapes[module] = (pruned[0], pruned[1])
        return shapes

    def select(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Select the kept rows or columns of a base parameter.

        Args:
            parameter: Full name, with ``.weight`` or ``.bias``.
            tensor: Value of the parameter in the base.

        Raises:
            LoramError: If the tensor does not have the size that the plan expects.
        """
        module, _, kind = parameter.rpartition(".")
        kept = self.kept(module)
        if kept is None or (kind == "bias" and kept.axis == 1):
            return tensor
        if tensor.shape[kept.axis] != kept.full_size:
            raise LoramError(
                f"{parameter} has size {tensor.shape[kept.axis]} along dimension {kept.axis}, but "
                f"the plan requires {kept.full_size}; use the base that was pruned"
            )
        return tensor.index_select(kept.axis, kept.index)

    def require_base(self, fingerprint: str, what: str = "this base") -> None:
        """Check that the plan was made for a base.

        Raises:
            LoramError: If the fingerprints differ.
        """
        if fingerprint != self.base_fingerprint:
            raise LoramError(
                f"{what} has fingerprint {fingerprint[:12]}, but the pruning plan is for "
                f"{self.base_fingerprint[:12]}; use the base that was pruned"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's content; equal plans have equal digests."""
        digest = hashlib.sha256(json.dumps(self._describe(), sort_keys=True).encode())
        for name, tensor in self._tensors().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def _describe(self) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "model_type": self.model_type,
            "geometry": asdict(self.geometry),
            "method": self.method,
            "ratio": self.ratio,
            "seed": self.seed,
            "layer_range": list(self.layer_range),
            "base_fingerprint": self.base_fingerprint,
            "pattern": self.pattern,
            "masks": self._describe_masks(),
        }

    def _describe_masks(self) -> dict[str, object] | None:
        if self.masks is None:
            return None
        shapes = {name: list(shape) for name, shape in self.masks.shapes.items()}
        return {"sha256": self.masks.sha256, "shapes": shapes}

    def mask(self, module: str) -> torch.Tensor | None:
        """Return a linear's mask by full path, bool ``[out, in]``; None if it has none."""
        if self.masks is None or module not in self.masks.shapes:
            return None
        return self.masks.read(module)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for layer, kept in sorted(self.layers.items()):
            for unit in self.architecture.units:
                tensors[f"layers.{layer}.{unit.name}"] = kept[unit.name]
        return tensors

    def save(self, directory: Path | str) -> str:
        """Write ``pruning_plan.safetensors`` into a directory; return the file's SHA-256.

        The masks' file, if there is one, is linked into the same directory.
        """
        if self.masks is not None:
            self.masks.link_into(Path(directory))
        tensors = self._tensors()
        specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        metadata = {"loram_plan": json.dumps(self._describe())}
        writer = TensorWriter(Path(directory) / PLAN_FILE, specs, metadata)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish()

    @staticmethod
    def is_in(directory: Path | str) -> bool:
        """Return whether a directory holds a plan, as pruned models and their adapters do."""
        return os.path.lexists(Path(directory) / PLAN_FILE)

    @classmethod
    def load_if_any(cls, directory: Path | str) -> PruningPlan | None:
        """Read a directory's plan; return None if it holds none, as bases and their adapters do.

        Raises:
            LoramError: If the plan is corrupt or its format is unknown.
        """
        return cls.load(directory) if cls.is_in(directory) else None

    @classmethod
    def load(cls, directory: Path | str) -> PruningPlan:
        """Read the plan of a pruned model, an aligned model or a pruned adapter.

        Raises:
            LoramError: If the plan is missing or corrupt, or its format is unknown.
        """
        from loram_ray.artifacts.schemas import WrittenPlan
        from loram_ray.utils.parsing.documents import checked

        path = Path(directory) / PLAN_FILE
        if not cls.is_in(directory):
            raise LoramError(
                f"{directory} contains no {PLAN_FILE}; use a directory written by prune, align or "
                "train"
            )
        with TensorFile(path) as file:
            try:
                said: dict[str, Any] = parse_json(
                    file.metadata["loram_plan"], f"{path}: loram_plan"
                )
                if said["format"] != _FORMAT:
                    raise LoramError(
                        f"{path} has format {shown(said['format'])}, but this version of loram_ray "
                        f"reads {_FORMAT}; install the version that wrote it"
                    )
                checked(WrittenPlan, said, f"{path}: plan")
                numbers = sorted({int(name.split(".")[1]) for name in file.specs})
                geometry = Geometry(**said["geometry"])
                units = architecture_of(said["model_type"]).units
                layers = {i: _read_units(file, i, units, geometry) for i in numbers}
                return cls(
                    model_type=said["model_type"],
                    geometry=geometry,
                    method=said["method"],
                    ratio=said["ratio"],
                    seed=said["seed"],
                    layer_range=tuple(said["layer_range"]),
                    base_fingerprint=said["base_fingerprint"],
                    layers=layers,
                    pattern=said["pattern"],
                    masks=_read_masks(said["masks"], path.with_name(MASKS_FILE)),
                )
            except (LookupError, ValueError, TypeError) as error:
                raise LoramError(
                    f"{path} is not a valid pruning plan ({error}); restore it"
                ) from error


def _read_masks(said: dict[str, Any] | None, path: Path) -> Masks | None:
    if said is None:
        return None
    if not os.path.lexists(path):
        raise LoramError(f"{path} is missing, but the plan next to it requires it; copy it again")
    shapes = {name: (rows, columns) for name, (rows, columns) in said["shapes"].items()}
    return Masks(path, shapes, said["sha256"])


def _read_units(
    file: TensorFile, layer: int, units: Iterable[Unit], geometry: Geometry
) -> KeptUnits:
    if layer >= geometry.num_layers:
        raise ValueError(f"layer {layer} of {geometry.num_layers}")
    kept = KeptUnits()
    for unit in units:
        index = kept[unit.name] = file.read(f"layers.{layer}.{unit.name}")
        *experts, count = unit.shape(geometry)
        ascending = (
            index.dtype == torch.int64
            and index.dim() == 1 + len(experts)
            and list(index.shape[:-1]) == experts
            and bool((index.diff() > 0).all())
        )
        if not ascending or not index.numel() or index.min() < 0 or index.max() >= count:
            raise ValueError(f"layer {layer} must keep ascending {unit.title} below {count}")
    return kept


def _kept_indices(
    geometry: Geometry, linear: CoupledLinear, kept: KeptUnits, expert: int | None
) -> KeptIndices:
    """Expand kept units into indices along the linear's pruned dimension, span by span."""
    parts, offset = [], 0
    for span in linear.spans:
        width = span.width(geometry)
        starts = span.unit.index(kept, expert).unsqueeze(1) * width + offset
        parts.append((starts + torch.arange(width)).flatten())
        offset += span.size(geometry)
    return KeptIndices(linear.axis, torch.cat(parts), offset)


def unit_sums(
    geometry: Geometry, linear: CoupledLinear, per_index: torch.Tensor
) -> dict[Unit, torch.Tensor]:
    """Sum a vector along a linear's pruned dimension over the indices of each unit.

    Args:
        geometry: Sizes of the base.
        linear: The coupled linear.
        per_index: Values to sum, ``[size of the pruned dimension]``.

    Returns:
        Sums ``[count]`` by kind of unit; those of all spans of a fused projection are added.

    Raises:
        ValueError: If the vector's length is not the size of the dimension.
    """
    sizes = [span.size(geometry) for span in linear.spans]
    if per_index.shape != (sum(sizes),):
        raise ValueError(f"{linear.name} has {sum(sizes)} indices, got {tuple(per_index.shape)}")
    sums: dict[Unit, torch.Tensor] = {}
    for span, part in zip(linear.spans, per_index.split(sizes), strict=True):
        unit, summed = span.unit, part.reshape(-1, span.width(geometry)).sum(1)
        sums[unit] = sums[unit] + summed if unit in sums else summed
    return sums
