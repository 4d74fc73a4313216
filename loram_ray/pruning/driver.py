"""Scores or pruned weights from a configuration: the inputs that each criterion needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from loram_ray.config import PruneConfig, RayConfig
from loram_ray.errors import LoramError
from loram_ray.models.base import BaseModel
from loram_ray.pruning.calibration import Calibration, save_sparsified, share_out
from loram_ray.pruning.criteria import (
    SCORES,
    CalibratedLinear,
    Evidence,
    LayerScores,
    TaylorForm,
    layer_linears,
    score_layer,
)
from loram_ray.pruning.pool import ray_pool
from loram_ray.pruning.random_scores import random_scores
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.sparsify import sparsify_linear
from loram_ray.pruning.statistics import SquaredNorms
from loram_ray.pruning.text import KEY, calibration_sequences
from loram_ray.pruning.worker import TOKENS_FILE, CalibrationSpec
from loram_ray.runtime.progress import Reporter


def structured_scores(
    config: PruneConfig,
    base: BaseModel,
    layers: tuple[int, int],
    work: Path,
    ray_config: RayConfig,
) -> dict[int, LayerScores]:
    """Score every unit of the pruned layers by the configured criterion.

    Args:
        config: Configuration of the stage.
        base: Model to prune.
        layers: Pruned layers, as ``(first, end)`` with ``end`` excluded.
        work: Directory for files that survive an interruption.
        ray_config: Settings of Ray for the calibration workers.
    """
    criterion = config.criterion
    if criterion.name not in SCORES:
        return random_scores(base.family.units, base.geometry, layers, config.seed)
    if criterion.gradients:
        passes = 2 * base.geometry.num_layers - layers[0]
        with _calibration(config, base, layers, work, ray_config, passes) as calibration:
            return calibration.score_taylor(TaylorForm(config.taylor))
    if criterion.calibrates:
        with _calibration(config, base, layers, work, ray_config, layers[1]) as calibration:
            return calibration.score_forward(criterion.name)
    return {layer: _scores_of_weights(base, layer, criterion.name) for layer in range(*layers)}


def sparsify_weights(
    config: PruneConfig,
    base: BaseModel,
    layers: tuple[int, int],
    ratios: dict[int, float],
    norms: dict[str, torch.Tensor] | None,
    work: Path,
    ray_config: RayConfig,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Prune the weights of every linear of the pruned layers, into each `sparsified_file`.

    Args:
        config: Configuration of the stage.
        base: Model to prune.
        layers: Pruned layers, as ``(first, end)`` with ``end`` excluded.
        ratios: Share of zeros of each pruned layer.
        norms: Wanda's squared input norms of an earlier calibration, or None.
        work: Directory for files that survive an interruption.
        ray_config: Settings of Ray for the calibration workers.

    Returns:
        SparseGPT's relative error and Wanda's squared input norms, by module path; either may be
        empty.
    """
    pattern = Pattern.parse(config.pattern)
    if not config.criterion.calibrates or norms is not None:
        _sparsify_without_calibration(config, base, ratios, pattern, norms or {}, work)
        return {}, norms or {}
    with _calibration(config, base, layers, work, ray_config, layers[1]) as calibration:
        errors = calibration.sparsify(config.method, ratios, pattern, config.damping)
        return errors, calibration.input_norms()


def _scores_of_weights(base: BaseModel, layer: int, criterion: str) -> LayerScores:
    """Score a layer's units by a criterion that needs the weights alone."""

    def per_index(entry: CalibratedLinear) -> torch.Tensor:
        evidence = Evidence(partial(base.weight, entry.module), entry.linear.axis)
        return SCORES[criterion](evidence)

    linears = layer_linears(base.family, base.geometry, layer)
    return score_layer(linears, base.geometry, per_index)


def _sparsify_without_calibration(
    config: PruneConfig,
    base: BaseModel,
    ratios: dict[int, float],
    pattern: Pattern,
    norms: dict[str, torch.Tensor],
    work: Path,
) -> None:
    with Reporter("prune", total=len(ratios), unit="layer") as reporter:
        for layer, ratio in ratios.items():
            solved = {}
            for entry in layer_linears(base.family, base.geometry, layer):
                name = entry.module
                inputs = SquaredNorms(norms[name]) if name in norms else None
                weight = base.weight(name)
                solved[name] = sparsify_linear(
                    weight, config.method, inputs, ratio, pattern, config.damping, name
                )
            save_sparsified(work, layer, solved)
            reporter.advance(1)


@contextmanager
def _calibration(
    config: PruneConfig,
    base: BaseModel,
    layers: tuple[int, int],
    work: Path,
    ray_config: RayConfig,
    passes: int,
) -> Iterator[Calibration]:
    """Start workers and yield a calibration of the base.

    Args:
        config: Configuration of the stage.
        base: Model to prune.
        layers: Pruned layers, as ``(first, end)`` with ``end`` excluded.
        work: Directory for files that survive an interruption.
        ray_config: Settings of Ray for the workers.
        passes: Total number of layer passes, for the progress display.
    """
    calibration = config.calibration
    assert calibration is not None
    if base.positions is not None and calibration.sequence_length > base.positions:
        raise LoramError(
            f"{KEY}.sequence_length must be at most {base.positions} (the base's context length), "
            f"got {calibration.sequence_length}; lower it"
        )
    work = work.resolve()
    tokens = work / TOKENS_FILE
    sequences = calibration_sequences(calibration, base.directory, config.seed)
    save_file({"token_ids": sequences}, tokens)
    spec = CalibrationSpec(
        base=base.directory.resolve(),
        model_type=base.family.model_type,
        work=work,
        precision=calibration.precision,
        batch_size=calibration.batch_size,
        shares=share_out(len(sequences), calibration.shares),
    )
    with (
        ray_pool(spec, calibration, ray_config) as pool,
        Reporter("prune", total=passes, unit="layer") as reporter,
    ):
        yield Calibration(spec, pool, base.checkpoint, base.family, base.geometry, layers, reporter)
