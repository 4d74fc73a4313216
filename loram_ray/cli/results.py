"""Output of each finished command: a summary for people, or JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import typer

from loram_ray.cli.tables import (
    print_json,
    print_run,
    print_scores,
    print_systems,
    print_tasks,
    print_trials,
)
from loram_ray.runtime.results import read_results
from loram_ray.utils.printing import plain, show


def show_stage(name: str, result: Any, as_json: bool) -> None:
    """Print a stage's output directory and its details."""
    if as_json:
        print_json({"output": str(result.output), **asdict(result.manifest)})
        return
    _show_output(name, result)
    for key, value in result.manifest.details.items():
        shown = _spread(value) if isinstance(value, dict) and value else value
        show(f"  {key}: {shown}")


def show_scores(name: str, result: Any, as_json: bool) -> None:
    """Print an evaluation's scores as a table."""
    if as_json:
        show_stage(name, result, as_json)
        return
    print_scores(result.manifest.details)
    _show_output(name, result)


def show_tasks(name: str, result: Any, as_json: bool) -> None:
    """Print a batch's tasks; exit code 1 if some failed."""
    if as_json:
        print_json(result.rows)
    else:
        print_tasks(result.rows)
        show(f"results: {result.output}")
    if result.failed:
        _warn(f"{name}: {result.failed} of {len(result.rows)} tasks failed")
        raise typer.Exit(1)


def show_trials(name: str, result: Any, as_json: bool) -> None:
    """Print a sweep's trials, the best first."""
    rows = read_results(result.output)
    if as_json:
        print_json(rows)
        return
    print_trials(rows)
    _show_output(name, result)


def show_systems(name: str, result: Any, as_json: bool) -> None:
    """Print a comparison's systems and claims; exit code 1 if some steps failed."""
    if as_json:
        print_json({"rows": result.rows, "claims": result.claims})
    else:
        print_systems(result.rows, result.claims)
        show(f"results: {result.output}")
    for step, reason in result.failed.items():
        _warn(f"{name}: {step}: {reason}")
    if result.failed:
        raise typer.Exit(1)


def show_publication(name: str, result: Any, as_json: bool) -> None:
    """Print the address of a published repository."""
    if as_json:
        print_json(asdict(result))
        return
    show(f"{name}: {'done' if result.changed else 'unchanged, nothing uploaded'}: {result.url}")
    show(f"  commit: {result.commit}")


def show_run(name: str, result: Any, as_json: bool) -> None:
    """Print a run's scores."""
    if as_json:
        print_json({"stages": result.stages, "rows": result.rows})
        return
    if result.rows:
        print_run(result.rows)
    show(f"results: {result.output}")


def _show_output(name: str, result: Any) -> None:
    state = "already complete, skipped" if result.skipped else "done"
    show(f"{name}: {state}: {result.output}")


def _spread(values: dict[str, float]) -> str:
    """Return one line that summarises a number over many linears."""
    least, most = min(values.values()), max(values.values())
    return f"{least:.3g} to {most:.3g} ({len(values)} values, see manifest.json)"


def _warn(line: str) -> None:
    print(plain(f"loram: {line}"), file=sys.stderr)
