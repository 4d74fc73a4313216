"""Average scores over seeds, and test which claims of the paper they support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CLAIMS_FILE = "claims.json"
# Two-sided 95% quantiles of Student's t, from 1 degree of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip
_NORMAL = 1.96


@dataclass(frozen=True)
class Claim:
    """Claim that one system is better than another.

    Attributes:
        better: System claimed to be better.
        worse: System it is compared with.
        says: Wording of the claim.
        paper: Whether the claim is the paper's.
    """

    better: str
    worse: str
    says: str
    paper: bool = True


CLAIMS = (
    Claim("full", "base", "LoRA on the full base improves on the base"),
    Claim("full", "causal", "LoRA on the full base is at least as good as LoRAM"),
    Claim("causal", "base", "LoRAM improves on the untouched base"),
    Claim("causal", "unaligned", "alignment is needed"),
    Claim("base", "unaligned", "without alignment LoRAM loses to the untouched base"),
    Claim("causal", "small", "recovery is needed: the base with the adapter beats the small model"),
    Claim("causal", "pruned", "LoRAM beats the pruned model as it is"),
    Claim("causal", "sibling", "LoRAM beats LoRA on a smaller sibling"),
    Claim("qloram", "base", "QLoRAM improves on the untouched base"),
    Claim(
        "distilled", "causal", "alignment by distillation beats the paper's alignment", paper=False
    ),
    Claim("distilled", "base", "LoRAM aligned by distillation improves on the base", paper=False),
    Claim("causal + correction", "causal", "the correction helps LoRAM", paper=False),
    Claim(
        "distilled + correction",
        "distilled",
        "the correction helps LoRAM aligned by distillation",
        paper=False,
    ),
    Claim("qloram + correction", "qloram", "the correction helps QLoRAM", paper=False),
    Claim("loram", "base", "LoRAM as configured improves on the untouched base", paper=False),
    Claim("loram", "unaligned", "LoRAM as configured beats LoRAM without alignment", paper=False),
    Claim("full", "loram", "LoRA on the full base beats LoRAM as configured", paper=False),
)


def claims_about(alignments: Iterable[str]) -> list[Claim]:
    """Return `CLAIMS` and the claims about additional alignments.

    Args:
        alignments: Names of the additional alignments' systems.
    """
    claims = list(CLAIMS)
    for name in alignments:
        claims += [
            Claim(name, "causal", f"alignment {name} beats the paper's alignment", paper=False),
            Claim("distilled", name, f"distillation beats alignment {name}", paper=False),
            Claim(f"{name} + correction", name, f"the correction helps alignment {name}", False),
        ]
    return claims


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


@dataclass(frozen=True)
class Verdict:
    """Result of testing a claim.

    Attributes:
        claim: Claim tested.
        seen: ``seen``, ``not seen``, ``within noise``, or ``one pair`` if the noise is unknown.
        difference: Mean difference in goodness, averaged over tasks.
        interval: Half-width of the 95% interval of that mean; None for a single pair.
        pairs: Number of pairs compared.
    """

    claim: Claim
    seen: str
    difference: float
    interval: float | None
    pairs: int


def verdict(
    claim: Claim,
    better: Mapping[tuple[str, int], float],
    worse: Mapping[tuple[str, int], float],
) -> Verdict:
    """Compare two systems pair by pair.

    A claim is seen if the 95% interval of the mean difference (Student's t) lies above zero, not
    seen if it lies below, and within noise if it contains zero. Tasks have equal weight. Noise is
    the effect of seeds on the difference within a task, pooled over tasks; differences between
    tasks do not count as noise. With a single seed, noise is estimated from the tasks.

    Args:
        claim: Claim to test.
        better: Goodness of the supposedly better system, by task and seed.
        worse: Goodness of the other system, by task and seed.
    """
    of_task: dict[str, list[float]] = {}
    for task, seed in better.keys() & worse.keys():
        of_task.setdefault(task, []).append(better[task, seed] - worse[task, seed])
    pairs = sum(map(len, of_task.values()))
    means = [statistics.fmean(found) for found in of_task.values()]
    mean = statistics.fmean(means)
    if pairs == 1:
        return Verdict(claim, "one pair", mean, None, 1)
    freedom = pairs - len(of_task)
    if freedom:
        groups = of_task.values()
        squares = math.fsum(statistics.pvariance(found) * len(found) for found in groups)
        parts = math.fsum(1 / len(found) for found in groups)
        error = math.sqrt(squares / freedom * parts) / len(of_task)
    else:
        freedom = pairs - 1
        error = statistics.stdev(means) / math.sqrt(pairs)
    interval = (_T[freedom - 1] if freedom <= len(_T) else _NORMAL) * error
    seen = "seen" if mean > interval else "not seen" if mean < -interval else "within noise"
    return Verdict(claim, seen, mean, interval, pairs)
