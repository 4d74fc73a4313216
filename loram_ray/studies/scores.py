"""Scores of a comparison, one by one, in a file that other seeds' comparisons can be read with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loram_ray.artifacts.manifest import write_json
from loram_ray.errors import LoramError
from loram_ray.studies.systems import Cell
from loram_ray.utils.parsing import read_json

SCORES_FILE = "scores.json"
# Between two machines, sums in another order change a score by far less; other data by far more.
_SAME = 1e-3


class Score(BaseModel):
    """What one system scored on one task with one seed.

    Attributes:
        system: of the systems, perhaps with ``+ correction``.
        method: of pruning, with its pattern; None where nothing is pruned.
        ratio: of pruning.
        task: name.
        seed: of it; None where there is no randomness.
        value: the score, of the comparison's metric.
        model_parameters: of the model that is trained on, or scored where none is.
        model_bytes: of the same.
        train_seconds: of the training, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str
    method: str | None = None
    ratio: float | None = None
    task: str
    seed: int | None = None
    value: float
    model_parameters: int
    model_bytes: int
    train_seconds: float | None = None

    @property
    def of(self) -> tuple[Any, ...]:
        """What there is one score of."""
        return self.system, self.method, self.ratio, self.task, self.seed

    def __str__(self) -> str:
        words = (self.system, self.method, self.ratio, f"on {self.task}")
        said = " ".join(str(word) for word in words if word is not None)
        return said if self.seed is None else f"{said}, seed {self.seed}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metric: str
    scores: list[Score]


def scores_of(
    cells: Sequence[Cell], done: Mapping[str, dict[str, Any]], metric: str
) -> list[Score]:
    """The scores of cells.

    Args:
        cells: that were scored.
        done: what each step's manifest says.
        metric: to compare by.
    """
    scores = []
    for cell in cells:
        details = done[cell.evaluation]
        training = done[cell.training] if cell.training else {}
        scores.append(
            Score(
                system=cell.system,
                method=cell.method,
                ratio=cell.ratio,
                task=cell.task,
                seed=cell.seed,
                value=details[metric],
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
    """Read the scores of other seeds' comparisons.

    Args:
        paths: of files that `write_scores` made.
        metric: that they must be of.
        cells: of this comparison, none of which they may have.

    Raises:
        LoramError: a file cannot be read, is of another metric, or has a score of this comparison's
            or of another file's.
    """
    read: list[Score] = []
    taken = {(c.system, c.method, c.ratio, c.task, c.seed) for c in cells if c.seed is not None}
    for path in paths:
        for score in _read(path, metric):
            if score.of in taken:
                raise LoramError(
                    f"compare.others must have other seeds, {path} has {score} again; leave out "
                    "the file or the seed"
                )
            if score.seed is not None:
                taken.add(score.of)
            read.append(score)
    return read


def with_others(scores: Sequence[Score], others: Sequence[Score]) -> list[Score]:
    """Add the scores of other seeds' comparisons, of the same base and tasks.

    Args:
        scores: of this comparison.
        others: that `read_scores` read.

    Raises:
        LoramError: where there is no randomness, they score otherwise: base or tasks are others.
    """
    found = {score.of: score for score in scores}
    for score in others:
        known = found.setdefault(score.of, score)
        if not math.isclose(known.value, score.value, rel_tol=_SAME):
            raise LoramError(
                f"compare.others must be of the same base and tasks, {score} scores "
                f"{score.value:.6g} there and {known.value:.6g} here; leave them out"
            )
    return list(found.values())


def _read(path: Path, metric: str) -> list[Score]:
    try:
        data: object = read_json(path, "compare.others", remedy="leave it out", constants=True)
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LoramError(
            f"compare.others must be {SCORES_FILE} of comparisons, got {path}: {where}: "
            f"{first['msg']}; leave it out"
        ) from error
    if file.metric != metric:
        raise LoramError(
            f"compare.others must be scores of {metric}, {path} has {file.metric}; leave it out or "
            "change compare.metric"
        )
    return file.scores
