"""Collect the results in a directory, finished or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loram_ray.artifacts.manifest import MANIFEST_FILE, Manifest, read_manifest
from loram_ray.artifacts.stage_directory import StageDirectory
from loram_ray.errors import LoramError
from loram_ray.reporting.rows import Kind, read_claims, read_rows
from loram_ray.runtime.progress import METRICS_FILE, read_metrics
from loram_ray.runtime.results import RESULTS_FILE
from loram_ray.studies.claims import CLAIMS_FILE
from loram_ray.utils.names import is_plain

_DEEPEST = 6
_OF_MERGED_MODELS = ("evaluate", "export")
"""Stages that also accept a merged model, whose fingerprint differs from the base's."""


@dataclass(frozen=True)
class Stage:
    """A complete stage.

    Attributes:
        name: Path of the stage's directory, relative to the report's.
        directory: Full path of the stage's directory.
        manifest: Manifest of the stage.
    """

    name: str
    directory: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        """Total size of the stage's files."""
        return sum(file["bytes"] for file in self.manifest.files.values())

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Metrics by step; empty for stages without steps."""
        return read_metrics(self.directory / METRICS_FILE)


@dataclass(frozen=True)
class UnfinishedStage:
    """An unfinished stage.

    Attributes:
        name: Path of the stage's future directory, relative to the report's.
        metrics: Metrics of the steps so far.
    """

    name: str
    metrics: list[dict[str, Any]]


@dataclass
class Results:
    """Results of one command on one base model.

    Attributes:
        root: Directory of the results.
        kind: Kind of the command that wrote them.
        stages: Complete stages, oldest first.
        unfinished: Unfinished stages.
        rows: Rows of ``results.json``; in the directory of a run, those of its comparison if any.
        claims: Claims of a comparison.
        finished: Whether ``results.json`` exists.
    """

    root: Path
    kind: Kind
    stages: list[Stage] = field(default_factory=list)
    unfinished: list[UnfinishedStage] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    @cached_property
    def metrics_of_tasks(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Names and metrics of a batch's tasks; empty for other kinds."""
        return list(self._metrics_of_tasks()) if self.kind == "batch" else []

    def _metrics_of_tasks(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for row in self.rows:
            if not is_plain(row["name"]):
                continue
            for folder in ("adapter_pruned", "adapter"):
                output = self.root / row["name"] / folder
                paths = (output / METRICS_FILE, StageDirectory(output).work / METRICS_FILE)
                if (path := next((p for p in paths if p.exists()), None)) is not None:
                    yield row["name"], read_metrics(path)
                    break


def collect_results(root: Path) -> Results:
    """Collect the results in a directory.

    Raises:
        LoramError: The directory has no results of this package, or those of several bases.
    """
    if not root.is_dir():
        raise LoramError(f"DIRECTORY must be an existing directory, got {root}; check the path")
    written = _comparison_of(root) or root
    rows, kind = _results(written / RESULTS_FILE)
    results = Results(root, kind or "run", rows=rows, finished=kind is not None)
    if (written / CLAIMS_FILE).exists():
        results.claims = read_claims(written / CLAIMS_FILE)
    for directory, unfinished in _directories(root, deep=0 if kind == "batch" else _DEEPEST):
        name = str(directory.relative_to(root))
        if unfinished:
            results.unfinished.append(
                UnfinishedStage(_without_work(name), read_metrics(directory / METRICS_FILE))
            )
        elif (manifest := read_manifest(directory)) is not None:
            results.stages.append(Stage(name, directory, manifest))
    results.stages.sort(key=lambda stage: stage.manifest.created)
    if not results.stages and not results.unfinished and not results.rows:
        raise LoramError(
            f"DIRECTORY must contain results of loram run, batch, sweep or compare, but {root} has "
            "none; use the output directory of one of them"
        )
    bases = {
        stage.manifest.base_fingerprint
        for stage in results.stages
        if stage.manifest.stage not in _OF_MERGED_MODELS
    } - {""}
    if len(bases) > 1 and kind != "comparison":  # a comparison may include a smaller sibling
        raise LoramError(
            f"DIRECTORY must contain results of one base, but {root} has those of {len(bases)}: "
            f"{', '.join(sorted(base[:12] for base in bases))}; report on each separately"
        )
    return results


def _comparison_of(root: Path) -> Path | None:
    """Return the directory of a run's comparison, whose rows include those of the run."""
    comparison = root / "comparison"
    return comparison if (comparison / CLAIMS_FILE).exists() else None


def _results(path: Path) -> tuple[list[dict[str, Any]], Kind | None]:
    if not path.exists():
        return [], None
    return read_rows(path)


def _directories(root: Path, deep: int) -> Iterator[tuple[Path, bool]]:
    """Yield stage directories with False, and work directories of unfinished stages with True."""
    if (root / MANIFEST_FILE).exists():
        yield root, False
    if deep == 0:
        return
    with os.scandir(root) as entries:
        inside = sorted((entry for entry in entries if entry.is_dir()), key=lambda e: e.name)
    for entry in inside:
        path = Path(entry.path)
        if entry.name.startswith("."):
            if (
                entry.name.endswith(".work")
                and not path.with_name(_without_work(path.name)).exists()
            ):
                yield path, True
            continue
        yield from _directories(path, deep - 1)


def _without_work(name: str) -> str:
    """Return the output directory of a work directory: ``a/b`` for ``a/.b.work``."""
    path = Path(name)
    return str(path.with_name(path.name.removeprefix(".").removesuffix(".work")))
