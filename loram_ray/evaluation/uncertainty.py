"""Aggregate scores with standard errors; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import comb


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent items and its standard error, ``sd / sqrt(n)``.

    ``sd`` has the denominator ``n - 1``. The error of a single item is NaN.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def perplexity_of(mean: float) -> float:
    """Return ``exp`` of the mean nats per token, infinity on overflow."""
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_and_error(nlls: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """Return the perplexity, ``exp`` of the nats per token, and its standard error.

    Items are independent, but the tokens of an item are not. The error is that of a ratio of two
    sums over items (Cochran, Sampling Techniques, 1977, section 6.3), propagated through ``exp`` by
    its derivative.

    Args:
        nlls: Summed negative log-likelihood of each item, in nats.
        tokens: Number of tokens of each item, at least one in total.

    Returns:
        The perplexity and its error; both are infinity if ``exp`` overflows.
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
    """Return the probability that at least one of ``k`` samples passes, drawn without replacement.

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, Evaluating Large
    Language Models Trained on Code, equation 1).

    Args:
        samples: Number of samples, ``n``.
        passed: Number of samples that pass, ``c``.
        k: Number of drawn samples, at most ``n``.
    """
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def goodness(metric: str, value: float) -> float:
    """Return a score on a scale where more is better and differences are comparable.

    For a perplexity this is minus its logarithm, for any other score the score itself.
    """
    return -math.log(value) if metric.endswith("perplexity") else value


def share_of_gain(metric: str, base: float, adapted: float, full: float) -> float:
    """Return one score's gain over the base as a share of full LoRA's gain."""
    gained = goodness(metric, full) - goodness(metric, base)
    return (goodness(metric, adapted) - goodness(metric, base)) / gained


def gain_kept(metric: str, base: float, adapted: float, full: float) -> float | None:
    """Return `share_of_gain`; None if full LoRA gains nothing or the base's score is infinite."""
    if goodness(metric, full) <= goodness(metric, base) or not math.isfinite(base):
        return None
    return share_of_gain(metric, base, adapted, full)
