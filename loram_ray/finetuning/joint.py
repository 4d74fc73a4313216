"""Losses of several adapters on one model in one pass: ``h = x W + s_k * drop(x) A_k^T B_k^T``.

The adapters' batches are put below each other and the frozen weights work once on all rows; to each
linear's output each adapter's rows get what that adapter adds. The losses have no parameter in
common, so the gradient of their sum is that of each, and each is the loss that its adapter has
alone, up to the rounding of products of another height. Dropout draws from each adapter's own
random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from loram_ray.finetuning.frozen import FrozenModel, shell_of
from loram_ray.finetuning.masked import MaskedLoraLinear
from loram_ray.losses import summed_loss_of_states
from loram_ray.progress import say

Inputs = dict[str, torch.Tensor]
Loss = tuple[torch.Tensor, torch.Tensor]
"""The summed loss, and the number of labels."""

_ADAPTER = "default"
_LEAST_WIDTH = 0.75
"""Of the widest batch of a pass: a narrower one is more filling than a pass of its own costs."""


class Draws:
    """The state of torch's random numbers of one training, on the CPU and on the GPU."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put(self) -> None:
        """Make it this process's."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


@dataclass(frozen=True)
class Adapted:
    """An adapter on its shell of the model.

    Attributes:
        model: the shell.
        layers: of the adapter, by the names of the modules that they are put on.
        joins: whether they are linears alone, and none is compiled.
        checkpoints: whether activations are to be worked out again.
    """

    model: PreTrainedModel
    layers: Mapping[str, Any]
    joins: bool
    checkpoints: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Adapted:
        """Look at a shell."""
        modules = dict(model.named_modules())
        layers = {n: module for n, module in modules.items() if isinstance(module, BaseTunerLayer)}
        compiled = any(module._compiled_call_impl is not None for module in modules.values())
        joins = not compiled and all(map(_is_plain, layers.values()))
        return cls(model, layers, joins, model.is_activation_checkpointing)


def _is_plain(layer: Any) -> bool:
    return (
        isinstance(layer, lora.LoraLayer)
        and isinstance(layer.get_base_layer(), nn.Linear)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


@dataclass
class Member:
    """An adapter that wants the loss of a batch.

    Attributes:
        adapted: the adapter.
        inputs: of `losses.summed_loss`.
        draws: what its dropout draws from; moved on by what it draws.
    """

    adapted: Adapted
    inputs: Inputs
    draws: Draws

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw this member's random numbers inside the block."""
        self.draws.put()
        try:
            yield
        finally:
            self.draws = Draws()


@dataclass(frozen=True)
class _Part:
    """A member's rows of the batch of all."""

    member: Member
    rows: slice

    def of(self, x: torch.Tensor) -> torch.Tensor:
        width = self.member.inputs["input_ids"].shape[1]
        return x[self.rows, :width].contiguous()  # dropout draws as it would alone


