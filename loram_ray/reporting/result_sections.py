"""Report sections on results: systems, claims, tasks, trials and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from loram_ray.reporting.figures import (
    Figure,
    Point,
    bars,
    dots,
    figure_of,
    histogram,
    quality,
)
from loram_ray.reporting.parts import Part, Table, duration, text
from loram_ray.reporting.results import Results
from loram_ray.studies.comparison_table import (
    CLAIM_COLUMNS,
    cells_of_claim,
    name_of,
    table_of,
)


def systems(results: Results) -> Part | None:
    """Show the systems of a run or a comparison; None without content, as for all sections."""
    if results.kind == "run":
        return _rows_of_a_run(results)
    if results.kind != "comparison" or not results.rows:
        return None
    part = Part(
        "Systems",
        "Mean ± standard deviation over seeds. Gain kept is the gain over the untouched base as a "
        "share of the gain of LoRA on the full base.",
    )
    scored = [row for row in results.rows if row["mean"] is not None]
    metric = scored[0]["metric"]
    base_parameters = max((row["model_parameters"] for row in scored), default=0)
    methods = {row["method"] for row in scored} - {None}
    shown_methods = methods if len(methods) > 1 else set()
    for task in dict.fromkeys(row["task"] for row in scored):
        points = [
            Point(
                name_of(row["system"])
                + (f", {row['method']}" if row["method"] in shown_methods else ""),
                base_parameters / row["model_parameters"],
                row["mean"],
                row["deviation"],
            )
            for row in scored
            if row["task"] == task
        ]
        label, lower = metric.replace("_", " "), metric.endswith("perplexity")
        part.figures.append(
            figure_of(
                f"quality-{task}",
                f"Quality against reduction: {task}",
                f"{label}, {'lower' if lower else 'higher'} is better; bars are one standard "
                "deviation.",
                partial(quality, points=points, label=label, is_perplexity=lower),
                size=(8.0, 4.0),
            )
        )
        kept = [
            (_short_name(row), row["gain_kept"], row["gain_kept_deviation"])
            for row in scored
            if row["task"] == task and row["gain_kept"] is not None and row["system"] != "full"
        ]
        if kept:
            part.figures.append(
                figure_of(
                    f"gain-{task}",
                    f"Gain kept: {task}",
                    "1 is the full gain of LoRA on the base, below 0 is worse than the base; bars "
                    "are cut at -1.",
                    partial(bars, rows=kept, label="gain kept", least=-1.0),
                    size=(8.0, 0.6 + 0.28 * len(kept)),
                )
            )
    part.tables.append(Table(*table_of(results.rows)))
    return part


def _short_name(row: dict[str, Any]) -> str:
    of = "" if row["method"] is None else f" ({row['method']} {row['ratio']:g})"
    return f"{name_of(row['system'])}{of}"


def _rows_of_a_run(results: Results) -> Part | None:
    if not results.rows:
        return None
    scores = [
        key for key in ("answer_perplexity", "text_perplexity", "exact_match")
        if key in results.rows[0]
    ]  # fmt: skip
    head = ["system", *(key.replace("_", " ") for key in scores), "parameters", "bytes", "training"]
    rows = [
        [
            row["name"],
            *(f"{row[key]:.3f}" for key in scores),
            f"{row['model_parameters'] / 1e6:,.1f} M",
            f"{row['model_bytes'] / 1e6:,.0f} MB",
            "" if row["train_seconds"] is None else duration(row["train_seconds"]),
        ]
        for row in results.rows
    ]
    part = Part("Systems", "All systems use the same held-out data.", tables=[Table(head, rows)])
    for key in scores:
        values = [(row["name"], row[key], row.get(f"{key}_stderr")) for row in results.rows]
        part.figures.append(_score_figure(f"systems-{key}", key, values))
    return part


def claims(results: Results) -> Part | None:
    """Show the outcome of a comparison's claims."""
    if not results.claims:
        return None
    says = (
        "Mean advantage of the better system over pairs of task and seed, ± half-width of its 95% "
        "interval."
    )
    return Part(
        "Claims",
        says,
        tables=[Table(CLAIM_COLUMNS, [cells_of_claim(claim) for claim in results.claims])],
    )


