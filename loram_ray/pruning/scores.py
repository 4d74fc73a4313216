"""Importance scores on disk, which let another ratio reuse a calibration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.tensorfile import TensorFile, TensorSpec, TensorWriter
from loram_ray.criteria import CRITERIA
from loram_ray.errors import LoramError
from loram_ray.pruning.criteria import LayerScores
from loram_ray.utils.parsing import parse_json

SCORES_FILE = "importance.safetensors"
_NOT_KEPT = " and ".join(sorted(c.name for c in CRITERIA.values() if not c.reusable))
_NORMS = ".squared_input_norms"
_LAYER = re.compile(r"layers\.\d+\.")


def save_scores(
    directory: Path,
    method: str,
    scores: Mapping[int, LayerScores],
    norms: Mapping[str, torch.Tensor],
) -> str:
    """Write ``importance.safetensors`` and return its SHA-256.

    Args:
        directory: Directory to write to.
        method: Criterion, with its form.
        scores: Scores of units, by layer (structured pruning).
        norms: Wanda's squared input norms, by module path.
    """
    tensors = {f"{module}{_NORMS}": tensor for module, tensor in norms.items()}
    for layer, entry in scores.items():
        tensors |= {f"layers.{layer}.{unit}": scored for unit, scored in entry.items()}
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    metadata = {"loram_scores": json.dumps({"method": method})}
    writer = TensorWriter(directory / SCORES_FILE, specs, metadata)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.finish()


def load_scores(
    directory: Path, method: str, layers: tuple[int, int]
) -> tuple[dict[int, LayerScores], dict[str, torch.Tensor]]:
    """Read the scores of units and Wanda's squared input norms; one of the two is empty.

    Args:
        directory: Directory written by an earlier prune.
        method: Required criterion, with its form.
        layers: Required layers, as ``(first, end)`` with ``end`` excluded.

    Raises:
        LoramError: If there are no scores, or they are for another criterion or other layers.
    """
    path = directory / SCORES_FILE
    if not path.exists():
        raise LoramError(
            f"prune.scores must be a directory with {SCORES_FILE}, but {directory} has none "
            f"({_NOT_KEPT} store no scores); remove it to calibrate"
        )
    with TensorFile(path) as file:
        metadata = file.metadata.get("loram_scores", "{}")
        written: dict[str, Any] = parse_json(metadata, f"{path}: loram_scores")
        said = written.get("method")
        if said != method:
            raise LoramError(
                f"prune.scores must contain scores of {method}, but {directory} contains those of "
                f"{said}; change prune.method or remove prune.scores"
            )
        norms = {
            name.removesuffix(_NORMS): file.read(name)
            for name in file.specs
            if name.endswith(_NORMS)
        }
        held = {match[0] for name in file.specs if (match := _LAYER.search(name))}
        missing = [n for n in range(*layers) if f"layers.{n}." not in held]
        if missing:
            raise LoramError(
                f"prune.scores must contain layers [{layers[0]}, {layers[1]}), but {directory} "
                f"lacks layer {missing[0]}; change prune.layers or remove prune.scores"
            )
        if norms:
            return {}, norms
        scores = {
            layer: LayerScores(
                {
                    name.removeprefix(prefix): file.read(name)
                    for name in file.specs
                    if name.startswith(prefix := f"layers.{layer}.")
                }
            )
            for layer in range(*layers)
        }
        return scores, {}