class JointForward:
    """The module tree in which all rows go through the frozen weights together.

    Args:
        frozen: the model.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen
        self._model = shell_of(frozen.model).train()
        self._modules = dict(self._model.named_modules())
        draws = any(
            getattr(module, "attention_dropout", 0) or getattr(module, "p", 0)
            for module in self._modules.values()
        )
        self._joins = not draws and frozen.kind[1] != "flash_attention_2"
        self._parts: list[_Part] = []
        self._checkpointing = False
        self._most = sys.maxsize  # places of a pass

    def losses(self, members: Sequence[Member]) -> list[Loss | Exception]:
        """Each member's summed loss, or what it raised: no member has what is another's.

        The losses have their gradients already: their backward passes only hand them out. Adapters
        on more than linears, compiled ones, and models that draw random numbers of their own take
        turns instead.
        """
        found: dict[int, Loss | Exception] = {}
        joining = [n for n, member in enumerate(members) if self._joins and member.adapted.joins]
        shapes = [member.inputs["input_ids"].shape for member in members]
        for joined in _alike(joining, shapes, self._most):
            if len(joined) == 1:
                continue
            before = [members[n].draws for n in joined]
            try:
                found.update(zip(joined, self._together([members[n] for n in joined]), strict=True))
            except Exception as error:  # of whom is not known
                _put_back([members[n] for n in joined], before)
                if _is_memory(error):
                    self._most = _places(joined, shapes) // 2
                    say("train", f"memory is short: at most {self._most:,} tokens in a pass now")
                if self._frozen.device == "cuda":
                    torch.cuda.empty_cache()
        for number, member in enumerate(members):
            if number not in found:
                try:
                    found[number] = self._alone(member)
                except Exception as error:
                    found[number] = error
        return [found[number] for number in range(len(members))]

    def _alone(self, member: Member) -> Loss:
        with member.drawing():
            found = self._frozen.summed_loss(member.adapted.model, member.inputs)
            return _with_gradients([found], [member])[0]

    def _together(self, members: Sequence[Member]) -> list[Loss]:
        self._checkpoint(any(member.adapted.checkpoints for member in members))
        found = []
        with self._with_adapters(members), self._frozen.computing():
            batch = below_each_other([member.inputs for member in members])
            hidden = self._model.get_decoder()(**batch, use_cache=False)[0]
            for part in self._parts:
                model, labels = part.member.adapted.model, part.member.inputs["labels"]
                with part.member.drawing():  # the head may have an adapter, too
                    found.append(summed_loss_of_states(model, part.of(hidden), labels))
            return _with_gradients(found, members)

    @contextmanager
    def _with_adapters(self, members: Sequence[Member]) -> Iterator[None]:
        """Have the linears add what each member's adapter adds, inside the block."""
        begin = 0
        for member in members:
            end = begin + len(member.inputs["input_ids"])
            self._parts.append(_Part(member, slice(begin, end)))
            begin = end
        names = {name for member in members for name in member.adapted.layers}
        hooks = [
            self._modules[name].register_forward_hook(functools.partial(self._add, name))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._parts = []

    def _add(
        self, name: str, _: nn.Module, given: tuple[torch.Tensor], made: torch.Tensor
    ) -> torch.Tensor:
        """A linear's output ``[rows, seq, out]`` with what each part's adapter adds to it."""
        layers = [part.member.adapted.layers.get(name) for part in self._parts]
        if _stacks(layers):
            x = self._dropped(layers, given[0])
            return made + _added_by_all(layers, x, self._parts).to(made.dtype)
        pieces = []
        for part, layer in zip(self._parts, layers, strict=True):
            rows = made[part.rows]
            if layer is None:
                pieces.append(torch.zeros_like(rows))
                continue
            with part.member.drawing() if _drops(layer) else contextlib.nullcontext():
                added = _added(layer, part.of(given[0])).to(made.dtype)
            pieces.append(functional.pad(added, (0, 0, 0, rows.shape[1] - added.shape[1])))
        return made + torch.cat(pieces)

    def _dropped(self, layers: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
        """What each part's adapter leaves of its rows, ``[rows, seq, in]``."""
        if not any(layer is not None and _drops(layer) for layer in layers):
            return x
        pieces = []
        for part, layer in zip(self._parts, layers, strict=True):
            rows = x[part.rows]
            if layer is not None and _drops(layer):
                with part.member.drawing():
                    left = layer.lora_dropout[_ADAPTER](part.of(x))
                rows = functional.pad(left, (0, 0, 0, rows.shape[1] - left.shape[1]))
            pieces.append(rows)
        return torch.cat(pieces)

    def _checkpoint(self, wanted: bool) -> None:
        """Have activations worked out again in the backward pass, with the numbers drawn before."""
        if wanted and not self._checkpointing:
            self._model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._drawn_again}
            )
        elif self._checkpointing and not wanted:
            self._model.activation_checkpointing_disable()
        self._checkpointing = wanted

    def _drawn_again(self) -> tuple[Any, Any]:
        members = [part.member for part in self._parts]
        before: list[Draws] = []

        @contextmanager
        def first() -> Iterator[None]:
            before.extend(member.draws for member in members)
            yield

        @contextmanager
        def again() -> Iterator[None]:
            now = [member.draws for member in members]
            _put_back(members, before)
            try:
                yield
            finally:
                _put_back(members, now)

        return first(), again()


def _alike(numbers: Sequence[int], shapes: Sequence[torch.Size], most: int) -> list[list[int]]:
    """Groups of batches of nearly one width, so that little of a pass is filling.

    Args:
        numbers: of the batches to group.
        shapes: of all batches, ``[rows, seq]``.
        most: places of a group, unless it is of one.
    """
    groups: list[list[int]] = []
    for number in sorted(numbers, key=lambda number: -shapes[number][1]):
        if groups and shapes[number][1] >= _LEAST_WIDTH * shapes[groups[-1][0]][1]:
            larger = [*groups[-1], number]
            if _places(larger, shapes) <= most:
                groups[-1] = larger
                continue
        groups.append([number])
    return [sorted(group) for group in groups]


def _places(group: Sequence[int], shapes: Sequence[torch.Size]) -> int:
    """Tokens and filling of a pass."""
    rows = sum(shapes[number][0] for number in group)
    return rows * max(shapes[number][1] for number in group)