def tasks(results: Results) -> Part | None:
    """Show the outcomes of a batch's tasks."""
    if results.kind != "batch" or not results.rows:
        return None
    states = [row["state"] for row in results.rows]
    counted = ", ".join(f"{states.count(state):,} {state}" for state in dict.fromkeys(states))
    part = Part("Tasks", f"{len(states):,} tasks: {counted}.")
    for key, label in (("loss", "last training loss"), ("eval_loss", "held-out loss"),
                       ("seconds", "seconds per task")):  # fmt: skip
        values = [row[key] for row in results.rows if row[key]]
        if len(values) > 1:
            draw = partial(histogram, values=values, label=label, unit="tasks")
            part.figures.append(
                figure_of(f"tasks-{key}", label.capitalize(), f"Over {len(values):,} tasks.", draw)
            )
    head = ("task", "state", "steps", "loss", "held-out loss", "seconds", "deaths", "reason")
    part.tables.append(
        Table(
            head,
            [
                [
                    row["name"],
                    row["state"],
                    *map(text, (row["steps"], row["loss"], row["eval_loss"], row["seconds"])),
                    str(row["deaths"] or ""),
                    row["reason"],
                ]
                for row in results.rows
            ],
        )  # fmt: skip
    )
    return part


def trials(results: Results) -> Part | None:
    """Show the outcomes of a sweep's trials."""
    if results.kind != "sweep" or not results.rows:
        return None
    keys = list(results.rows[0]["values"])
    rows = [
        [
            row["name"],
            row["state"],
            *(text(row["values"][key]) for key in keys),
            *map(text, (row["steps"], row["eval_loss"], row["base_loss"])),
            "best" if row["best"] else row["reason"],
        ]
        for row in results.rows
    ]
    head = ("trial", "state", *keys, "steps", "held-out loss", "on the base", "")
    part = Part(
        "Trials", "The checkpoint with the lowest loss is kept.", tables=[Table(head, rows)]
    )
    values = [
        (row["name"], row["eval_loss"], None)
        for row in results.rows
        if row["eval_loss"] is not None
    ]
    if values:
        part.figures.append(_score_figure("trials", "held-out loss", values))
    return part


def scores(results: Results) -> Part | None:
    """Show each score of the evaluations that have it."""
    if results.kind == "comparison":
        return None
    scored = [stage for stage in results.stages if stage.manifest.stage == "evaluate"]
    by_score: dict[str, list[tuple[str, float, float | None]]] = {}
    for stage in scored:
        details = stage.manifest.details
        for key, value in details.items():
            if isinstance(value, float) and key != "seconds" and not key.endswith("_stderr"):
                error = details.get(f"{key}_stderr")
                by_score.setdefault(key, []).append((stage.name, value, error))
    for row in results.rows:  # already shown as systems
        for key in row:
            by_score.pop(key, None)
    if not by_score:
        return None
    head = ("evaluation", "score", "value", "standard error")
    rows = [
        [name, key.replace("_", " "), f"{value:,.4f}", "" if error is None else f"{error:.4f}"]
        for key, values in by_score.items()
        for name, value, error in values
    ]
    part = Part("Scores", tables=[Table(head, rows)])
    part.figures = [
        _score_figure(f"score-{number}", key, values)
        for number, (key, values) in enumerate(by_score.items())
        if all(math.isfinite(value) for _, value, _ in values)
    ]
    return part


def _score_figure(name: str, key: str, values: Sequence[tuple[str, float, float | None]]) -> Figure:
    label = key.replace("_", " ")
    size = (7.0, 0.8 + 0.3 * len(values))
    low = key.endswith(("perplexity", "loss"))
    says = f"{'Lower' if low else 'Higher'} is better" + (
        "; lines are one standard error."
        if any(error is not None for _, _, error in values)
        else "."
    )
    if key.endswith("perplexity"):
        return figure_of(
            name, label.capitalize(), says, partial(dots, rows=values, label=label), size
        )
    return figure_of(name, label.capitalize(), says, partial(bars, rows=values, label=label), size)
