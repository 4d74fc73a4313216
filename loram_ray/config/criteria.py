"""The pruning criteria: what each looks at and what it can choose.

Another criterion joins by adding one `Criterion` to `CRITERIA` and its arithmetic under the same
name: to ``SCORES`` of `pruning.criteria` if it chooses units, to ``MASKINGS`` of
`pruning.sparsify` if it chooses weights. If it sums inputs in a new way, that sum is a class in
`pruning.statistics`. Nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass

STRUCTURED, UNSTRUCTURED = "structured", "unstructured"


@dataclass(frozen=True)
class Criterion:
    """What pruning knows of a criterion besides its arithmetic.

    Attributes:
        name: value of ``prune.method``.
        units: whether it chooses GQA groups and neurons (structured pruning).
        weights: whether it chooses single weights (unstructured and n:m pruning).
        statistic: class in `pruning.statistics` that sums a linear's calibration inputs for it, or
            None if it does not look at them.
        gradients: whether it looks at the gradients of the calibration loss.
        form: key of the ``prune`` section that chooses one of its forms, or None.
        reusable: whether what it found is kept, so that another pruning needs no calibration.
    """

    name: str
    units: bool = False
    weights: bool = False
    statistic: str | None = None
    gradients: bool = False
    form: str | None = None
    reusable: bool = True

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text."""
        return self.gradients or self.statistic is not None

    @property
    def default_pattern(self) -> str:
        """What it prunes if ``prune.pattern`` is left out."""
        return STRUCTURED if self.units else UNSTRUCTURED


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("taylor", units=True, gradients=True, form="taylor"),
        Criterion("flap", units=True, statistic="Moments"),
        Criterion("activation", units=True, statistic="MeanActivations"),
        Criterion("sparsegpt", weights=True, statistic="Hessian", reusable=False),
        Criterion("wanda", weights=True, statistic="SquaredNorms"),
        Criterion("magnitude", units=True, weights=True),
        Criterion("random", units=True, reusable=False),
    )
}
"""Every criterion by its name, those that usually keep more quality first."""
