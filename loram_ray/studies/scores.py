"""Store the individual scores of a comparison, to be combined with those of other seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loram_ray.artifacts.manifest import write_json
from loram_ray.errors import LoramError
from loram_ray.stages.run import MAIN_SCORES
from loram_ray.studies.steps import Cell
from loram_ray.utils.parsing import read_json

SCORES_FILE = "scores.json"
# Summation order on another machine changes a score by far less, different data by far more.
_SAME = 1e-3


class Score(BaseModel):
    """Score of one system on one task with one seed.

    Attributes:
        system: Name of the system, with ``+ correction`` if corrected.
        method: Pruning method with its pattern; None if nothing is pruned.
        ratio: Pruning ratio.
        task: Name of the task.
        seed: Random seed; None if there is no randomness.
        value: Value of the comparison's metric.
        other_scores: Other main scores of the same evaluation, by name.
        trained_parameters: Parameters of the adapter, if one is trained.
        model_parameters: Parameters of the model trained on, or of the model scored if none is
            trained.
        model_bytes: Bytes of that model.
        train_seconds: Duration of the training, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str
    method: str | None = None
    ratio: float | None = None
    task: str
    seed: int | None = None
    value: float
    other_scores: dict[str, float] = {}
    trained_parameters: int | None = None
    model_parameters: int
    model_bytes: int
    train_seconds: float | None = None

    @property
    def of(self) -> tuple[Any, ...]:
        """Key that identifies the score."""
        return self.system, self.method, self.ratio, self.task, self.seed

    def __str__(self) -> str:
        words = (self.system, self.method, self.ratio, f"on {self.task}")
        text = " ".join(str(word) for word in words if word is not None)
        return text if self.seed is None else f"{text}, seed {self.seed}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metric: str
    scores: list[Score]


def scores_of(
    cells: Sequence[Cell], done: Mapping[str, dict[str, Any]], metric: str
) -> list[Score]:
    """Return the scores of the given cells.

    Args:
        cells: Cells that were scored.
        done: Manifest details of each completed step.
        metric: Metric of the comparison.
    """
    scores = []
    for cell in cells:
        details = done[cell.evaluation]
        others = {name: details[name] for name in MAIN_SCORES if name in details}
        others.pop(metric, None)
        training = done[cell.training] if cell.training else {}
        scores.append(
            Score(
                system=cell.system,
                method=cell.method,
                ratio=cell.ratio,
                task=cell.task,
                seed=cell.seed,
                value=details[metric],
                other_scores=others,
                trained_parameters=training.get("trained_parameters"),
                model_parameters=training.get("model_parameters", details["model_parameters"]),
                model_bytes=training.get("model_bytes", details["model_bytes"]),
                train_seconds=training.get("seconds"),
            )
        )
    return scores


def write_scores(path: Path, scores: Sequence[Score], metric: str) -> None:
    """Write scores as JSON."""
    write_json(path, _File(metric=metric, scores=list(scores)).model_dump())


def read_scores(paths: Sequence[Path], metric: str, cells: Sequence[Cell]) -> list[Score]:
    """Read the scores of comparisons with other seeds.

    Args:
        paths: Files written by `write_scores`.
        metric: Metric that the scores must have.
        cells: Cells of this comparison, which the files must not repeat.

    Raises:
        LoramError: If a file cannot be read, has another metric, or repeats a score.
    """
    read: list[Score] = []
    taken = {(c.system, c.method, c.ratio, c.task, c.seed) for c in cells if c.seed is not None}
    for path in paths:
        for score in _read(path, metric):
            if score.of in taken:
                raise LoramError(
                    f"compare.merge_scores must have other seeds, but {path} also has {score}; "
                    "remove the file or the seed"
                )
            if score.seed is not None:
                taken.add(score.of)
            read.append(score)
    return read


def with_others(scores: Sequence[Score], others: Sequence[Score]) -> list[Score]:
    """Add the scores of comparisons with other seeds, on the same base and tasks.

    Args:
        scores: Scores of this comparison.
        others: Scores returned by `read_scores`.

    Raises:
        LoramError: If scores without randomness differ, which means another base or other tasks.
    """
    found = {score.of: score for score in scores}
    for score in others:
        known = found.setdefault(score.of, score)
        if not math.isclose(known.value, score.value, rel_tol=_SAME):
            raise LoramError(
                f"compare.merge_scores must be for the same base and tasks, but {score} has "
                f"{score.value:.6g} there and {known.value:.6g} here; remove the file"
            )
    return list(found.values())


def _read(path: Path, metric: str) -> list[Score]:
    try:
        data: object = read_json(path, "compare.merge_scores", remedy="remove it", constants=True)
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LoramError(
            f"compare.merge_scores must be {SCORES_FILE} files of comparisons, got {path} "
            f"({where}: {first['msg']}); remove it"
        ) from error
    if file.metric != metric:
        raise LoramError(
            f"compare.merge_scores must contain scores of {metric}, but {path} has {file.metric}; "
            "remove it or change compare.metric"
        )
    return file.scores
