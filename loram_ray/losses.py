"""Causal-LM loss from hidden states, in chunks of the positions that carry a label.

A logits tensor of all positions and the whole vocabulary is often the largest of a training step
(128k words x 2,048 positions x 4 bytes = 1 GiB, several times over). Here the output head is
applied only where a label is, a chunk at a time, and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    total = sum_in_chunks(loss, (hidden[:, :-1][wanted], targets), wanted.numel(), chunk)
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
    logits: torch.Tensor = model.get_output_embeddings()(states)  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2 squashes its logits
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


def sum_in_chunks(
    function: Callable[..., torch.Tensor],
    rows: Sequence[torch.Tensor],
    most: int,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Sum a function of rows over chunks of them, recomputed in the backward pass.

    Args:
        function: of a chunk of each of ``rows``; applies the output head once.
        rows: tensors of equally many rows, the first the hidden states.
        most: rows there could have been. There are as many chunks as that many would need, the last
            ones perhaps empty: every worker applies the head equally often, as ZeRO-3 demands, and
            no row at all gives a differentiable zero.
        chunk: rows at a time.

    Returns:
        Float32, of the shape of the function's result.
    """
    total = rows[0].new_zeros((), dtype=torch.float32)
    for start in range(0, max(most, 1), chunk):
        parts = [tensor[start : start + chunk] for tensor in rows]
        total = total + checkpoint(function, *parts, use_reentrant=False)
    return total
