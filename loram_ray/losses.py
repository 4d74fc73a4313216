"""Causal-LM loss from hidden states, in chunks of the positions that carry a label.

A logits tensor of all positions and the whole vocabulary is often the largest of a training step
(128k words x 2,048 positions x 4 bytes = 1 GiB, several times over). Here the output head is
applied only where a label is, a chunk at a time. A chunk's gradients are computed at once, while
its logits exist, so that no chunk is computed twice; under ZeRO-3, which lends the head's weights
to one pass at a time, a chunk is computed again in the backward pass instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK = 256


def summed_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    chunk: int = CHUNK,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the labels, summed, in nats.

    Args:
        model: a causal LM of transformers (not a wrapper around one).
        input_ids: int64 ``[batch, seq]``.
        attention_mask: ``[batch, seq]`` or None for sequences without padding.
        labels: int64 ``[batch, seq]``; `IGNORED` where there is no loss; not shifted.
        chunk: positions whose logits exist at a time.
        positions: int64 ``[batch, seq]``; default: from 0 on.

    Returns:
        The sum, float32 scalar, and the number of labels, int64 scalar.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    hidden = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
    )[0]
    return summed_loss_of_states(model, hidden, labels, chunk)


def summed_loss_of_states(
    model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the labels, summed, from the decoder's output.

    Args:
        model: a causal LM of transformers.
        hidden: ``[batch, seq, hidden]``, after the final norm.
        labels: int64 ``[batch, seq]``; `IGNORED` where there is no loss; not shifted.
        chunk: positions whose logits exist at a time.

    Returns:
        The sum, float32 scalar, and the number of labels, int64 scalar.
    """
    wanted = labelled(labels)
    targets = labels[:, 1:][wanted]

    def loss(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_of(model, states), targets, reduction="sum")

    rows = (hidden[:, :-1][wanted], targets)
    total, _ = sum_in_chunks(loss, rows, wanted.numel(), output_head(model), chunk=chunk)
    return total, torch.tensor(len(targets), device=targets.device)


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Mask of the positions that predict a label, bool ``[batch, seq - 1]``."""
    return labels[:, 1:] != IGNORED


def logits_of(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Logits of a causal LM of transformers, float32 ``[n, vocabulary]``.

    Args:
        model: the model.
        states: ``[n, hidden]``, after the final norm.
    """
    logits: torch.Tensor = output_head(model)(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2 squashes its logits
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


def output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of states."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return head


def sum_in_chunks(
    function: Callable[..., torch.Tensor],
    rows: Sequence[torch.Tensor],
    most: int,
    head: nn.Module,
    weights: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum a function of rows over chunks of them.

    Args:
        function: of a chunk of each of ``rows``; a scalar or ``[k]``; applies the head once.
        rows: tensors of equally many rows, the first the hidden states.
        most: rows there could have been. Under ZeRO-3 there are as many chunks as that many would
            need, the last ones perhaps empty: every worker must apply the head equally often.
        head: what ``function`` applies; gradients go to its parameters and to the hidden states.
        weights: ``[k]``, of the function's results in the loss; None for a scalar.
        chunk: rows at a time.

    Returns:
        The weighted sum, a float32 scalar with a gradient, which no row at all leaves zero; and the
        sums, float32, of the shape of the function's result, without.
    """
    states, *others = rows
    parameters = list(head.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def chunks(states: torch.Tensor, most: int) -> Iterator[list[torch.Tensor]]:
        for start in range(0, max(most, 1), chunk):
            yield [tensor[start : start + chunk] for tensor in (states, *others)]

    def weigh(found: torch.Tensor) -> torch.Tensor:
        return found if weights is None else found @ weights

    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3's
        found = _sum(checkpoint(function, *p, use_reentrant=False) for p in chunks(states, most))
        return weigh(found), found.detach()
    if torch.is_grad_enabled() and (states.requires_grad or trained):
        pieces = functools.partial(chunks, most=len(states))
        loss, found = _WithGradients.apply(function, pieces, weigh, states, *trained)
        return loss, found
    found = _sum(function(*p) for p in chunks(states, len(states)))
    return weigh(found), found


def _sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, parts)


class _WithGradients(torch.autograd.Function):
    """A sum over chunks that has its gradients before they are asked for.

    What the backward pass is given is a scalar's gradient, by which the ready ones are multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., torch.Tensor],
        chunks: Callable[[torch.Tensor], Iterator[list[torch.Tensor]]],
        weigh: Callable[[torch.Tensor], torch.Tensor],
        states: torch.Tensor,
        *trained: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total: torch.Tensor | None = None
        of_states = []
        # Summed in float32: in bfloat16 a later chunk's share would be lost in what is there.
        of_trained = [torch.zeros_like(one, dtype=torch.float32) for one in trained]
        for piece, *others in chunks(states):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                found = function(piece, *others)
                gradients = torch.autograd.grad(weigh(found), [piece, *trained])
            total = found.detach() if total is None else total + found.detach()
            of_states.append(gradients[0])
            for ready, new in zip(of_trained, gradients[1:], strict=True):
                ready += new
        assert total is not None
        rounded = [ready.to(one.dtype) for ready, one in zip(of_trained, trained, strict=True)]
        ctx.save_for_backward(torch.cat(of_states), *rounded)
        ctx.mark_non_differentiable(total)
        return weigh(total).clone(), total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *(ready * gradient for ready in ctx.saved_tensors)
