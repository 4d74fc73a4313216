"""Worker of a calibration, which runs layers over its share of the calibration set.

Every method is idempotent: it reads files, writes files atomically, and returns its sums. A worker
that died can therefore be replaced and its call repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from loram_ray.architectures import architecture_of
from loram_ray.models.hidden_states import HiddenStates
from loram_ray.models.layer_stream import LayerStream
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.sparsify import Sparsified, sparsify_linear
from loram_ray.pruning.statistics import Hessian, Statistic, statistic_of
from loram_ray.runtime.memory import return_freed_memory

TOKENS_FILE = "tokens.safetensors"


@dataclass(frozen=True)
class CalibrationSpec:
    """Settings of a worker, passed once.

    Attributes:
        base: Directory of the base.
        model_type: Family of the base.
        work: Directory of hidden states, calibration tokens and pruned layers.
        precision: Precision of weights and activations, ``bf16`` or ``fp32``.
        batch_size: Number of sequences in one forward pass.
        shares: Sequences of each share of the calibration set, as ``(first, end)`` with ``end``
            excluded.
    """

    base: Path
    model_type: str
    work: Path
    precision: str
    batch_size: int
    shares: tuple[tuple[int, int], ...]

    def batches(self, share: int) -> list[tuple[int, int]]:
        """Return the batches of a share, as ``(first, end)`` with ``end`` excluded."""
        begin, end = self.shares[share]
        return [(b, min(b + self.batch_size, end)) for b in range(begin, end, self.batch_size)]


@dataclass
class Gradients:
    """Gradients of the mean loss with respect to the weights of a layer's coupled linears.

    Attributes:
        total: Gradients by module path, float32 ``[out, in]``. A share's gradients are summed over
            its tokens and divided by the number of tokens in the whole calibration set.
        squares: Squared gradients of each sample's mean loss, summed over samples and divided by
            the number of samples, float32 ``[out, in]``; empty if not requested.
    """

    total: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]

    def merge(self, other: Gradients) -> None:
        """Add the gradients of another share."""
        for mine, others in ((self.total, other.total), (self.squares, other.squares)):
            for name, tensor in others.items():
                mine[name] = mine[name] + tensor if name in mine else tensor


class CalibrationWorker:
    """Worker that runs layers of the base, see the module.

    Args:
        spec: Settings of the worker.
    """

    def __init__(self, spec: CalibrationSpec) -> None:
        self._spec = spec
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._states = HiddenStates(spec.work)
        self._held = ExitStack()
        self._holding: tuple[int, Path | None] | None = None
        self._layer: Any = None

    # Read on first use: the caller sees errors of a method, but not of an actor's __init__.
    @cached_property
    def _stream(self) -> LayerStream:
        spec = self._spec
        family = architecture_of(spec.model_type)
        return LayerStream(spec.base, family, spec.precision, self._device)

    @cached_property
    def _tokens(self) -> torch.Tensor:
        return load_file(self._spec.work / TOKENS_FILE)["token_ids"]

    def embed(self, share: int) -> None:
        """Write the first layer's inputs of a share."""
        self._let_go()
        spans = self._spec.batches(share)
        inputs = self._stream.embed(self._tokens[begin:end] for begin, end in spans)
        for (begin, _), hidden in zip(spans, inputs, strict=True):
            self._states.write("input", 0, begin, hidden)

    @torch.no_grad()
    def forward(
        self, layer: int, share: int, statistic: str | None, solved: Path | None, write: bool
    ) -> tuple[dict[str, Statistic], dict[str, str]]:
        """Run a layer over a share.

        Args:
            layer: Number of the layer.
            share: Number of the share.
            statistic: Criterion whose statistic of each coupled linear's inputs to collect, or
                None.
            solved: File of weights that replace the base's, or None.
            write: Whether to write the layer's outputs.

        Returns:
            Statistics by module path and, for linears that share their inputs with another, the
            path of that other; both are empty without a statistic.
        """
        module = self._hold(layer, solved)
        with self._watch(module, layer, statistic) as (statistics, same_inputs):
            for begin, _ in self._spec.batches(share):
                hidden = self._states.read("input", layer, begin).to(self._device)
                output = self._stream.run(layer, module, hidden)
                if write:
                    self._states.write("input", layer + 1, begin, output)
                del hidden, output
                return_freed_memory()
        for found in statistics.values():
            if isinstance(found, Hessian):  # summed on the layer's device, but read on the CPU
                found.total = found.total.cpu()
        return statistics, same_inputs

    def loss(self, layers: int, share: int) -> float:
        """Write the mean loss's gradients at the last layer's outputs; return the share's sum.

        The mean is over the predicted tokens of the whole calibration set.
        """
        self._let_go()
        total = 0.0
        count = self._tokens[:, 1:].numel()
        with self._stream.head():
            for begin, end in self._spec.batches(share):
                hidden = self._states.read("input", layers, begin).to(self._device)
                hidden.requires_grad_()
                loss = self._stream.loss(hidden, self._tokens[begin:end]) / count
                loss.backward()
                self._states.write("gradient", layers, begin, _gradient(hidden))
                total += loss.item()
        return total

    def backward(self, layer: int, share: int, wanted: list[str], squares: bool) -> Gradients:
        """Backpropagate from a layer's outputs to its inputs, and sum the gradients of its weights.

        Args:
            layer: Number of the layer.
            share: Number of the share.
            wanted: Module paths of the linears whose gradients to return; may be empty.
            squares: Whether to return squared per-sample gradients, too.
        """
        found = Gradients({}, {})
        module = self._hold(layer, None)
        linears = self._stream.linears(layer, module)
        weights = {path: linears[path].weight for path in wanted}
        for weight in weights.values():
            weight.requires_grad_()
        for begin, _ in self._spec.batches(share):
            hidden = self._states.read("input", layer, begin).to(self._device).requires_grad_()
            upstream = self._states.read("gradient", layer + 1, begin).to(self._device)
            rows = [slice(i, i + 1) for i in range(len(hidden))] if squares else [slice(None)]
            for part in rows:
                output = self._stream.run(layer, module, hidden[part])
                output.backward(upstream[part])
                self._take(weights, found, squares)
            self._states.write("gradient", layer, begin, _gradient(hidden))
            del hidden, upstream, output
            return_freed_memory()
        for weight in weights.values():
            weight.requires_grad_(False)
        return Gradients(_on_cpu(found.total), _on_cpu(found.squares))

    def sparsify(
        self,
        module: str,
        method: str,
        inputs: Statistic | None,
        ratio: float,
        damping: float,
        pattern: Pattern,
    ) -> Sparsified:
        """Prune the weights of one linear, see `sparsify_linear`."""
        weight = self._stream.read(f"{module}.weight").to(self._device)
        return sparsify_linear(weight, method, inputs, ratio, pattern, damping, module)

    def _hold(self, layer: int, solved: Path | None) -> nn.Module:
        """Return a loaded layer and keep it until another is requested, because shares reuse it."""
        if self._holding != (layer, solved):
            self._let_go()
            changed = load_file(solved) if solved else None
            self._layer = self._held.enter_context(self._stream.layer(layer, changed))
            self._holding = layer, solved
        return self._layer

    def _let_go(self) -> None:
        self._held.close()
        self._holding = self._layer = None
        return_freed_memory()

    @contextmanager
    def _watch(
        self, module: nn.Module, layer: int, statistic: str | None
    ) -> Iterator[tuple[dict[str, Statistic], dict[str, str]]]:
        """Collect a statistic of the inputs of a layer's linears inside the block.

        Linears that receive the same tensor (query, key and value) share one statistic.
        """
        statistics: dict[str, Statistic] = {}
        same_inputs: dict[str, str] = {}
        latest: dict[str, torch.Tensor] = {}

        def watcher(path: str, kind: Any) -> Callable[..., None]:
            def watch(_linear: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
                inputs = arguments[0]
                for other, seen in latest.items():
                    if seen is inputs and other != path:
                        same_inputs[path] = other
                        return
                latest[path] = inputs
                if path not in statistics:
                    statistics[path] = kind.empty(inputs.shape[-1])
                statistics[path].add(inputs)

            return watch

        linears = self._stream.linears(layer, module) if statistic is not None else {}
        handles = [
            linear.register_forward_pre_hook(watcher(path, statistic_of(statistic or "")))
            for path, linear in linears.items()
        ]
        try:
            yield statistics, same_inputs
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, weights: dict[str, torch.Tensor], found: Gradients, squares: bool) -> None:
        """Add the gradients that a backward pass left, and clear them."""
        samples = len(self._tokens)
        for path, weight in weights.items():
            if weight.grad is None:  # an expert that received no token
                continue
            gradient = weight.grad.float()
            weight.grad = None
            _accumulate(found.total, path, gradient)
            if squares:  # of the sample's mean loss, not divided by the number of samples
                _accumulate(found.squares, path, (gradient * samples).square_() / samples)


def _accumulate(into: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if name in into:
        into[name] += tensor
    else:
        into[name] = tensor


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    assert hidden.grad is not None
    return hidden.grad
