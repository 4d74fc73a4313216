"""Steps of a comparison, and the sharing of those that are stages of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loram_ray.commands import COMMAND_OF
from loram_ray.config import Section, validate

_FREE = {"output", "cache_dir"}
"""Keys in which a step may differ from a stage of the run: only paths to write to."""


@dataclass(frozen=True)
class Step:
    """Stage of a comparison.

    Attributes:
        name: Path of its output below the comparison's, unless it is a stage of the run.
        config: Configuration of the stage.
        needs: Names of the steps whose outputs it reads.
    """

    name: str
    config: Section
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """Score to compute for one system.

    Attributes:
        system: Name of the system, with ``+ correction`` if corrected.
        task: Name of the task.
        seed: Random seed; None if there is no randomness.
        evaluation: Name of the step that computes the score.
        method: Pruning method with its pattern; None if nothing is pruned.
        ratio: Pruning ratio.
        training: Name of the step that trains the adapter, if any.
    """

    system: str
    task: str
    seed: int | None
    evaluation: str
    method: str | None = None
    ratio: float | None = None
    training: str | None = None


@dataclass
class Comparison:
    """Steps and cells of a comparison.

    Attributes:
        steps: Steps by name, each after those it needs.
        cells: Scores to compute.
    """

    steps: dict[str, Step] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def add(self, name: str, config: Section, *needs: str) -> str:
        """Add a step and return its name."""
        self.steps[name] = Step(name, config, needs)
        return name


def share_stages(steps: dict[str, Step], run: Mapping[str, Mapping[str, Any]]) -> None:
    """Give each step that is a stage of a run the run's directory, so that both do it once.

    Args:
        steps: Steps by name, each after those it needs; replaced where they change.
        run: Sections of the run by name, with their paths.
    """
    stages = [validate(COMMAND_OF[name].model, run[name], f"compare.run.{name}") for name in run]
    places: dict[str, Path] = {}
    for name, step in steps.items():
        config = _moved(step.config, places)
        own = next((stage for stage in stages if _is_same(config, stage)), None)
        if own is not None:
            places[str(config.output)] = own.output
            config = config.model_copy(update={"output": own.output})
        steps[name] = replace(step, config=config)


def _moved(config: Any, places: Mapping[str, Path]) -> Any:
    """Return a section that reads its inputs from their new places."""
    inputs = {key: value for key, value in config if str(value) in places}
    moved = {key: type(value)(places[str(value)]) for key, value in inputs.items()}
    return config.model_copy(update=moved)


def _is_same(config: Section, stage: Section) -> bool:
    same = type(config) is type(stage)
    return same and config.model_dump(exclude=_FREE) == stage.model_dump(exclude=_FREE)
