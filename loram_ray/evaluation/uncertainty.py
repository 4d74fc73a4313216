"""Scores of many items with their standard errors; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import comb


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent items and its standard error, ``sd / sqrt(n)`` with ``n - 1`` in ``sd``.

    The error of one item is not a number.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def perplexity_of(mean: float) -> float:
    """``exp`` of the mean nats a token, infinity where it overflows."""
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_and_error(nlls: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """``exp`` of the nats a token, and its standard error.

    Items are independent, tokens of an item are not: the error is that of a ratio of two sums over
    items (Cochran, Sampling Techniques, 1977, section 6.3), carried through ``exp`` by its slope.

    Args:
        nlls: summed negative log-likelihood of each item, in nats.
        tokens: of each item, at least one in all.

    Returns:
        Infinity for both where ``exp`` overflows.
    """
    count, total = len(nlls), sum(tokens)
    mean = math.fsum(nlls) / total
    perplexity = perplexity_of(mean)
    if perplexity == math.inf:
        return perplexity, math.inf
    if count < 2:
        return perplexity, math.nan
    squares = math.fsum((nll - mean * n) ** 2 for nll, n in zip(nlls, tokens, strict=True))
    return perplexity, perplexity * math.sqrt(squares * count / (count - 1)) / total


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that of ``k`` samples, drawn without replacement, one at least passes.

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, Evaluating Large
    Language Models Trained on Code, equation 1).

    Args:
        samples: drawn, ``n``.
        passed: how many of them pass, ``c``.
        k: at most ``n``.
    """
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def goodness(metric: str, value: float) -> float:
    """A score so that more is better and differences mean the same everywhere.

    Of a perplexity minus its logarithm, of any other score the score.
    """
    return -math.log(value) if metric.endswith("perplexity") else value


def share_of_gain(metric: str, base: float, adapted: float, full: float) -> float:
    """What one score gains over the base's as a share of what full LoRA's does."""
    gained = goodness(metric, full) - goodness(metric, base)
    return (goodness(metric, adapted) - goodness(metric, base)) / gained


def gain_kept(metric: str, base: float, adapted: float, full: float) -> float | None:
    """`share_of_gain`, None where full LoRA gains nothing, or the base's perplexity overflows."""
    if goodness(metric, full) <= goodness(metric, base) or not math.isfinite(base):
        return None
    return share_of_gain(metric, base, adapted, full)
