"""Expand a sweep's configuration into trials: all combinations, or random draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from loram_ray.config import (
    RangeConfig,
    SweepConfig,
    TrainConfig,
    merge_settings,
    named,
    validate,
    with_values,
)
from loram_ray.errors import LoramError
from loram_ray.utils.names import first_clash, output_name_error

ADAPTER, WORK, SUMMARY_FILE = "adapter", "work", "summary.json"
"""Entries of a trial's directory; the last one marks it complete."""

_DIGITS = 3
_DRAWS_EACH = 100
"""Maximum number of draws per trial in search of a new combination."""


@dataclass(frozen=True)
class Trial:
    """Training to try.

    Attributes:
        name: Name of its directory.
        model: Name of its model; empty if there is only one.
        values: Tried values by dotted key.
        train: Training configuration.
    """

    name: str
    model: str
    values: dict[str, Any]
    train: TrainConfig


def trials_of(config: SweepConfig, models: Mapping[str, Path]) -> list[Trial]:
    """Return the trials of a sweep; equal configurations give equal trials.

    Args:
        config: Configuration of the sweep.
        models: Directories of the models to try, by name.

    Raises:
        LoramError: If training settings are invalid, no examples are held out, or names are invalid
            or not distinct.
    """
    found = [
        _trial(config, model, directory, values)
        for (model, directory), values in _combinations(config, models)
    ]
    if not found[0].train.evaluates:
        raise LoramError(
            "sweep.train must hold out examples to compare trials by; add eval_data or eval_share, "
            "e.g. 0.1"
        )
    for trial in found:
        if (fault := output_name_error(trial.name)) is not None:
            raise LoramError(
                f"sweep must have values whose trial names are {fault}, got {trial.name!r:.80}; "
                "rename the model or change the values"
            )
    if (clash := first_clash(trial.name for trial in found)) is not None:
        raise LoramError(
            f"sweep must have values with distinct trial names, got {clash[0]} and {clash[1]}; "
            "rename the files that they refer to"
        )
    grace, steps = config.grace_steps or 1, found[0].train.steps
    if grace > steps:
        raise LoramError(
            f"sweep.grace_steps must be at most train.steps = {steps}, got {grace}; change one"
        )
    return found


def _combinations(
    config: SweepConfig, models: Mapping[str, Path]
) -> Iterator[tuple[tuple[str, Path], dict[str, Any]]]:
    each = itertools.product(models.items(), *config.grid.values())
    every = [(model, dict(zip(config.grid, values, strict=True))) for model, *values in each]
    if config.trials is None or (not config.ranges and config.trials >= len(every)):
        yield from every
        return
    random = numpy.random.default_rng(config.seed)
    if not config.ranges:
        yield from (every[i] for i in sorted(random.permutation(len(every))[: config.trials]))
        return
    seen: list[object] = []
    for _ in range(config.trials * _DRAWS_EACH):
        model, values = every[random.integers(len(every))]
        drawn = values | {key: _draw(rule, random) for key, rule in config.ranges.items()}
        if (model, drawn) not in seen:
            seen.append((model, drawn))
            yield model, drawn
        if len(seen) == config.trials:
            return


def _draw(rule: RangeConfig, random: numpy.random.Generator) -> int | float:
    """Draw a number from a range, rounded such that the trial's name shows it in full."""
    whole = isinstance(rule.low, int) and isinstance(rule.high, int)
    least, greatest = rule.low, rule.high + whole  # integers have equal probability
    if rule.log:
        drawn = math.exp(random.uniform(math.log(least), math.log(greatest)))
    else:
        drawn = random.uniform(least, greatest)
    if whole:
        return int(min(drawn, rule.high))
    return min(max(float(f"{drawn:.{_DIGITS}g}"), float(rule.low)), float(rule.high))


def _trial(config: SweepConfig, model: str, directory: Path, values: dict[str, Any]) -> Trial:
    name = named(model, values)
    settings = merge_settings(
        with_values(config.train, values),
        {
            "model": directory,
            "output": config.output / name,
            "data": config.data,
            "cpus": config.cpus_per_worker,
            "gpus": config.gpus_per_worker,
            "max_failures": config.max_failures,
        },
    )
    train: TrainConfig = validate(TrainConfig, settings, f"sweep ({name})")
    return Trial(name, model, values, train)