def _is_memory(error: Exception) -> bool:
    """Whether there was too little memory, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _put_back(members: Sequence[Member], draws: Sequence[Draws]) -> None:
    for member, state in zip(members, draws, strict=True):
        member.draws = state


def _drops(layer: Any) -> bool:
    return isinstance(layer.lora_dropout[_ADAPTER], nn.Dropout)


def _stacks(layers: Sequence[Any]) -> bool:
    """Whether adapters on a linear can be put behind each other; None is one that is not there."""
    found = [layer for layer in layers if layer is not None]
    kinds = {layer.lora_A[_ADAPTER].weight.dtype for layer in found}
    return len(kinds) == 1 and not any(isinstance(layer, MaskedLoraLinear) for layer in found)


def _added_by_all(layers: Sequence[Any], x: torch.Tensor, parts: Sequence[_Part]) -> torch.Tensor:
    """What adapters add to a linear's output, each to its rows: two products for all of them.

    Args:
        layers: PEFT's, one for each part; None adds nothing.
        x: ``[rows, seq, in]``.
        parts: whose rows they are.

    Returns:
        ``[rows, seq, out]``. Adapters of lower ranks are filled with zeros.
    """
    found = [layer for layer in layers if layer is not None]
    rank = max(layer.lora_A[_ADAPTER].out_features for layer in found)
    first = found[0].lora_A[_ADAPTER].weight
    nothing = (
        first.new_zeros(rank, first.shape[1]),
        first.new_zeros(found[0].lora_B[_ADAPTER].out_features, rank),
    )
    down, up = [], []
    for layer in layers:
        if layer is None:
            down.append(nothing[0])
            up.append(nothing[1])
            continue
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        down.append(functional.pad(a, (0, 0, 0, rank - len(a))))
        up.append(functional.pad(b, (0, rank - len(a))) * layer.scaling[_ADAPTER])
    counts = [part.rows.stop - part.rows.start for part in parts]
    if len(set(counts)) > 1:  # a pair of matrices for each row, and not for each part
        down = [matrix for matrix, count in zip(down, counts, strict=True) for _ in range(count)]
        up = [matrix for matrix, count in zip(up, counts, strict=True) for _ in range(count)]
    low = x.to(first.dtype).reshape(len(down), -1, x.shape[-1])
    product = torch.bmm(torch.bmm(low, torch.stack(down).mT), torch.stack(up).mT)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _added(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What PEFT's layer adds to the frozen linear's output, ``[..., in]`` to ``[..., out]``."""
    dropout = layer.lora_dropout[_ADAPTER]
    if isinstance(layer, MaskedLoraLinear):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return layer.masked_product(dropout(x), _ADAPTER)
    a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    x = layer._cast_input_dtype(x, a.weight.dtype)
    product: torch.Tensor = b(a(dropout(x))) * layer.scaling[_ADAPTER]
    return product


def below_each_other(batches: Sequence[Inputs]) -> Inputs:
    """Put batches into one, as wide as the widest.

    Args:
        batches: ``input_ids`` and either ``attention_mask`` or ``positions``, int64
            ``[batch, seq]`` of one batch each, as `corpus.batches` makes them.

    Returns:
        ``input_ids`` and ``attention_mask``, or ``position_ids`` if any batch has positions, int64
        ``[sum of batches, longest seq]``. Filled places are masked or sequences of their own.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return functional.pad(tensor, (0, length - tensor.shape[1]))

    ids = torch.cat([wide(batch["input_ids"]) for batch in batches])
    if all("attention_mask" in batch for batch in batches):
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([wide(batch["attention_mask"]) for batch in batches]),
        }
    positions = torch.cat([_positions(batch, length) for batch in batches])
    return {"input_ids": ids, "position_ids": positions}


def _positions(batch: Inputs, length: int) -> torch.Tensor:
    """Positions that begin anew where filling begins, ``[batch, length]``."""
    ids = batch["input_ids"]
    places = torch.arange(length, device=ids.device).expand(len(ids), length)
    if "positions" in batch:
        width = ids.shape[1]
        return torch.cat([batch["positions"], places[:, width:] - width], dim=1)
    whole = batch["attention_mask"].sum(dim=1, keepdim=True)
    return torch.where(places < whole, places, places - whole)


def _with_gradients(found: Sequence[Loss], members: Sequence[Member]) -> list[Loss]:
    """Losses that have their gradients before they are asked for."""
    trained = [[p for p in m.adapted.model.parameters() if p.requires_grad] for m in members]
    every = [parameter for parameters in trained for parameter in parameters]
    whole = torch.stack([total for total, _ in found]).sum()
    gradients = iter(torch.autograd.grad(whole, every, allow_unused=True))
    ready = []
    for (total, count), parameters in zip(found, trained, strict=True):
        of_these = [next(gradients) for _ in parameters]
        ready.append((_HandOut.apply(total.detach(), of_these, *parameters), count))
    return ready


class _HandOut(torch.autograd.Function):
    """A loss whose backward pass hands out gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        gradients: Sequence[torch.Tensor | None],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [None if ready is None else ready * gradient for ready in ctx.gradients]
        return None, None, *found
