"""Losses of several adapters in one pass: ``h = x W + s_k * drop(x) A_k^T B_k^T``.

The adapters' sequences are packed into rows without their padding, and the frozen weights are
applied once to all of them. To each linear's output, each adapter adds its update on its own
tokens. The losses share no trainable parameter, so the gradient of their sum contains the gradient
of each. Each loss equals the one that the adapter has alone, up to rounding in products of other
shapes. Dropout draws from each adapter's own random numbers.
"""

from __future__ import annotations

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
from loram_ray.finetuning.packing import Inputs, laid_out
from loram_ray.losses import summed_loss_of_states
from loram_ray.runtime.progress import say

Loss = tuple[torch.Tensor, torch.Tensor]
"""The summed loss and the number of labels."""

_ADAPTER = "default"


class RngState:
    """State of torch's random number generators for one training, on the CPU and the GPU."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put(self) -> None:
        """Restore this state in the current process."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


@dataclass(frozen=True)
class Adapted:
    """An adapter on its shell of the model.

    Attributes:
        model: Shell of the model.
        layers: Layers of the adapter, by module name.
        joins: Whether all adapted modules are plain linears and none is compiled.
        checkpoints: Whether activations are recomputed in the backward pass.
    """

    model: PreTrainedModel
    layers: Mapping[str, Any]
    joins: bool
    checkpoints: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Adapted:
        """Describe the adapter on a shell."""
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
    """An adapter that needs the loss of a batch.

    Attributes:
        adapted: The adapter on its shell.
        inputs: Inputs of `losses.summed_loss`.
        rng_state: Random state for dropout, advanced by each draw.
    """

    adapted: Adapted
    inputs: Inputs
    rng_state: RngState

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Return a context in which random numbers are drawn from this member's state."""
        self.rng_state.put()
        try:
            yield
        finally:
            self.rng_state = RngState()


@dataclass(frozen=True)
class _Part:
    """A member's tokens in a pass.

    Attributes:
        member: Member that the tokens belong to.
        places: Place of each token of the member's batch in the pass, counted through all rows,
            int64 ``[rows, seq]``. Padding has the place of another token.
        seen: Whether each token is not padding, bool ``[rows, seq]``.
    """

    member: Member
    places: torch.Tensor
    seen: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the member's part of a tensor of the pass, ``[rows, seq, n]``, as in its batch."""
        return x.flatten(0, 1)[self.places]


