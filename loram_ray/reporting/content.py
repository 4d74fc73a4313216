"""Build the content of a report from a directory's results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from loram_ray.reporting.parts import Box, Part, Report, Table, duration
from loram_ray.reporting.result_sections import claims, scores, systems, tasks, trials
from loram_ray.reporting.results import Results, Stage, UnfinishedStage
from loram_ray.reporting.training_sections import faults, kept, losses, memory, speed

_NOT_SHOWN = ("plan",)


def build_report(results: Results) -> Report:
    """Build the sections that have content."""
    parts = [
        part
        for make in (
            systems, claims, tasks, trials, scores, losses, speed, memory, kept, faults,
            _lineage,
        )
        if (part := make(results)) is not None
    ]  # fmt: skip
    state = "complete" if results.finished and not results.unfinished else "unfinished"
    if results.unfinished:
        state += f": {', '.join(map(_how_far, results.unfinished))} not yet complete"
    return Report(
        f"{results.root.resolve().name}: a {results.kind}",
        state,
        list(_facts(results)),
        [_box(stage) for stage in results.stages if stage.manifest.stage != "evaluate"]
        + [Box(stage.name, [_how_far(stage)], False) for stage in results.unfinished],
        parts,
    )


def _how_far(stage: UnfinishedStage) -> str:
    return stage.name + (f" (step {stage.metrics[-1]['step']})" if stage.metrics else "")


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    if results.stages:
        last = results.stages[-1].manifest
        yield "base", last.base_fingerprint[:16]
        yield "last changed", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last.created))
        yield "versions", ", ".join(f"{name} {number}" for name, number in last.versions.items())
    seconds = [s.manifest.details.get("seconds") for s in results.stages]
    total = sum(s for s in seconds if s is not None)
    if total:
        yield "total time of the stages", duration(total)


def _box(stage: Stage) -> Box:
    details = stage.manifest.details
    lines = [stage.manifest.stage]
    if details.get("seconds") is not None:
        lines.append(duration(details["seconds"]))
    if stage.bytes:
        lines.append(f"{stage.bytes / 1e6:,.1f} MB")
    if isinstance(details.get("parameters"), int):
        lines.append(f"{details['parameters'] / 1e6:,.1f} M parameters")
    return Box(stage.name, lines, True)


def _lineage(results: Results) -> Part | None:
    """List the settings and inputs of each stage."""
    if not results.stages:
        return None
    digests = {stage.manifest.digest: stage.name for stage in results.stages}
    rows = []
    part = Part("Configuration and lineage", "Inputs in this directory are shown by name.")
    for stage in results.stages:
        parents = [
            f"{role}: {digests.get(digest, digest[:12])}"
            for role, digest in stage.manifest.parents.items()
        ]
        rows.append([stage.name, stage.manifest.stage, ", ".join(parents)])
        shown = {
            "settings": stage.manifest.settings,
            "details": {k: v for k, v in stage.manifest.details.items() if k not in _NOT_SHOWN},
        }
        part.folded.append((stage.name, json.dumps(shown, indent=1, default=str)))
    part.tables.append(Table(("directory", "stage", "inputs"), rows))
    return part
