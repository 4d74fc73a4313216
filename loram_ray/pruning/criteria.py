"""Scores for structured pruning: the importance of each GQA group and neuron to its layer's output.

Every criterion scores each row or column along a linear's pruned dimension. The scores of all rows
and columns of a unit are summed: a neuron's gate row, up row and down column, or a group's query,
key and value rows and output columns. LLM-Pruner instead folds the scores of query heads over KV
heads by position, which mixes heads of different groups; here each group sums its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from loram_ray.architectures import Architecture, CoupledLinear
from loram_ray.errors import LoramError
from loram_ray.plan import unit_sums
from loram_ray.pruning.statistics import MeanActivations, Moments, Statistic
from loram_ray.units import Geometry, PerUnit


class TaylorForm(StrEnum):
    """Terms of the loss's Taylor expansion around zeroing a weight (LLM-Pruner, section 3.2)."""

    FIRST = "first"
    """``|w g|``, where g is the gradient of the mean loss."""
    SECOND = "second"
    """``|w^2 f|``, where f is the mean of the squared per-sample gradients (Fisher)."""
    MIXED = "mixed"
    """``|w g - w^2 f / 2|``."""


class LayerScores(PerUnit):
    """Scores of one layer's units by kind of unit; higher scores are more important.

    Their shape is float32 ``[count]``, or ``[experts, count]`` if each expert has its own units.
    """


@dataclass(frozen=True)
class CalibratedLinear:
    """One linear of a layer to be scored.

    Attributes:
        module: Full path of the linear.
        linear: Description of the linear in its family.
        expert: Number of the expert that it belongs to, or None.
    """

    module: str
    linear: CoupledLinear
    expert: int | None


PerIndex = Callable[[CalibratedLinear], "torch.Tensor | None"]


def layer_linears(family: Architecture, geometry: Geometry, layer: int) -> list[CalibratedLinear]:
    """Return the coupled linears of a layer."""
    return [CalibratedLinear(*entry) for entry in family.modules(layer, geometry)]


def score_layer(
    linears: Sequence[CalibratedLinear], geometry: Geometry, per_index: PerIndex
) -> LayerScores:
    """Sum the scores of each linear's rows or columns over the units they belong to.

    Args:
        linears: Linears of one layer.
        geometry: Sizes of the base.
        per_index: Function that returns a linear's scores along its pruned dimension, float32, or
            None if it has none.

    Raises:
        LoramError: If a score is not finite; the message names the linear.
    """
    units = dict.fromkeys(span.unit for entry in linears for span in entry.linear.spans)
    found = LayerScores({unit.name: torch.zeros(unit.shape(geometry)) for unit in units})
    for entry in linears:
        scores = per_index(entry)
        if scores is None:
            continue
        if not bool(scores.isfinite().all()):
            raise LoramError(
                f"the scores of {entry.module} are not finite: its calibration inputs or gradients "
                "overflowed; set prune.calibration.precision to fp32"
            )
        for unit, sums in unit_sums(geometry, entry.linear, scores.cpu()).items():
            unit.add(found, sums, entry.expert)
    return found


@dataclass(frozen=True)
class Evidence:
    """Inputs of a criterion for scoring one linear.

    Attributes:
        weight: Function that reads the weight ``[out, in]``; not called by criteria that ignore it.
        axis: Pruned dimension of the weight.
        inputs: The criterion's statistic of the linear's calibration inputs.
        gradient: Gradient of the mean calibration loss, float32 ``[out, in]``.
        squared_gradients: Mean of the squared per-sample gradients, float32 ``[out, in]``.
        form: Form of the criterion, if it has several.
    """

    weight: Callable[[], torch.Tensor]
    axis: int
    inputs: Statistic | None = None
    gradient: torch.Tensor | None = None
    squared_gradients: torch.Tensor | None = None
    form: str = ""


def magnitude(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Compute the squared L2 norm of each row (axis 0) or column (axis 1) of a weight."""
    return weight.float().square().sum(1 - axis)


def flap(weight: torch.Tensor, inputs: Moments) -> torch.Tensor:
    """Compute ``Var(x_j) * sum_i W_ij^2`` of each input (An et al. 2024, FLAP, equation 5).

    Args:
        weight: Weight of ``down_proj`` or ``o_proj``, ``[out, in]``.
        inputs: Moments of its inputs.
    """
    return inputs.variance * magnitude(weight, axis=1).cpu()


def activation(inputs: MeanActivations) -> torch.Tensor:
    """Compute the L2 norm over sequences of the mean absolute input (Muralidharan et al. 2024)."""
    return inputs.total.sqrt()


def taylor(
    form: TaylorForm,
    weight: torch.Tensor,
    axis: int,
    gradient: torch.Tensor | None,
    squared_gradients: torch.Tensor | None,
) -> torch.Tensor:
    """Sum LLM-Pruner's element-wise importance over each row (axis 0) or column (axis 1).

    Args:
        form: Terms of the expansion to use.
        weight: Weight of the linear, ``[out, in]``.
        axis: Pruned dimension of the weight.
        gradient: Gradient of the mean loss, float32 ``[out, in]``; unused by `TaylorForm.SECOND`.
        squared_gradients: Mean of the squared per-sample gradients, float32 ``[out, in]``; unused
            by `TaylorForm.FIRST`.
    """
    weight = weight.float()
    change = torch.zeros_like(weight)
    if form is not TaylorForm.SECOND:
        assert gradient is not None
        change = weight * gradient
    if form is not TaylorForm.FIRST:
        assert squared_gradients is not None
        curvature = weight.square() * squared_gradients
        change = curvature if form is TaylorForm.SECOND else change - curvature / 2
    return change.abs().sum(1 - axis)


def _flap(evidence: Evidence) -> torch.Tensor:
    assert isinstance(evidence.inputs, Moments)
    return flap(evidence.weight(), evidence.inputs)


def _activation(evidence: Evidence) -> torch.Tensor:
    assert isinstance(evidence.inputs, MeanActivations)
    return activation(evidence.inputs)


def _taylor(evidence: Evidence) -> torch.Tensor:
    gradients = evidence.gradient, evidence.squared_gradients
    return taylor(TaylorForm(evidence.form), evidence.weight(), evidence.axis, *gradients)


SCORES: dict[str, Callable[[Evidence], torch.Tensor]] = {
    "magnitude": lambda evidence: magnitude(evidence.weight(), evidence.axis),
    "flap": _flap,
    "activation": _activation,
    "taylor": _taylor,
}
"""Score functions of a linear's rows or columns, by criterion; random scoring uses no linear."""
