"""Causal-LM loss from hidden states, in chunks of the positions that carry a label.

A logits tensor of all positions and the whole vocabulary is often the largest of a training step
(128k words x 2,048 positions x 4 bytes = 1 GiB, several times over). Here the output head is
applied only where a label is, a chunk at a time, and recomputed in the backward pass.
"""

from __future__ import annotations

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of the labels, summed, in nats.

    Args:
        model: a causal LM of transformers (not a wrapper around one).
        input_ids: int64 ``[batch, seq]``.
        attention_mask: ``[batch, seq]`` or None for sequences without padding.
        labels: int64 ``[batch, seq]``; `IGNORED` where there is no loss; not shifted.
        chunk: positions whose logits exist at a time.

    Returns:
        The sum, float32 scalar, and the number of labels, int64 scalar.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
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
    states, targets = labelled_states(hidden, labels)
    head = model.get_output_embeddings()  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    total = states.new_zeros((), dtype=torch.float32)
    # As many chunks as the shape allows, the last ones empty where labels are few: every worker
    # applies the head equally often, as ZeRO-3 demands, and no label gives a differentiable zero.
    for start in range(0, max(labels[:, 1:].numel(), 1), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(
            _chunk_loss, head, states[part], targets[part], cap, use_reentrant=False
        )
    return total, torch.tensor(len(targets), device=targets.device)


def labelled_states(
    hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the positions that predict a label, and those labels.

    Returns:
        ``[labelled, hidden]`` and int64 ``[labelled]``.
    """
    predicting, target = hidden[:, :-1], labels[:, 1:]
    wanted = target != IGNORED
    return predicting[wanted], target[wanted]


def _chunk_loss(
    head: nn.Module, states: torch.Tensor, targets: torch.Tensor, cap: float | None
) -> torch.Tensor:
    logits = head(states)
    if cap is not None:  # Gemma 2 squashes its logits
        logits = cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
