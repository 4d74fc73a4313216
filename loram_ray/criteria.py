"""Properties of the pruning criteria.

To add a criterion, add a `Criterion` to `CRITERIA` and its computation under the same name: to
``SCORES`` of `pruning.criteria` if it selects units, or to ``MASKINGS`` of `pruning.sparsify` if it
selects weights. A new statistic of the inputs is a class in `pruning.statistics`. Nothing else
changes.
"""

from __future__ import annotations

from dataclasses import dataclass

STRUCTURED, UNSTRUCTURED = "structured", "unstructured"


@dataclass(frozen=True)
class Criterion:
    """Properties of a pruning criterion, without its computation.

    Attributes:
        name: Value of ``prune.method``.
        units: Whether it can select GQA groups and neurons (structured pruning).
        weights: Whether it can select single weights (unstructured and n:m pruning).
        statistic: Class in `pruning.statistics` that accumulates a linear layer's calibration
            inputs, or None if the criterion does not use them.
        gradients: Whether it uses gradients of the calibration loss.
        form: Key of the ``prune`` section that selects a variant, or None.
        reusable: Whether its scores are saved, so they can be reused without calibration.
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
        """Whether the criterion needs calibration text."""
        return self.gradients or self.statistic is not None

    @property
    def default_pattern(self) -> str:
        """Sparsity pattern if ``prune.pattern`` is not given."""
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
"""All criteria by name; those that usually preserve more quality are first."""
