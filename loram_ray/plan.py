"""The pruning plan: which GQA groups and neurons of each layer were kept.

A plan is what a user needs, besides the pruned model, to carry an adapter back to the base: it
turns the kept units of a layer into the kept rows or columns of each of its linears.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loram_ray.architectures import Architecture, CoupledLinear, Geometry, Unit, architecture_of
from loram_ray.artifacts.tensorfile import TensorFile, TensorSpec, TensorWriter
from loram_ray.criteria import STRUCTURED
from loram_ray.errors import LoramError, shown
from loram_ray.masks import MASKS_FILE, Masks
from loram_ray.utils.parsing import parse_json

PLAN_FILE = "pruning_plan.safetensors"
_FORMAT = "1"


def kept_neuron_count(intermediate_size: int, ratio: float) -> int:
    """Neurons kept of ``d_ff`` at a ratio: ``d_ff - ceil(ratio * d_ff)`` (LoRAM's counts).

    The ratio is taken as the decimal number that was written, so 0.35 of 100 is exactly 35.
    """
    return intermediate_size - math.ceil(Fraction(str(ratio)) * intermediate_size)


def kept_kv_head_count(num_heads: int, num_kv_heads: int, ratio: float) -> int:
    """KV heads kept: ``n_kv - int(ratio * n_kv)`` under GQA, ``int(n * (1 - ratio))`` under MHA."""
    exact = Fraction(str(ratio))
    if num_kv_heads == num_heads:
        return int(num_heads * (1 - exact))
    return num_kv_heads - int(exact * num_kv_heads)


@dataclass(frozen=True)
class KeptUnits:
    """The kept units of one layer.

    Attributes:
        kv_heads: ascending indices of kept KV heads, int64 ``[kept]``.
        neurons: ascending indices of kept intermediate neurons, int64 ``[kept]``, or
            ``[experts, kept]`` where each expert has its own.
    """

    kv_heads: torch.Tensor
    neurons: torch.Tensor

    def of(self, unit: Unit, expert: int | None = None) -> torch.Tensor:
        """Kept indices in units of ``unit``; of one expert, or of all where none is given."""
        if unit is not Unit.NEURON:
            return self.kv_heads
        return self.neurons if expert is None else self.neurons[expert]


@dataclass(frozen=True)
class KeptIndices:
    """The kept rows (axis 0) or columns (axis 1) of one linear's weight ``[out, in]``.

    Attributes:
        axis: pruned dimension of the weight.
        index: ascending indices kept of it, int64 ``[kept]``.
        full_size: length of that dimension in the base.
    """

    axis: int
    index: torch.Tensor
    full_size: int


@dataclass(frozen=True)
class PruningPlan:
    """What a pruning kept of each layer, and what it was chosen from.

    A structured pruning keeps units; a non-structured one keeps single weights, which its masks
    say, and every shape stays.

    Attributes:
        model_type: family of the base.
        geometry: sizes of the base.
        method: criterion that chose the units.
        ratio: share pruned of each pruned layer.
        seed: seed of the choice.
        layer_range: first pruned layer and the one after the last.
        base_fingerprint: identity of the base, see `manifest.fingerprint`.
        layers: kept units of each pruned layer; a layer that is not in it is whole.
        pattern: ``structured``, ``unstructured``, or ``n:m`` for n zeros of each m weights.
        masks: kept weights of a non-structured pruning; its `layers` are empty.
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
        """The family's description."""
        return architecture_of(self.model_type)

    def kept(self, module: str) -> KeptIndices | None:
        """Kept rows or columns of the linear at this full path, or None where it is whole.

        A norm over pruned features has kept rows, too.
        """
        found = self.architecture.locate(module)
        if found is None or found[0] not in self.layers:
            return None
        layer, linear, expert = found
        return _kept_indices(self.geometry, linear, self.layers[layer], expert)

    def pruned_shape(self, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after pruning of a weight ``[out, in]`` or bias ``[out]`` of this linear."""
        kept = self.kept(module)
        if kept is None or (len(shape) == 1 and kept.axis == 1):
            return shape
        pruned = list(shape)
        pruned[kept.axis] = len(kept.index)
        return tuple(pruned)

    def linear_shapes(self, base_specs: dict[str, TensorSpec]) -> dict[str, tuple[int, int]]:
        """Shape ``[out, in]`` of every linear that pruning changes, by full path."""
        shapes = {}
        for name, spec in base_specs.items():
            module = name.removesuffix(".weight")
            pruned = self.pruned_shape(module, spec.shape)
            if module != name and len(pruned) == 2 and pruned != spec.shape:
                shapes[module] = (pruned[0], pruned[1])
        return shapes

    def select(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Cut a base parameter (full name, with ``.weight`` or ``.bias``) to what is kept of it."""
        module, _, kind = parameter.rpartition(".")
        kept = self.kept(module)
        if kept is None or (kind == "bias" and kept.axis == 1):
            return tensor
        if tensor.shape[kept.axis] != kept.full_size:
            raise LoramError(
                f"{parameter} has {tensor.shape[kept.axis]} along dimension {kept.axis}, the plan "
                f"expects {kept.full_size}; use the base that the plan was made for"
            )
        return tensor.index_select(kept.axis, kept.index)

    def require_base(self, fingerprint: str, what: str = "this base") -> None:
        """Refuse a base that the plan was not made for.

        Raises:
            LoramError: the fingerprints differ.
        """
        if fingerprint != self.base_fingerprint:
            raise LoramError(
                f"{what} has fingerprint {fingerprint[:12]}, the pruning plan was made for "
                f"{self.base_fingerprint[:12]}; use the base that was pruned"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything the plan says; equal plans have equal digests."""
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
        """Kept weights of the linear at this full path, bool ``[out, in]``; None where all are."""
        if self.masks is None or module not in self.masks.shapes:
            return None
        return self.masks.read(module)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for layer, kept in sorted(self.layers.items()):
            tensors[f"layers.{layer}.kv_heads"] = kept.kv_heads
            tensors[f"layers.{layer}.neurons"] = kept.neurons
        return tensors

    def save(self, directory: Path | str) -> str:
        """Write ``pruning_plan.safetensors`` into a directory; return the file's SHA-256.

        The masks' file comes to lie beside it.
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
        """Whether a directory holds a plan: that of a pruned model, or of an adapter of one."""
        return os.path.lexists(Path(directory) / PLAN_FILE)

    @classmethod
    def load_if_any(cls, directory: Path | str) -> PruningPlan | None:
        """Read a directory's plan; None where it holds none, as a base and its adapters.

        Raises:
            LoramError: the plan is corrupt, or its format is unknown.
        """
        return cls.load(directory) if cls.is_in(directory) else None

    @classmethod
    def load(cls, directory: Path | str) -> PruningPlan:
        """Read the plan of a pruned model, an aligned model or a pruned adapter.

        Raises:
            LoramError: there is no plan, it is corrupt, or its format is unknown.
        """
        from loram_ray.artifacts.schemas import WrittenPlan
        from loram_ray.utils.parsing.documents import checked

        path = Path(directory) / PLAN_FILE
        if not cls.is_in(directory):
            raise LoramError(
                f"{directory} holds no {PLAN_FILE}; give a directory that prune, align or train "
                "has written"
            )
        with TensorFile(path) as file:
            try:
                said: dict[str, Any] = parse_json(
                    file.metadata["loram_plan"], f"{path}: loram_plan"
                )
                if said["format"] != _FORMAT:
                    raise LoramError(
                        f"{path} has format {shown(said['format'])}, this loram_ray reads "
                        f"{_FORMAT}; install the version that wrote it"
                    )
                checked(WrittenPlan, said, f"{path}: plan")
                numbers = sorted({int(name.split(".")[1]) for name in file.specs})
                geometry = Geometry(**said["geometry"])
                layers = {i: _read_units(file, i, geometry) for i in numbers}
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
                raise LoramError(f"{path} is not a pruning plan ({error}); restore it") from error


def _read_masks(said: dict[str, Any] | None, path: Path) -> Masks | None:
    if said is None:
        return None
    if not os.path.lexists(path):
        raise LoramError(f"{path} is missing, the plan beside it needs it; copy it again")
    shapes = {name: (rows, columns) for name, (rows, columns) in said["shapes"].items()}
    return Masks(path, shapes, said["sha256"])


def _read_units(file: TensorFile, layer: int, geometry: Geometry) -> KeptUnits:
    units = KeptUnits(file.read(f"layers.{layer}.kv_heads"), file.read(f"layers.{layer}.neurons"))
    for unit in (Unit.KV_HEAD, Unit.NEURON):
        index, count = units.of(unit), geometry.count(unit)
        experts = (geometry.num_experts,) if unit is Unit.NEURON and geometry.num_experts else ()
        ascending = (
            index.dtype == torch.int64
            and index.dim() == 1 + len(experts)
            and index.shape[:-1] == experts
            and bool((index.diff() > 0).all())
        )
        if not ascending or not index.numel() or index.min() < 0 or index.max() >= count:
            raise ValueError(f"layer {layer} keeps no ascending {unit} indices below {count}")
    if layer >= geometry.num_layers:
        raise ValueError(f"layer {layer} of {geometry.num_layers}")
    return units


def _kept_indices(
    geometry: Geometry, linear: CoupledLinear, units: KeptUnits, expert: int | None
) -> KeptIndices:
    """Expand kept units into indices along the linear's pruned dimension, section by section."""
    parts, offset = [], 0
    for unit in linear.sections:
        width = geometry.width(unit)
        starts = units.of(unit, expert).unsqueeze(1) * width + offset
        parts.append((starts + torch.arange(width)).flatten())
        offset += geometry.count(unit) * width
    return KeptIndices(linear.axis, torch.cat(parts), offset)


def unit_sums(
    geometry: Geometry, linear: CoupledLinear, per_index: torch.Tensor
) -> dict[Unit, torch.Tensor]:
    """Sum a vector along a linear's pruned dimension over the indices of each unit.

    Args:
        geometry: sizes of the base.
        linear: the coupled linear.
        per_index: ``[size of the pruned dimension]``.

    Returns:
        ``[count]`` per kind of unit; the query heads of a KV head count with it, under
        ``Unit.KV_HEAD``, and all sections of a fused projection are summed.

    Raises:
        ValueError: the vector has another length than the dimension.
    """
    counts = [geometry.count(unit) for unit in linear.sections]
    widths = [geometry.width(unit) for unit in linear.sections]
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    if per_index.shape != (sum(sizes),):
        raise ValueError(f"{linear.name} has {sum(sizes)} indices, got {tuple(per_index.shape)}")
    sums: dict[Unit, torch.Tensor] = {}
    for unit, section, count in zip(linear.sections, per_index.split(sizes), counts, strict=True):
        kind = Unit.NEURON if unit is Unit.NEURON else Unit.KV_HEAD
        summed = section.reshape(count, -1).sum(1)
        sums[kind] = sums[kind] + summed if kind in sums else summed
    return sums
