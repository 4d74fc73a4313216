"""Distillation losses of alignment: divergence of the pruned model's predictions from the base's.

The pruned model learns to predict what the base predicts, as the adapter will run on the base. The
target is the base's full next-token distribution, or its ``k`` most likely tokens and the total
probability of all others. Everything is computed in chunks of positions, as in `losses`.

Divergences are ``T^2 KL(p || q)`` in nats, with ``p`` the base's and ``q`` the pruned model's
distribution, both at temperature ``T``. The factor ``T^2`` keeps the scale of the gradients (Hinton
et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class TopTokens:
    """The ``k`` most likely next tokens at each position, most likely first.

    Attributes:
        token_ids: Token ids, int64 ``[..., k]``.
        log_probs: Log-probabilities over the full vocabulary, float32 ``[..., k]``.
        missing: Total probability of all other tokens, float32 ``[...]``.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> TopTokens:
        """Select the top tokens of logits ``[..., vocabulary]``."""
        scaled = logits.float() / temperature
        values, token_ids = scaled.topk(k)
        values = values - values[..., :1]
        weights = scaled.sub_(scaled.gather(-1, token_ids[..., :1])).exp_()
        total = weights.sum(-1, keepdim=True)
        missing = weights.scatter_(-1, token_ids, 0).sum(-1) / total[..., 0]
        return cls(token_ids, values - total.log(), missing)

    @classmethod
    def rounded(
        cls, token_ids: torch.Tensor, log_probs: torch.Tensor, missing: torch.Tensor
    ) -> TopTokens:
        """Renormalize probabilities that were stored in low precision."""
        log_probs = log_probs.float()
        excess = log_probs.logsumexp(-1) - torch.log1p(-missing)
        return cls(token_ids.long(), log_probs - excess[..., None], missing)

    def to(self, device: torch.device) -> TopTokens:
        """Move all tensors to a device."""
        parts = (self.token_ids, self.log_probs, self.missing)
        return TopTokens(*(part.to(device) for part in parts))


def divergence(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the divergence from a full distribution.

    Args:
        logits: Logits of the pruned model, float32 ``[n, vocabulary]``.
        target: Logits of the base, float32 ``[n, vocabulary]``.
        temperature: Temperature of both distributions.

    Returns:
        Divergence at each position, float32 ``[n]``.
    """
    log_q = functional.log_softmax(logits / temperature, dim=-1)
    log_p = functional.log_softmax(target / temperature, dim=-1)
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl


def top_divergence(logits: torch.Tensor, target: TopTokens, temperature: float) -> torch.Tensor:
    """Compute the divergence from the most likely tokens, with all others as one outcome.

    This is a lower bound of the full divergence. The gap is ``T^2`` times the missing probability
    times the divergence between the distributions conditioned on the missing tokens; it is zero if
    ``k`` is the vocabulary size.

    Args:
        logits: Logits of the pruned model, float32 ``[n, vocabulary]``.
        target: Top tokens of the base at ``n`` positions, computed at the same temperature.
        temperature: Temperature of both distributions.

    Returns:
        Divergence at each position, float32 ``[n]``.
    """
    scaled = logits / temperature
    total = scaled.logsumexp(-1)
    log_q = scaled.gather(-1, target.token_ids) - total[:, None]
    probs = target.log_probs.exp()
    kl = (probs * (target.log_probs - log_q)).sum(-1)
    if target.token_ids.shape[-1] < logits.shape[-1]:
        others = scaled.scatter(-1, target.token_ids, -torch.inf).logsumexp(-1) - total
        kl = kl + torch.xlogy(target.missing, target.missing) - target.missing * others
    return temperature**2 * kl


def hidden_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the squared error of hidden states relative to the target's squared norm.

    Args:
        states: Hidden states of the pruned model, ``[n, hidden]``.
        target: Hidden states of the base, ``[n, hidden]``.

    Returns:
        Relative error at each position, float32 ``[n]``.
    """
    target = target.float()
    return (states.float() - target).square().sum(-1) / target.square().sum(-1)


DIVERGENCES = {"distillation": (divergence, top_divergence)}
"""Divergence from the full distribution and from its top tokens, by distilling objective."""
