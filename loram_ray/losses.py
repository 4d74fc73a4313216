"""Causal-LM loss from hidden states, computed in chunks of the labelled positions.

The logits of all positions over the full vocabulary are often the largest tensor of a training step
(128k tokens x 2,048 positions x 4 bytes = 1 GiB, in several copies). Here the output head is
applied only to labelled positions, one chunk at a time. The gradients of a chunk are computed while
its logits exist, so no chunk is computed twice. Under ZeRO-3, which gathers the head's weights
for one pass at a time, chunks are recomputed in the backward pass instead.
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
    """Compute the summed negative log-likelihood of the labels, in nats.

    Args:
        model: Causal LM from transformers (not a wrapper around one).
        input_ids: Token ids, int64 ``[batch, seq]``.
        attention_mask: Attention mask ``[batch, seq]``, or None for sequences without padding.
        labels: Unshifted labels, int64 ``[batch, seq]``; `IGNORED` positions have no loss.
        chunk: Number of positions whose logits are computed at a time.
        positions: Position ids, int64 ``[batch, seq]``. Default: 0, 1, 2, ….

    Returns:
        The sum (float32 scalar) and the number of labels (int64 scalar).
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
    """Compute the summed negative log-likelihood of the labels from the decoder's output.

    Args:
        model: Causal LM from transformers.
        hidden: Hidden states after the final norm, ``[batch, seq, hidden]``.
        labels: Unshifted labels, int64 ``[batch, seq]``; `IGNORED` positions have no loss.
        chunk: Number of positions whose logits are computed at a time.

    Returns:
        The sum (float32 scalar) and the number of labels (int64 scalar).
    """
    wanted = labelled(labels)
    targets = labels[:, 1:][wanted]

    def loss(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits_of(model, states), targets, reduction="sum")

    rows = (hidden[:, :-1][wanted], targets)
    total, _ = sum_in_chunks(loss, rows, wanted.numel(), output_head(model), chunk=chunk)
    return total, torch.tensor(len(targets), device=targets.device)


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Return the mask of positions that predict a label, bool ``[batch, seq - 1]``."""
    return labels[:, 1:] != IGNORED


def logits_of(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a causal LM, float32 ``[n, vocabulary]``.

    Args:
        model: Causal LM from transformers.
        states: Hidden states after the final norm, ``[n, hidden]``.
    """
    logits: torch.Tensor = output_head(model)(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2 soft-caps its logits
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that maps hidden states to logits."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return head


def sum_in_chunks(
    function: Callable[..., torch.Tensor],
    rows: Sequence[torch.Tensor],
    max_rows: int,
    head: nn.Module,
    weights: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum a function over chunks of rows.

    Args:
        function: Function of one chunk of each tensor in ``rows``. It applies the head once and
            returns a scalar or ``[k]``.
        rows: Tensors with the same number of rows; the first holds the hidden states.
        max_rows: Upper bound of the number of rows, equal on all workers. Under ZeRO-3 it sets the
            number of chunks, some possibly empty, as every worker must apply the head equally
            often.
        head: Output head that ``function`` applies. Its parameters and the hidden states receive
            gradients.
        weights: Weights ``[k]`` of the function's results in the loss, or None for a scalar.
        chunk: Number of rows in a chunk.

    Returns:
        The weighted sum, a float32 scalar with a gradient (zero if there are no rows), and the
        unweighted sums, float32 in the shape of the function's result, without a gradient.
    """
    states, *others = rows
    parameters = list(head.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def chunks(states: torch.Tensor, count: int) -> Iterator[list[torch.Tensor]]:
        for start in range(0, max(count, 1), chunk):
            yield [tensor[start : start + chunk] for tensor in (states, *others)]

    def weigh(sums: torch.Tensor) -> torch.Tensor:
        return sums if weights is None else sums @ weights

    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # partitioned by ZeRO-3
        sums = _sum(checkpoint(function, *p, use_reentrant=False) for p in chunks(states, max_rows))
        return weigh(sums), sums.detach()
    if torch.is_grad_enabled() and (states.requires_grad or trained):
        pieces = functools.partial(chunks, count=len(states))
        loss, sums = _WithGradients.apply(function, pieces, weigh, states, *trained)
        return loss, sums
    sums = _sum(function(*p) for p in chunks(states, len(states)))
    return weigh(sums), sums


def _sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, parts)


class _WithGradients(torch.autograd.Function):
    """Sum over chunks whose gradients are computed in the forward pass.

    The backward pass multiplies them by the gradient of the scalar result.
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
        # Accumulate in float32: in bfloat16 the contribution of later chunks would be rounded off.
        of_trained = [torch.zeros_like(one, dtype=torch.float32) for one in trained]
        for piece, *others in chunks(states):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                result = function(piece, *others)
                gradients = torch.autograd.grad(weigh(result), [piece, *trained])
            total = result.detach() if total is None else total + result.detach()
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
