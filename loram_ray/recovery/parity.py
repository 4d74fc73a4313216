"""Whether a merged model does what its base does with the adapter beside it.

Both are run on a few tokens, one decoder layer in memory at a time, in float32: what is compared is
the stored weights, not how some hardware multiplies them.
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
"""Float32 roundings, of logits of average size, that two ways of computing logits may differ by."""


@dataclass(frozen=True)
class Parity:
    """How near two models' logits are.

    Attributes:
        effect: root mean square of what the adapter changes in the base's logits.
        error: root mean square of what the merged model's logits are away from those of base and
            adapter.
        kl: mean Kullback-Leibler divergence of the merged model's next-token distribution from that
            of base and adapter, in nats.
        agreement: share of positions whose likeliest token is the same.
        modules: changed linears that were run; if not all of them, the rest says nothing.
        scale: root mean square of the base's logits.
    """

    effect: float
    error: float
    kl: float
    agreement: float
    modules: int
    scale: float

    @property
    def is_float_error(self) -> bool:
        """Whether computing the logits in float32 explains the error."""
        return self.error <= _ROUNDINGS * torch.finfo(torch.float32).eps * self.scale

    @property
    def relative_error(self) -> float:
        """The error as a share of the effect; 1 is what not merging at all would give."""
        return self.error / self.effect if self.effect else float(self.error > 0)


@torch.no_grad()
def parity_of(
    base: Path, change: Change, merged: Path, family: Architecture, device: str
) -> Parity:
    """Compare a merged model with its base and the change beside it.

    Args:
        base: model directory.
        change: what was merged.
        merged: model directory.
        family: of both.
        device: where a layer runs.
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
    """Have the linears add what the change adds; tells how many of them do."""

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
