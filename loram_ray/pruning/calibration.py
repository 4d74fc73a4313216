"""Calibration of a base, one layer at a time.

Forward criteria carry the hidden states of the calibration set from layer to layer. The Taylor
criterion stores the input of every layer on disk and then carries the gradients back. A 70B model
thus needs the memory of one layer, where a full backward pass needs several times the model's. A
journal records the progress after every layer, and an interrupted calibration resumes from it.

Each worker processes shares of the calibration set. Sums are accumulated share by share in a fixed
order, so the result does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loram_ray.architectures import Architecture
from loram_ray.artifacts.manifest import write_json
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.masks import pack
from loram_ray.models.hidden_states import HiddenStates
from loram_ray.pruning.criteria import (
    SCORES,
    Evidence,
    LayerScores,
    TaylorForm,
    layer_linears,
    score_layer,
)
from loram_ray.pruning.pool import Pool
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.sparsify import Sparsified
from loram_ray.pruning.statistics import SquaredNorms, Statistic
from loram_ray.pruning.worker import CalibrationSpec, Gradients
from loram_ray.runtime.progress import Reporter
from loram_ray.units import Geometry

_JOURNAL = "journal.json"


class Calibration:
    """A calibration of one base, with one method per kind of criterion.

    Args:
        spec: Settings that the workers were given.
        pool: Pool of workers.
        checkpoint: Weights of the base.
        family: Family of the base.
        geometry: Sizes of the base.
        layers: Pruned layers, as ``(first, end)`` with ``end`` excluded.
        reporter: Progress display, advanced by one per layer.
    """

    def __init__(
        self,
        spec: CalibrationSpec,
        pool: Pool,
        checkpoint: Checkpoint,
        family: Architecture,
        geometry: Geometry,
        layers: tuple[int, int],
        reporter: Reporter,
    ) -> None:
        self._pool = pool
        self._checkpoint = checkpoint
        self._family = family
        self._geometry = geometry
        self._first, self._end = layers
        self._reporter = reporter
        self._work = spec.work
        self._shares = range(len(spec.shares))
        self._states = HiddenStates(spec.work)
        self._journal = _read_journal(spec.work)

    def score_forward(self, method: str) -> dict[int, LayerScores]:
        """Score the units of the pruned layers by FLAP or activation; the base is not changed."""
        for layer in self._forward_layers(self._end):
            pruned = layer >= self._first
            statistics = self._run(layer, method if pruned else None, write=layer + 1 < self._end)
            if pruned:
                self._save_scores(layer, self._score_inputs(layer, method, statistics))
        return self._load_scores()

    def score_taylor(self, form: TaylorForm) -> dict[int, LayerScores]:
        """Score the units of the pruned layers by the Taylor criterion."""
        last = self._geometry.num_layers
        for layer in self._forward_layers(last, keep_from=self._first):
            self._run(layer, None, write=True)
        if "loss" not in self._journal:
            loss = sum(self._pool.run([("loss", (last, share)) for share in self._shares]))
            self._note(loss=loss, backward=last)
        for layer in range(self._journal["backward"] - 1, self._first - 1, -1):
            gradients = self._run_back(layer, form)
            if layer < self._end:
                self._save_scores(layer, self._score_gradients(layer, form, gradients))
            self._note(backward=layer)
            self._states.drop("gradient", layer + 1)
            self._states.drop("input", layer + 1)
            self._reporter.advance(1)
        return self._load_scores()

    def sparsify(
        self, method: str, ratios: dict[int, float], pattern: Pattern, damping: float
    ) -> dict[str, float]:
        """Prune weights layer by layer, with inputs from the pruned layers before.

        The pruned weights and masks are written to files, see `sparsified_file`.

        Args:
            method: Criterion that selects the weights.
            ratios: Share of weights to prune, by layer.
            pattern: Allowed positions of zeros.
            damping: Damping of SparseGPT's Hessian, as a share of its mean diagonal.

        Returns:
            SparseGPT's relative error by module path.
        """
        for layer in self._forward_layers(self._end):
            if layer < self._first:
                self._run(layer, None, write=True)
                continue
            path = sparsified_file(self._work, layer)
            if not path.exists():
                statistics = self._run(layer, method, write=False)
                self._sparsify_layer(layer, method, statistics, ratios[layer], pattern, damping)
            if layer + 1 < self._end:
                self._run(layer, None, write=True, solved=path)
        return dict(self._journal.get("errors", {}))

    def input_norms(self) -> dict[str, torch.Tensor]:
        """Return Wanda's squared input norms by module path, after `sparsify`."""
        found: dict[str, torch.Tensor] = {}
        for layer in range(self._first, self._end):
            path = self._work / "norms" / f"layer-{layer:05d}.safetensors"
            found |= load_file(path) if path.exists() else {}
        return found

    def _forward_layers(self, end: int, keep_from: int | None = None) -> Iterator[int]:
        """Yield the remaining layers; a layer is marked done when the next one is requested.

        Args:
            end: End of the layers, excluded.
            keep_from: First layer whose inputs are kept; None drops the inputs of every finished
                layer.
        """
        if "forward" not in self._journal:
            list(self._pool.run([("embed", (share,)) for share in self._shares]))
            self._note(forward=0)
        self._reporter.advance(self._journal["forward"])
        for layer in range(self._journal["forward"], end):
            yield layer
            self._note(forward=layer + 1)
            if keep_from is None or layer < keep_from:
                self._states.drop("input", layer)
            self._reporter.advance(1)

    def _run(
        self, layer: int, statistic: str | None, write: bool, solved: Path | None = None
    ) -> dict[str, Statistic]:
        """Run a layer over all shares; return the merged statistics by module path."""
        jobs = [("forward", (layer, share, statistic, solved, write)) for share in self._shares]
        merged: dict[str, Statistic] = {}
        aliases: dict[str, str] = {}
        for statistics, same_inputs in self._pool.run(jobs):
            aliases |= same_inputs
            for path, found in statistics.items():
                if path in merged:
                    merged[path].merge(found)
                else:
                    merged[path] = found
        return merged | {path: merged[other] for path, other in aliases.items()}

    def _run_back(self, layer: int, form: TaylorForm) -> Gradients:
        wanted = [e.module for e in self._linears(layer)] if layer < self._end else []
        squares = form is not TaylorForm.FIRST and layer < self._end
        jobs = [("backward", (layer, share, wanted, squares)) for share in self._shares]
        merged = Gradients({}, {})
        for found in self._pool.run(jobs):
            merged.merge(found)
        return merged

    def _linears(self, layer: int) -> Any:
        return layer_linears(self._family, self._geometry, layer)

    def _weight(self, module: str) -> torch.Tensor:
        return self._checkpoint.read(f"{module}.weight")

    def _score_inputs(
        self, layer: int, method: str, statistics: dict[str, Statistic]
    ) -> LayerScores:
        def per_index(entry: Any) -> torch.Tensor | None:
            inputs = statistics.get(entry.module)
            if entry.linear.axis == 0 or inputs is None:  # an output side, or an unused expert
                return None
            weight = partial(self._weight, entry.module)
            return SCORES[method](Evidence(weight, entry.linear.axis, inputs))

        return score_layer(self._linears(layer), self._geometry, per_index)

    def _score_gradients(self, layer: int, form: TaylorForm, gradients: Gradients) -> LayerScores:
        def per_index(entry: Any) -> torch.Tensor | None:
            gradient = gradients.total.get(entry.module)
            if gradient is None:
                return None
            squares = gradients.squares.get(entry.module)
            weight = partial(self._weight, entry.module)
            evidence = Evidence(weight, entry.linear.axis, None, gradient, squares, form)
            return SCORES["taylor"](evidence)

        return score_layer(self._linears(layer), self._geometry, per_index)

    def _sparsify_layer(
        self,
        layer: int,
        method: str,
        statistics: dict[str, Statistic],
        ratio: float,
        pattern: Pattern,
        damping: float,
    ) -> None:
        modules = [entry.module for entry in self._linears(layer)]
        shared = {id(s): self._pool.share(s) for s in statistics.values()}
        jobs = []
        for module in modules:
            found = statistics.get(module)
            inputs = None if found is None else shared[id(found)]
            jobs.append(("sparsify", (module, method, inputs, ratio, damping, pattern)))
        solved = dict(zip(modules, self._pool.run(jobs), strict=True))
        errors = dict(self._journal.get("errors", {}))
        errors |= {m: s.error for m, s in solved.items() if s.error is not None}
        norms = {m: s.total for m, s in statistics.items() if isinstance(s, SquaredNorms)}
        if norms:
            save_tensors(self._work / "norms" / f"layer-{layer:05d}.safetensors", norms)
        self._note(errors=errors)
        save_sparsified(self._work, layer, solved)

    def _save_scores(self, layer: int, scores: LayerScores) -> None:
        path = self._work / "scores" / f"layer-{layer:05d}.safetensors"
        save_tensors(path, scores)

    def _load_scores(self) -> dict[int, LayerScores]:
        folder = self._work / "scores"
        return {
            layer: LayerScores(load_file(folder / f"layer-{layer:05d}.safetensors"))
            for layer in range(self._first, self._end)
        }

    def _note(self, **changes: Any) -> None:
        self._journal |= changes
        write_json(self._work / _JOURNAL, self._journal)


def sparsified_file(work: Path, layer: int) -> Path:
    """Return the file of a layer's pruned weights and packed masks.

    Its tensors are named ``<module>.weight`` and ``<module>.mask``.
    """
    return work / "solved" / f"layer-{layer:05d}.safetensors"


def save_sparsified(work: Path, layer: int, solved: dict[str, Sparsified]) -> None:
    """Write a layer's pruned weights and packed masks by module path, see `sparsified_file`."""
    tensors = {}
    for module, linear in solved.items():
        tensors[f"{module}.weight"] = linear.weight
        tensors[f"{module}.mask"] = pack(linear.mask)
    save_tensors(sparsified_file(work, layer), tensors)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def share_out(samples: int, shares: int) -> tuple[tuple[int, int], ...]:
    """Split a calibration set into at most ``shares`` spans of nearly equal length."""
    count = min(samples, shares)
    edges = [samples * i // count for i in range(count + 1)]
    return tuple(zip(edges[:-1], edges[1:], strict=True))


def _read_journal(work: Path) -> dict[str, Any]:
    from loram_ray.utils.parsing.documents import read_as

    path = work / _JOURNAL
    if not path.exists():
        return {}
    return {**read_as(path, dict[str, int | float | dict[str, float]], constants=True)}
