"""Parity of a merged model with its base plus adapter.

Both run on a few tokens in float32, with one decoder layer in memory at a time. This compares the
stored weights, independently of the hardware's arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loram_ray.architectures import Architecture
from loram_ray.models.layer_stream import LayerStream
from loram_ray.recovery.deltas import Change

_SEQUENCES, _TOKENS = 2, 32
_ROUNDINGS = 32
"""Accepted float32 error between two ways of computing logits, in epsilons times their RMS."""


@dataclass(frozen=True)
class Parity:
    """Distance between two models' logits.

    Attributes:
        effect: Root mean square of the adapter's change of the base's logits.
        error: Root mean square difference between the logits of the merged model and those of the
            base with its adapter.
        kl: Mean Kullback-Leibler divergence of the merged model's next-token distribution from that
            of the base with its adapter, in nats.
        agreement: Share of positions with the same most likely token.
        modules: Number of changed linears that were run; if some were not, the other values are
            meaningless.
        scale: Root mean square of the base's logits.
    """

    effect: float
    error: float
    kl: float
    agreement: float
    modules: int
    scale: float

    @property
    def is_float_error(self) -> bool:
        """Whether float32 rounding of the logits explains the error."""
        return self.error <= _ROUNDINGS * torch.finfo(torch.float32).eps * self.scale

    @property
    def relative_error(self) -> float:
        """Error as a share of the effect; a model without the merge would have 1."""
        return self.error / self.effect if self.effect else float(self.error > 0)


@torch.no_grad()
def parity_of(
    base: Path, change: Change, merged: Path, family: Architecture, device: str
) -> Parity:
    """Compare a merged model with its base and the unmerged change.

    Args:
        base: Directory of the base.
        change: The merged change.
        merged: Directory of the merged model.
        family: Family of both models.
        device: Device on which layers run.
    """
    with (
        closing(LayerStream(base, family, "fp32", device)) as first,
        closing(LayerStream(merged, family, "fp32", device)) as second,
    ):
        ids = torch.randint(
            first.vocabulary, (_SEQUENCES, _TOKENS), generator=torch.Generator().manual_seed(0)
        )
        [plain] = first.embed([ids])
        [after] = second.embed([ids])
        beside = plain
        seen = 0
        for index in range(first.num_layers):
            with first.layer(index) as layer:
                plain = first.run(index, layer, plain)
                with _beside(change, first.all_linears(index, layer)) as count:
                    beside = first.run(index, layer, beside)
                seen += count
            with second.layer(index) as layer:
                after = second.run(index, layer, after)
        with first.head(), second.head():
            of_base = first.logits(plain.flatten(0, 1))
            with _beside(change, {family.output_head: first.output_head}) as count:
                of_both = first.logits(beside.flatten(0, 1))
            seen += count
            of_merged = second.logits(after.flatten(0, 1))
    return _measured(of_base, of_both, of_merged, seen)


@contextmanager
def _beside(change: Change, linears: dict[str, nn.Linear]) -> Iterator[int]:
    """Add the change to the outputs of the linears inside the block; yield the number changed."""

    def add(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        return output + change.applied(inputs[0], name)

    changed = [name for name in linears if name in change.modules]
    with ExitStack() as stack:
        for name in changed:
            stack.callback(linears[name].register_forward_hook(partial(add, name)).remove)
        yield len(changed)


def _measured(
    of_base: torch.Tensor, of_both: torch.Tensor, of_merged: torch.Tensor, modules: int
) -> Parity:
    expected, found = (logits.log_softmax(-1) for logits in (of_both, of_merged))
    return Parity(
        effect=float((of_both - of_base).square().mean().sqrt()),
        error=float((of_merged - of_both).square().mean().sqrt()),
        kl=float((expected.exp() * (expected - found)).sum(-1).mean()),
        agreement=float((of_both.argmax(-1) == of_merged.argmax(-1)).float().mean()),
        modules=modules,
        scale=float(of_base.square().mean().sqrt()),
    )
