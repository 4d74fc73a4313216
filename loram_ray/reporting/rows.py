"""Read and validate the rows of ``results.json`` and ``claims.json`` for a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from loram_ray.errors import LoramError
from loram_ray.utils.parsing import read_json

Kind = Literal["run", "batch", "sweep", "comparison"]
_Number = float | int | None


class _Row(BaseModel):
    """Keys that a report uses, with their types; other keys are kept unchecked."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _OfRun(_Row):
    name: str
    model_parameters: int
    model_bytes: int
    train_seconds: _Number
    answer_perplexity: float | int = 0
    text_perplexity: float | int = 0
    exact_match: float | int = 0


class _OfBatch(_Row):
    name: str
    state: str
    reason: str
    deaths: int
    steps: int | None
    loss: _Number
    eval_loss: _Number
    seconds: _Number


class _OfSweep(_Row):
    name: str
    state: str
    reason: str
    values: dict[str, Any]
    best: bool
    steps: int
    eval_loss: _Number
    base_loss: _Number


class _OfComparison(_Row):
    system: str
    method: str | None
    ratio: _Number
    task: str
    seeds: int
    metric: str | None
    mean: _Number
    deviation: _Number
    gain_kept: _Number
    gain_kept_deviation: _Number
    other_scores: dict[str, float | int] = {}
    trained_parameters: int | None = None
    model_parameters: int | None
    model_bytes: int | None = None
    reason: str


class _OfClaims(_Row):
    claim: str
    paper: bool
    method: str | None
    ratio: _Number
    seen: str
    difference: _Number
    interval: _Number
    pairs: int


_ROWS: dict[Kind, type[_Row]] = {
    "run": _OfRun, "batch": _OfBatch, "sweep": _OfSweep, "comparison": _OfComparison,
}  # fmt: skip


def read_rows(path: Path) -> tuple[list[dict[str, Any]], Kind]:
    """Read the rows of ``results.json`` and determine which command wrote it.

    Raises:
        LoramError: The file cannot be read or is invalid.
    """
    written = _read(path)
    if isinstance(written, dict):
        return _checked(path, written.get("rows", []), _OfRun), "run"
    first = written[0] if isinstance(written, list) and written else {}
    keys = first.keys() if isinstance(first, dict) else ()
    kind: Kind = "comparison" if "system" in keys else "sweep" if "values" in keys else "batch"
    return _checked(path, written, _ROWS[kind]), kind


def read_claims(path: Path) -> list[dict[str, Any]]:
    """Read ``claims.json``.

    Raises:
        LoramError: The file cannot be read or is invalid.
    """
    return _checked(path, _read(path), _OfClaims)


def _read(path: Path) -> Any:
    # constants such as Infinity, as diverged trainings have infinite losses
    return read_json(
        path, kind=object, remedy="run the command that wrote it again", constants=True
    )


def _checked(path: Path, rows: Any, kind: type[_Row]) -> list[dict[str, Any]]:
    try:
        TypeAdapter(list[kind]).validate_python(rows)  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise _invalid(path, f"{where}: {first['msg']}") from error
    except RecursionError as error:
        raise _invalid(path, "it is nested too deeply") from error
    return list(rows)


def _invalid(path: Path, reason: str) -> LoramError:
    return LoramError(f"{path} is not valid ({reason:.200}); run the command that wrote it again")
