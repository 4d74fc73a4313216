"""Distilled alignment: the divergence of a pruned model's next tokens from the base's.

The pruned model is asked to behave as the model that the adapter will finally run on. The target is
the base's whole distribution, or its ``k`` likeliest tokens and the probability of all the others
together. All of it is computed in chunks of positions, as in `losses`.

Divergences are ``T^2 KL(p || q)`` in nats, ``p`` the base's and ``q`` the pruned model's
distribution, both softened by the temperature ``T`` (Hinton et al. 2015, arXiv 1503.02531, whose
factor ``T^2`` keeps the size of the gradients).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens at some positions, likeliest first.

    Attributes:
        token_ids: int64 ``[..., k]``.
        log_probs: their logarithmic probabilities over the whole vocabulary, float32 ``[..., k]``.
        missing: probability of all other tokens together, float32 ``[...]``.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> TopTokens:
        """Choose from logits ``[..., vocabulary]``."""
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
        """Make probabilities that were stored with few bits add up to one again."""
        log_probs = log_probs.float()
        excess = log_probs.logsumexp(-1) - torch.log1p(-missing)
        return cls(token_ids.long(), log_probs - excess[..., None], missing)

    def to(self, device: torch.device) -> TopTokens:
        """Return them on a device."""
        parts = (self.token_ids, self.log_probs, self.missing)
        return TopTokens(*(part.to(device) for part in parts))


def divergence(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence from a whole distribution.

    Args:
        logits: the pruned model's, float32 ``[n, vocabulary]``.
        target: the base's, float32 ``[n, vocabulary]``.
        temperature: of both.

    Returns:
        Float32 ``[n]``.
    """
    log_q = functional.log_softmax(logits / temperature, dim=-1)
    log_p = functional.log_softmax(target / temperature, dim=-1)
    found = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * found


def top_divergence(logits: torch.Tensor, target: TopTokens, temperature: float) -> torch.Tensor:
    """Divergence from the likeliest tokens, all others counted as one outcome.

    It is below the whole divergence by ``T^2`` times the missing probability times the divergence
    among the tokens that are missing, given that it is one of those: nothing where ``k`` is the
    whole vocabulary.

    Args:
        logits: the pruned model's, float32 ``[n, vocabulary]``.
        target: the base's, ``n`` positions.
        temperature: of both; the target's tokens were chosen at the same.

    Returns:
        Float32 ``[n]``.
    """
    scaled = logits / temperature
    total = scaled.logsumexp(-1)
    log_q = scaled.gather(-1, target.token_ids) - total[:, None]
    probs = target.log_probs.exp()
    found = (probs * (target.log_probs - log_q)).sum(-1)
    if target.token_ids.shape[-1] < logits.shape[-1]:
        others = scaled.scatter(-1, target.token_ids, -torch.inf).logsumexp(-1) - total
        found = found + torch.xlogy(target.missing, target.missing) - target.missing * others
    return temperature**2 * found


def hidden_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states relative to the target's squared norm.

    Args:
        states: ``[n, hidden]``.
        target: ``[n, hidden]``.

    Returns:
        Float32 ``[n]``.
    """
    target = target.float()
    return (states.float() - target).square().sum(-1) / target.square().sum(-1)
