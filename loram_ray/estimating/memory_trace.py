"""Measure the peak memory of a training step by tracing it with fake tensors.

The model, PEFT's adapter, the loss and the backward pass are those of `train`. An NF4 linear
dequantises its weight on every use, as in bitsandbytes. AdamW is fused and allocates only its
moments.

Identical layers are not all traced. A step is traced with two layers of each run of identical
layers, then with three. The peak in such layers, or outside all of them, grows by the same amount
with every further layer.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import peft
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from loram_ray.architectures import Architecture
from loram_ray.config import TrainConfig
from loram_ray.estimating.optimizer_state import moments_bytes
from loram_ray.estimating.shapes import empty_model
from loram_ray.estimating.sizes import sizes_of
from loram_ray.finetuning.adapters import lora_config, save_memory, set_dtype
from loram_ray.losses import logits_of, output_head, sum_in_chunks
from loram_ray.models.loading import DTYPES
from loram_ray.models.quantisation import NF4

_KINDS = ("activations", "logits", "workspace")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a GPU at the peak of training.

    Attributes:
        weights: Weights of the frozen model.
        adapter: Weights of the LoRA adapter.
        optimiser: AdamW's two moments.
        gradients: Gradients of the adapter.
        activations: Activations saved for the backward pass, and temporaries.
        logits: Logits over the vocabulary, and their gradient.
        workspace: Weights dequantised from NF4.
    """

    weights: int
    adapter: int
    optimiser: int
    gradients: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(asdict(self).values())

    def for_adapters(self, adapters: int) -> int:
        """Return the bytes for training several adapters in one forward pass on one model copy.

        Logits exist for one adapter at a time; gradients are kept until their optimizer steps.
        """
        return self.total if adapters == 1 else self._shared + adapters * self._per_adapter

    def max_adapters(self, usable: float) -> int:
        """Return the maximum number of adapters that fit in one forward pass."""
        if self.total > usable:
            return 0
        return max(1, int((usable - self._shared) // max(self._per_adapter, 1)))

    @property
    def _shared(self) -> int:
        return self.weights + self.workspace + self.logits

    @property
    def _per_adapter(self) -> int:
        return self.total - self._shared + self.gradients


def training_memory(
    model_config: dict[str, Any],
    family: Architecture,
    train: TrainConfig,
    quantized: bool,
    every_layer: bool = False,
) -> TrainingMemory:
    """Trace one micro-batch of ``max_length`` labelled tokens with a padding mask.

    Args:
        model_config: ``config.json`` of the model to train on.
        family: Architecture of the base.
        train: Configuration of the stage; its paths are not read.
        quantized: Whether the model's linears are in NF4.
        every_layer: Trace all layers, even if many are identical.

    Raises:
        ValueError: If the model lacks a target module.
    """
    dtype = DTYPES[train.precision]
    model = empty_model(model_config, dtype=dtype)
    sizes = sizes_of(model)
    weights = sizes.nf4_loaded if quantized else dtype.itemsize * sizes.parameters
    tracker = _Tracker(model.config.vocab_size)
    if quantized:
        _quantize(model, tracker, dtype)
    with warnings.catch_warnings():  # PEFT uses a deprecated property of Transformers
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, lora_config(train.lora, family)).train()
    set_dtype(adapted, train.lora)
    save_memory(adapted, train)
    layers = _Layers(model, family, tracker)

    def step(counts: Sequence[int]) -> dict[int | None, Counter[str]]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16")
        with layers.only(counts), tracker.reset(), autocast:
            _step(model, train.micro_batch_size, train.max_length)
        return tracker.peaks

    with FakeTensorMode():
        _replace_with_fakes(adapted)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        counts = [len(run) for run in layers.runs]
        peaks = step(counts) if every_layer else _extrapolated(step, counts)
    at_peak = max(peaks.values(), key=Counter.total)
    adapter = sum(p.nbytes for p in trained)
    return TrainingMemory(
        weights=weights,
        adapter=adapter,
        optimiser=moments_bytes(trained, train.optimiser.name),
        gradients=adapter,
        **{kind: at_peak[kind] for kind in _KINDS},
    )


def without_nf4(memory: TrainingMemory, weights: int) -> TrainingMemory:
    """Return the memory of the same training on unquantised weights.

    The result is too low by at most the NF4 workspace, if the peak then falls elsewhere in the
    step.

    Args:
        memory: Memory of training in NF4.
        weights: Bytes of the unquantised weights.
    """
    return replace(memory, weights=weights, workspace=0)


def _replace_with_fakes(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def _step(model: PreTrainedModel, batch: int, length: int) -> None:
    """Run the forward and backward pass of `LoraTrainer`; the padding mask is applied."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = ids[:, 1:].reshape(-1)

    def loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_of(model, states), labels, reduction="sum")

    total, _ = sum_in_chunks(loss, (states, labels), len(labels), output_head(model))
    (total / len(labels)).backward()


def _extrapolated(
    step: Callable[[Sequence[int]], dict[int | None, Counter[str]]], counts: Sequence[int]
) -> dict[int | None, Counter[str]]:
    """Return the peaks for the given layer counts, extrapolated from two and three layers per run.

    One layer is not enough: the very first layer computes no gradient of its inputs.
    """
    few = [min(count, 2) for count in counts]
    longer = [run for run, count in enumerate(counts) if count > 2]
    if sum(few) + len(longer) * (sum(few) + 1) >= sum(counts):
        return step(counts)
    before = step(few)
    peaks = {phase: Counter(found) for phase, found in before.items()}
    for run in longer:
        after = step([*few[:run], 3, *few[run + 1 :]])
        for phase, found in before.items():
            for kind in _KINDS:
                peaks[phase][kind] += (counts[run] - 2) * (after[phase][kind] - found[kind])
    return peaks


class _Layers:
    """Decoder layers of a model; reports to the tracker which run of layers is active.

    Args:
        model: Model with its adapter.
        family: Architecture of the model.
        tracker: Tracker to report to.

    Attributes:
        runs: Indices of consecutive identical layers.
    """

    def __init__(self, model: PreTrainedModel, family: Architecture, tracker: _Tracker) -> None:
        path, _, self._name = family.layers.rpartition(".")
        self._parent, self._config = model.get_submodule(path), model.config
        self._all = list(model.get_submodule(family.layers).children())
        kinds: Sequence[str] = getattr(model.config, "layer_types", None) or [""] * len(self._all)
        self._kinds = list(kinds)
        alike = [
            (kind, type(layer), [(n, p.shape, p.dtype) for n, p in layer.named_parameters()])
            for kind, layer in zip(kinds, self._all, strict=True)
        ]
        indices = range(len(self._all))
        self.runs = [list(run) for _, run in groupby(indices, key=lambda index: alike[index])]
        for number, run in enumerate(self.runs):
            for index in run:
                _report_phase(self._all[index], tracker, number)

    @contextmanager
    def only(self, counts: Sequence[int]) -> Iterator[None]:
        """Keep only the given number of layers of each run inside the context."""
        kept = [
            index for run, count in zip(self.runs, counts, strict=True) for index in run[:count]
        ]
        self._set(kept)
        try:
            yield
        finally:
            self._set(range(len(self._all)))

    def _set(self, kept: Sequence[int]) -> None:
        setattr(self._parent, self._name, nn.ModuleList(self._all[index] for index in kept))
        self._config.num_hidden_layers = len(kept)
        if any(self._kinds):
            self._config.layer_types = [self._kinds[index] for index in kept]


def _report_phase(layer: nn.Module, tracker: _Tracker, run: int) -> None:
    """Register hooks that report the start and end of a layer and of its backward pass."""

    def inside(*_: Any) -> None:
        tracker.phase = run

    def ended(_: nn.Module, __: Any, output: Any) -> None:
        tracker.phase = None
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(inside)

    layer.register_forward_pre_hook(inside)
    layer.register_forward_hook(ended)


class _Tracker(TorchDispatchMode):
    """Track the storages that operations allocate.

    Attributes:
        phase: Index of the active run of layers; None outside of them.
        peaks: Bytes of each kind at the peak of each phase.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._kind: str | None = None
        self._step = 0
        self.reset()

    def reset(self) -> _Tracker:
        """Reset all counts."""
        self._step += 1
        self._now: Counter[str] = Counter()
        self._alive: set[int] = set()
        self.phase: int | None = None
        self.peaks: dict[int | None, Counter[str]] = {}
        return self

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """Count allocations inside the context as this kind."""
        self._kind = kind
        try:
            yield
        finally:
            self._kind = None

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        known = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves(arguments)
            if isinstance(leaf, torch.Tensor)
        }
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        over_words = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        kind = self._kind or ("logits" if over_words else "activations")
        self._alive.add(key)
        self._now[kind] += size
        weakref.finalize(storage, self._drop, self._step, key, kind, size)
        peak = self.peaks.get(self.phase)
        if peak is None or self._now.total() > peak.total():
            self.peaks[self.phase] = Counter(self._now)

    def _drop(self, step: int, key: int, kind: str, size: int) -> None:
        if step == self._step:
            self._alive.discard(key)
            self._now[kind] -= size


class _Nf4Linear(nn.Linear):
    """Linear layer that allocates its weight on use, recorded by ``tracker``.

    It computes in ``compute_dtype`` and returns the dtype of its input (bitsandbytes:
    ``Linear4bit``).
    """

    tracker: _Tracker
    compute_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Product.apply(x.to(self.compute_dtype), self)
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        return found.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: _Nf4Linear) -> torch.Tensor:
        ctx.linear = linear
        return x @ _whole(linear).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ _whole(ctx.linear), None


def _whole(linear: _Nf4Linear) -> torch.Tensor:
    """Allocate a dequantised weight; the float32 scales are freed afterwards."""
    shape = linear.out_features, linear.in_features
    with linear.tracker.counting_as("workspace"):
        scales = torch.empty(shape[0] * shape[1] // NF4.block)
        weight = torch.empty(shape, dtype=linear.compute_dtype)
        del scales
    return weight


def _quantize(model: PreTrainedModel, tracker: _Tracker, dtype: torch.dtype) -> None:
    from loram_ray.models.nf4 import linears_of

    for name in linears_of(model):
        linear = model.get_submodule(name)
        linear.__class__ = _Nf4Linear
        linear.tracker = tracker  # type: ignore[assignment]
        linear.compute_dtype = dtype  # type: ignore[assignment]