class SharedForward:
    """Module tree in which all rows pass through the frozen weights together.

    Args:
        frozen: The loaded model.
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
        self._owners = torch.empty(0)
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}
        self._checkpointing = False
        self._most = sys.maxsize  # maximum number of tokens in a pass

    def losses(self, members: Sequence[Member]) -> list[Loss | Exception]:
        """Return each member's summed loss, or the exception that its computation raised.

        The losses already have their gradients, which their backward passes return. Members run one
        after another if their adapters are on modules other than linears, if they are compiled, or
        if the model draws random numbers itself.
        """
        found: dict[int, Loss | Exception] = {}
        joining = [n for n, member in enumerate(members) if self._joins and member.adapted.joins]
        tokens = [_tokens(member.inputs) for member in members]
        for joined in _within(joining, tokens, self._most):
            if len(joined) == 1:
                continue
            before = [members[n].rng_state for n in joined]
            try:
                found.update(zip(joined, self._together([members[n] for n in joined]), strict=True))
            except Exception as error:  # it is unknown whose error this is
                _put_back([members[n] for n in joined], before)
                if _is_memory(error):
                    self._most = sum(tokens[n] for n in joined) // 2
                    say(
                        "train",
                        f"out of memory: continuing with at most {self._most:,} tokens per pass",
                    )
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
        batch, parts = laid_out([member.inputs for member in members])
        self._parts = [_Part(m, *part) for m, part in zip(members, parts, strict=True)]
        found = []
        with self._with_adapters(batch), self._frozen.computing():
            hidden = self._model.get_decoder()(**batch, use_cache=False)[0]
            for part in self._parts:
                model, labels = part.member.adapted.model, part.member.inputs["labels"]
                with part.member.drawing():  # the head may have an adapter too
                    found.append(summed_loss_of_states(model, part.of(hidden), labels))
            return _with_gradients(found, members, finite=True)

    @contextmanager
    def _with_adapters(self, batch: Inputs) -> Iterator[None]:
        """Return a context in which the linears add each member's adapter."""
        owners = torch.full_like(batch["input_ids"], -1).flatten()
        for number, part in enumerate(self._parts):
            owners[part.places[part.seen]] = number
        self._owners = owners
        names = {name for part in self._parts for name in part.member.adapted.layers}
        hooks = [
            self._modules[name].register_forward_hook(functools.partial(self._add, name))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._parts, self._columns = [], {}

    def _add(
        self, name: str, _: nn.Module, given: tuple[torch.Tensor], made: torch.Tensor
    ) -> torch.Tensor:
        """Return a linear's output, ``[rows, seq, out]``, with the adapters' updates added."""
        x = given[0]
        adapted = [
            (number, layer)
            for number, part in enumerate(self._parts)
            if (layer := part.member.adapted.layers.get(name)) is not None
        ]
        by_kind: dict[torch.dtype | None, list[tuple[int, Any]]] = {}
        for number, layer in adapted:
            masked = isinstance(layer, MaskedLoraLinear)
            kind = None if masked else layer.lora_A[_ADAPTER].weight.dtype
            by_kind.setdefault(kind, []).append((number, layer))
        for kind, some in by_kind.items():
            if kind is None:
                made = self._with_masked(some, x, made)
            else:
                left = self._dropped(some, x)
                if not torch.is_autocast_enabled(x.device.type):
                    left = left.to(kind)
                made = made + _added_by_all(some, left, self._own(some)).to(made.dtype)
        return made

    def _own(self, layers: Sequence[tuple[int, Any]]) -> torch.Tensor:
        """Return which ranks belong to each token's member, bool ``[tokens, sum of the ranks]``."""
        numbers = tuple(
            number for number, layer in layers for _ in range(layer.lora_A[_ADAPTER].out_features)
        )
        if numbers not in self._columns:
            of_whom = torch.tensor(numbers, device=self._owners.device)
            self._columns[numbers] = self._owners[:, None] == of_whom
        return self._columns[numbers]

    def _dropped(self, layers: Sequence[tuple[int, Any]], x: torch.Tensor) -> torch.Tensor:
        """Return the input after each adapter's dropout on its own tokens, ``[rows, seq, in]``."""
        places, left = [], []
        for number, layer in layers:
            if isinstance(layer.lora_dropout[_ADAPTER], nn.Dropout):
                part = self._parts[number]
                with part.member.drawing():
                    left.append(layer.lora_dropout[_ADAPTER](part.of(x))[part.seen])
                places.append(part.places[part.seen])
        if not left:
            return x
        return x.flatten(0, 1).index_copy(0, torch.cat(places), torch.cat(left)).view_as(x)

    def _with_masked(
        self, layers: Sequence[tuple[int, Any]], x: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:
        """Return a linear's output with the updates of masked adapters added one after another."""
        places, added = [], []
        for number, layer in layers:
            part = self._parts[number]
            with part.member.drawing():
                product = _masked_product(layer, part.of(x))
            places.append(part.places[part.seen])
            added.append(product[part.seen].to(made.dtype))
        flat = made.flatten(0, 1).index_add(0, torch.cat(places), torch.cat(added))
        return flat.view_as(made)

    def _checkpoint(self, wanted: bool) -> None:
        """Enable or disable activation checkpointing, which replays the random numbers."""
        if wanted and not self._checkpointing:
            self._model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": self._drawn_again}
            )
        elif self._checkpointing and not wanted:
            self._model.activation_checkpointing_disable()
        self._checkpointing = wanted

    def _drawn_again(self) -> tuple[Any, Any]:
        members = [part.member for part in self._parts]
        before: list[RngState] = []

        @contextmanager
        def first() -> Iterator[None]:
            before.extend(member.rng_state for member in members)
            yield

        @contextmanager
        def again() -> Iterator[None]:
            now = [member.rng_state for member in members]
            _put_back(members, before)
            try:
                yield
            finally:
                _put_back(members, now)

        return first(), again()


def _within(numbers: Sequence[int], tokens: Sequence[int], most: int) -> list[list[int]]:
    """Group batches up to a maximum number of tokens; a larger batch forms its own group."""
    groups: list[list[int]] = []
    room = 0
    for number in numbers:
        if tokens[number] > room:
            groups.append([])
            room = most
        groups[-1].append(number)
        room -= tokens[number]
    return groups


def _tokens(batch: Inputs) -> int:
    """Return the number of tokens in a batch, without padding."""
    return int(
        batch["attention_mask"].sum() if "attention_mask" in batch else batch["labels"].numel()
    )


def _is_memory(error: Exception) -> bool:
    """Return whether an error means that CPU or GPU memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _put_back(members: Sequence[Member], draws: Sequence[RngState]) -> None:
    for member, state in zip(members, draws, strict=True):
        member.rng_state = state


def _masked_product(layer: MaskedLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """Return a masked layer's update to the output, ``[..., out]`` from ``[..., in]``."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return layer.masked_product(layer.lora_dropout[_ADAPTER](x), _ADAPTER)


def _added_by_all(
    layers: Sequence[tuple[int, Any]], x: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Return the updates of several adapters, each on its own tokens, using two products in total.

    The ranks of all adapters are concatenated. For each token, the ranks of other adapters are set
    to zero between the two products and get no gradient.

    Args:
        layers: PEFT layers with the indices of their members.
        x: Input, ``[rows, seq, in]``, in the adapters' dtype unless autocast is enabled.
        own: Which ranks belong to each token's member, bool ``[rows * seq, sum of the ranks]``.

    Returns:
        The update, ``[rows, seq, out]``.
    """
    down = torch.cat([layer.lora_A[_ADAPTER].weight for _, layer in layers])
    up = torch.cat(
        [layer.lora_B[_ADAPTER].weight * layer.scaling[_ADAPTER] for _, layer in layers], dim=1
    )
    low = functional.linear(x.flatten(0, 1), down)
    low = torch.where(own, low, torch.zeros((), dtype=low.dtype, device=low.device))
    return functional.linear(low, up).view(*x.shape[:-1], -1)


def _with_gradients(
    found: Sequence[Loss], members: Sequence[Member], finite: bool = False
) -> list[Loss]:
    """Compute the gradients of all losses, and return losses whose backward passes return them.

    Raises:
        ArithmeticError: ``finite`` is True and a loss or a gradient is not finite. The cause may be
            another member in the same row, as zero times infinity is NaN.
    """
    trained = [[p for p in m.adapted.model.parameters() if p.requires_grad] for m in members]
    every = [parameter for parameters in trained for parameter in parameters]
    whole = torch.stack([total for total, _ in found]).sum()
    computed = torch.autograd.grad(whole, every, allow_unused=True)
    if finite:
        sizes = torch._foreach_norm([gradient for gradient in computed if gradient is not None])
        if (
            not torch.stack([whole.detach(), *(size.to(whole.dtype) for size in sizes)])
            .isfinite()
            .all()
        ):
            raise ArithmeticError("a loss or a gradient is not finite")
    gradients = iter(computed)
    ready = []
    for (total, count), parameters in zip(found, trained, strict=True):
        of_these = [next(gradients) for _ in parameters]
        ready.append((_HandOut.apply(total.detach(), of_these, *parameters), count))
    return ready


class _HandOut(torch.autograd.Function):
    """Loss whose backward pass returns gradients that are already computed."""

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
