"""Recovery after non-structured pruning: to a dense delta, or to a LoRA by truncated SVD."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from loram_ray.artifacts.adapter import ADAPTER_FILE, CONFIG_FILE, Adapter
from loram_ray.artifacts.adapter_names import tensor_name
from loram_ray.artifacts.stage_directory import StageDirectory, require_space
from loram_ray.artifacts.tensorfile import CheckpointWriter, TensorSpec, TensorWriter
from loram_ray.config import RecoverConfig
from loram_ray.errors import LoramError
from loram_ray.plan import PruningPlan
from loram_ray.recovery.deltas import DELTA
from loram_ray.recovery.experts import adapted_experts
from loram_ray.recovery.scatter import dense_delta, squared_norm, truncated
from loram_ray.runtime.progress import Reporter, say


def write_delta(
    target: StageDirectory, adapter: Adapter, plan: PruningPlan, shapes: dict[str, tuple[int, int]]
) -> None:
    """Write ``scale * (B A) * M`` of each adapted linear in float32, with one in memory at a time.

    Args:
        target: Output directory of the stage.
        adapter: Adapter trained with the plan's masks.
        plan: Plan of the pruned model.
        shapes: Shape ``[out, in]`` of each adapted linear, by module path.
    """
    specs = {f"{m}.weight": TensorSpec(shape, torch.float32) for m, shape in shapes.items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    require_space(target.path, nbytes)
    with (
        Reporter("recover", total=nbytes, unit="B") as reporter,
        CheckpointWriter(target.path, specs, stem=DELTA) as writer,
    ):
        for module in shapes:
            delta = _delta(adapter, module, plan)
            writer.write(f"{module}.weight", delta)
            reporter.advance(delta.nbytes)
    target.hashes.update(writer.hashes)
    target.details.update(modules=len(shapes), bytes=nbytes)


def write_truncated(
    target: StageDirectory,
    adapter: Adapter,
    plan: PruningPlan,
    shapes: dict[str, tuple[int, int]],
    config: RecoverConfig,
) -> None:
    """Write a plain PEFT LoRA whose products are the closest to the masked ones.

    LoRA's scale is folded into the matrices, and each module's alpha equals its rank. Linears
    without a mask keep their matrices. The manifest records the relative error in the Frobenius
    norm, per masked module and in total.

    Args:
        target: Output directory of the stage.
        adapter: Adapter trained with the plan's masks.
        plan: Plan of the pruned model.
        shapes: Shape ``[out, in]`` of each adapted linear, by module path.
        config: Configuration of the stage.

    Raises:
        LoramError: If experts have different ranks, which PEFT cannot load on fused experts.
    """
    ranks = {m: _rank(adapter, m, plan, shape, config) for m, shape in shapes.items()}
    settings = _peft_config(adapter, ranks, plan, config)
    specs = _lora_specs(adapter, ranks, shapes)
    require_space(target.path, sum(spec.nbytes for spec in specs.values()))
    error = _SvdError()
    writer = TensorWriter(target.path / ADAPTER_FILE, specs)
    try:
        with Reporter("recover", total=len(shapes), unit="linear") as reporter:
            for module in shapes:
                if _is_masked(module, plan):
                    delta = _delta(adapter, module, plan)
                    dtype = specs[tensor_name(module, "A")].dtype
                    a, b, missed = truncated(delta, ranks[module], dtype)
                    error.add(module, missed, squared_norm(delta))
                else:
                    a = adapter.read(module, "A")
                    b = adapter.read(module, "B") * adapter.scale(module)
                for side, matrix in (("A", a), ("B", b)):
                    name = tensor_name(module, side)
                    writer.write(name, matrix.to(specs[name].dtype))
                reporter.advance(1)
        target.hashes[ADAPTER_FILE] = writer.finish()
    except BaseException:
        writer.abort()
        raise
    (target.path / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    target.details.update(modules=len(shapes), svd_error=error.total, svd_errors=error.by_module)
    if error.total > config.max_svd_error:
        say(
            "warning",
            f"the recovered adapter has a relative error of {error.total:.1%}, above "
            f"recover.max_svd_error = {config.max_svd_error:.1%}; raise recover.svd_rank, or set "
            "recover.form to delta, which is exact, and merge",
        )


class _SvdError:
    """Relative error of truncation in the Frobenius norm.

    Attributes:
        by_module: Error of each masked module.
    """

    def __init__(self) -> None:
        self.by_module: dict[str, float] = {}
        self._missed = self._size = 0.0

    def add(self, module: str, missed: float, size: float) -> None:
        """Add a module, given the squared norms of what truncation loses and of the whole."""
        self.by_module[module] = math.sqrt(missed / size) if size else 0.0
        self._missed, self._size = self._missed + missed, self._size + size

    @property
    def total(self) -> float:
        """Error of all modules together."""
        return math.sqrt(self._missed / self._size) if self._size else 0.0


def _is_masked(module: str, plan: PruningPlan) -> bool:
    return plan.masks is not None and module in plan.masks.shapes


def _lora_specs(
    adapter: Adapter, ranks: dict[str, int], shapes: dict[str, tuple[int, int]]
) -> dict[str, TensorSpec]:
    specs = {}
    for module, (rows, columns) in shapes.items():
        dtype = adapter.specs[tensor_name(module, "A")].dtype
        specs[tensor_name(module, "A")] = TensorSpec((ranks[module], columns), dtype)
        specs[tensor_name(module, "B")] = TensorSpec((rows, ranks[module]), dtype)
    return specs


def _delta(adapter: Adapter, module: str, plan: PruningPlan) -> torch.Tensor:
    a, b = (adapter.read(module, side) for side in "AB")
    return dense_delta(a, b, adapter.scale(module), plan.mask(module))


def _rank(
    adapter: Adapter,
    module: str,
    plan: PruningPlan,
    shape: tuple[int, int],
    config: RecoverConfig,
) -> int:
    if not _is_masked(module, plan):
        return adapter.rank(module)
    return min(config.svd_rank or adapter.rank(module), *shape)


def _peft_config(
    adapter: Adapter, ranks: dict[str, int], plan: PruningPlan, config: RecoverConfig
) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter in which each module's alpha equals its rank."""
    experts = adapted_experts(adapter, plan.architecture)
    of_experts = sorted({ranks[module] for module in experts})
    if len(of_experts) > 1:
        raise LoramError(
            "recover.svd_rank must give all experts the same rank, as the base fuses them, got "
            f"{of_experts}; set it to the adapter's rank, or set recover.form to delta"
        )
    rank = of_experts[0] if of_experts else max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        **adapter.config,
        # PEFT rejects dropout on fused experts; inference has none
        **({"lora_dropout": 0.0} if experts else {}),
        "base_model_name_or_path": config.base,
        "inference_mode": True,
        "auto_mapping": None,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
    }
