"""The LoRA correction in recovery: the choice of its model, and weights read block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.adapter import Adapter
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.config import RecoverConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.models.quantisation import READABLE
from loram_ray.plan import PruningPlan
from loram_ray.recovery.correction import limited, orthonormal, projected
from loram_ray.recovery.origin import Origin
from loram_ray.recovery.scatter import squared_norm
from loram_ray.runtime.progress import say

_MOVING = ("align", "quantize")  # the stages that change kept weights
BLOCK_ELEMENTS = 2**22  # elements of a weight in memory at a time; 16 MB in float32


def corrects(config: RecoverConfig, origin: Origin) -> bool:
    """Return whether to correct an adapter of structured pruning.

    By default it is corrected if its model was aligned or quantised.

    Args:
        config: Configuration of the stage.
        origin: Origin of the adapter.
    """
    if origin.plan.masks is not None:
        return False
    return origin.model_stage in _MOVING if config.correction is None else config.correction


def require_correctable(plan: PruningPlan, key: str, which: str) -> None:
    """Reject a correction after non-structured pruning.

    Args:
        plan: Plan of the pruned model.
        key: Configuration key that asks for the correction, for the message.
        which: Subject that has such a pruning, for the message.

    Raises:
        LoramError: If the pruning is not structured.
    """
    if plan.masks is not None:
        raise LoramError(
            f"{key} must be false for {plan.pattern} pruning, which {which}: the correction "
            "requires structured pruning"
        )


def trained_on(config: RecoverConfig, adapter: Adapter, origin: Origin) -> Path:
    """Return the directory of the model an adapter was trained on.

    The digest of a model that `loram train` trained on is verified.

    Args:
        config: Configuration of the stage.
        adapter: Adapter to recover.
        origin: Origin of the adapter.

    Raises:
        LoramError: If the model is missing, damaged, or not the one the adapter was trained on.
    """
    if origin.directory is not None:
        return origin.directory
    named = adapter.config.get("base_model_name_or_path")
    model = config.model or Path(str(named))
    if not model.is_dir():
        raise LoramError(
            f"recover.model must be a directory, got {model}; set it to the model that "
            f"{adapter.directory} was trained on, or set recover.correction to false"
        )
    digest, _ = BaseModel(model, "recover.model").identify()
    if digest != origin.model:
        raise LoramError(
            f"recover.model must be the model that {adapter.directory} was trained on, "
            f"{origin.model[:12]}, but {model} is {digest[:12]}; use that model"
        )
    return model


class Correction:
    """Correction of an adapter's pairs A and B, one at a time, with totals.

    Args:
        base: Weights of the base.
        model: Weights that the adapter was trained on, in NF4 or full precision.
        plan: Plan of the pruned model.
        limit: The limit lambda of the correction, see `limited`.
    """

    def __init__(
        self, base: Checkpoint, model: Checkpoint, plan: PruningPlan, limit: float
    ) -> None:
        self._base, self._model = base, model
        self._base_specs, self._model_specs = base.specs, model.specs
        self._plan, self._limit = plan, limit
        self._norms: dict[str, float] = {}
        self._changed = self._learnt = 0.0

    def pair(
        self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the corrected pair, or the given one if it needs no correction.

        Args:
            module: Path of the linear.
            a: A ``[r, in]``, as trained.
            b: B ``[out, r]``, as trained.
            scale: LoRA's alpha / r, or alpha / sqrt(r).

        Returns:
            A' ``[r, in]`` and B' minus the correction ``[out, r]``, in the dtypes of A and B.
        """
        new_a, new_b = orthonormal(a, b)
        learnt = squared_norm(new_b)
        self._learnt += scale**2 * learnt
        change = projected(self._differences(module), new_a) if learnt else None
        if change is None:
            return a, b
        change = limited(change / scale, new_b, self._limit)
        changed = squared_norm(change)
        self._changed += scale**2 * changed
        self._norms[module] = math.sqrt(changed / learnt)
        return new_a.to(a.dtype), (new_b - change).to(b.dtype)

    def details(self) -> dict[str, Any]:
        """Return the size of the correction relative to the trained adapter, in the Frobenius norm.

        Shows a warning if nothing was corrected.
        """
        if not self._norms:
            say(
                "warning",
                "the correction changed nothing, as the adapter was trained on the base's own "
                "weights or has a zero update; remove recover.correction",
            )
        return {
            "corrected_modules": len(self._norms),
            "correction_norm": math.sqrt(self._changed / self._learnt) if self._learnt else 0.0,
            "correction_norms": self._norms,
        }

    def _differences(self, module: str) -> Iterator[torch.Tensor]:
        """Yield ``W_0[kept] - W_E`` of a linear in float32 blocks of rows that share one buffer."""
        family, kept = self._plan.architecture, self._plan.kept(module)
        name = _weight(family.weight_name(module, self._base_specs), module, self._base)
        height, width = self._base_specs[name].shape
        rows = torch.arange(height) if kept is None or kept.axis == 1 else kept.index
        moved = _weight(family.weight_name(module, self._model_specs), module, self._model)
        whole = self._dequantized(moved)
        first = 0
        blocks = rows.split(max(1, BLOCK_ELEMENTS // width))
        columns = width if kept is None or kept.axis == 0 else len(kept.index)
        buffer = torch.empty(len(blocks[0]), columns)
        for block in blocks:
            last = first + len(block)
            ours = self._base.read_rows(name, block)
            if kept is not None and kept.axis == 1:
                ours = ours.index_select(1, kept.index)
            theirs = (
                self._model.read_rows(moved, torch.arange(first, last))
                if whole is None
                else whole[first:last]
            )
            yield buffer[: len(block)].copy_(ours).sub_(theirs)
            first = last

    def _dequantized(self, name: str) -> torch.Tensor | None:
        """Return a quantised weight, dequantised as in training; None if it is not quantised."""
        from loram_ray.models.nf4 import dequantize_weight

        if not any(form.state_of(name) in self._model_specs for form in READABLE):
            return None
        parts = (stem for stem in self._model_specs if stem == name or stem.startswith(f"{name}."))
        return dequantize_weight({p.removeprefix(name): self._model.read(p) for p in parts})


def _weight(name: str | None, module: str, checkpoint: Checkpoint) -> str:
    if name is None:
        raise LoramError(
            f"the adapter adapts {module}, which {checkpoint.directory} does not have; check the "
            "base"
        )
    return name
