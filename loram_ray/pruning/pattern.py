"""Patterns of zeros, and exact selection of the lowest scores, first ties first."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from loram_ray.errors import LoramError

LONG_ROW = 2**24  # topk is faster for short rows, but limited by memory bandwidth for long ones
CHUNK = 2**20  # scores ranked at a time; they fit into a processor's cache


@dataclass(frozen=True)
class Pattern:
    """Allowed positions of zeros: anywhere, or exactly ``zeros`` in every ``group`` inputs.

    The first number of a pattern counts zeros, as in LoRAM's 4:8, which has 4 zeros in 8
    consecutive inputs.

    Attributes:
        zeros: Number of zeros in each group; 0 if unstructured.
        group: Number of consecutive inputs in a group; 0 if unstructured.
    """

    zeros: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``unstructured`` or ``n:m``.

        Raises:
            LoramError: If the text is neither, or not 0 < n < m.
        """
        if text == "unstructured":
            return cls()
        numbers = re.fullmatch(r"([0-9]+):([0-9]+)", text)
        if numbers is None or not 0 < int(numbers[1]) < int(numbers[2]):
            raise LoramError(
                "prune.pattern must be 'unstructured' or n:m with 0 < n < m (n zeros in every m "
                f"inputs), got {text!r}; set it to unstructured, 2:4 or 4:8"
            )
        return cls(int(numbers[1]), int(numbers[2]))

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.group else "unstructured"

    def require(self, columns: int, module: str) -> None:
        """Check that a linear's inputs divide into whole groups.

        Raises:
            LoramError: If they do not; the message names the linear.
        """
        if self.group and columns % self.group:
            raise LoramError(
                "prune.pattern must have an m that divides the inputs of every pruned linear, got "
                f"{self} with {columns} inputs of {module}; choose an m that divides {columns}, or "
                "unstructured"
            )

    def ratio(self, default: float) -> float:
        """Return the share of zeros: n / m, or ``default`` (``prune.ratio``) if unstructured."""
        return self.zeros / self.group if self.group else default


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the ``count`` lowest scores of each row of ``[rows, columns]``, earlier ties first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[1] < LONG_ROW:
        last = scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    else:
        last = scores.kthvalue(count, dim=1, keepdim=True).values
    chosen = scores <= last
    tied = (chosen.sum(1) > count).nonzero().squeeze(1)
    if len(tied):
        equal = scores[tied] == last[tied]
        below = scores[tied] < last[tied]
        wanted = count - below.sum(1, keepdim=True)
        chosen[tied] = below | (equal & (equal.cumsum(1, dtype=torch.int32) <= wanted))
    return chosen


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Rank each score within its column of ``[group, columns]``; the first of ties ranks lowest.

    Compares pairs, which is faster than sorting for the few scores of a group.
    """
    ranks = torch.zeros_like(scores, dtype=torch.int16)
    for i in range(len(scores) - 1):
        lower = scores[i + 1 :] < scores[i]
        ranks[i] += lower.sum(0, dtype=torch.int16)
        ranks[i + 1 :] += ~lower
    return ranks


def kept_in_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Mark the scores of ``[out, in]`` that are not among the n lowest of their group of m."""
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(CHUNK // scores.shape[1], 1)
    for part, target in zip(scores.split(rows), kept.split(rows), strict=True):
        groups = part.reshape(-1, pattern.group).t().contiguous()
        target.view(-1, pattern.group).copy_((rank(groups) >= pattern.zeros).t())
    return kept
