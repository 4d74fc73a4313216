"""Options and output that the commands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loram_ray.utils.printing import PlainConsole

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Run file: YAML with one section per command."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the run file, e.g. --set train.lora.r=16. Can be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def help_text(text: str) -> str:
    """Return help as typer takes it: the terminal wraps the lines of a paragraph."""
    return escape("\n\n".join(" ".join(part.split()) for part in text.split("\n\n")))


def console(width: int) -> PlainConsole:
    """Return a console for standard output, as wide as the terminal or ``width`` characters."""
    return PlainConsole(width=None if sys.stdout.isatty() else width)


def print_json(value: object) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=1, default=str))


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """Print the results of a batch's tasks."""
    table = Table(title="Tasks")
    for key in ("name", "state", "steps", "loss", "held-out loss", "seconds"):
        table.add_column(key, justify="left" if key in ("name", "state") else "right")
    table.add_column("adapter or error", overflow="fold")
    for row in rows:
        loss, held_out, seconds = (row[key] for key in ("loss", "eval_loss", "seconds"))
        table.add_row(
            row["name"],
            row["state"],
            "" if row["steps"] is None else str(row["steps"]),
            "" if loss is None else f"{loss:.3f}",
            "" if held_out is None else f"{held_out:.3f}",
            "" if seconds is None else f"{seconds:.0f}",
            row["adapter"] or row["reason"],
        )
    console(140).print(table)


def print_trials(rows: list[dict[str, Any]]) -> None:
    """Print the results of a sweep's trials, the best first."""
    judged = any(row["base_loss"] is not None for row in rows)
    table = Table(title="Trials")
    table.add_column("name", overflow="fold")
    table.add_column("state")
    for key in ("steps", "held-out loss", *(["on the base"] if judged else []), "trained"):
        table.add_column(key, justify="right")
    table.add_column("")

    def place(row: dict[str, Any]) -> tuple[object, ...]:
        losses = (row["base_loss"], row["eval_loss"])
        return (not row["best"], row["state"], *(float("inf") if x is None else x for x in losses))

    for row in sorted(rows, key=place):
        losses = [row["eval_loss"], *([row["base_loss"]] if judged else [])]
        table.add_row(
            row["name"],
            row["state"],
            str(row["steps"]),
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
            _millions(row["trained_parameters"]),
            "best" if row["best"] else row["reason"],
        )
    console(140).print(table)


def print_scores(scores: dict[str, Any]) -> None:
    """Print an evaluation's scores, each with its standard error."""
    table = Table(title="Scores")
    table.add_column("of")
    table.add_column("score")
    for key in ("value", "standard error"):
        table.add_column(key, justify="right")
    for key, value in scores.items():
        if not key.endswith("_stderr"):
            of, _, name = key.rpartition("/")
            error = scores.get(f"{key}_stderr")
            table.add_row(
                of,
                name.replace("_", " "),
                f"{value:,}" if isinstance(value, int) else f"{value:,.4f}",
                "" if error is None else f"{error:.4f}",
            )
    console(120).print(table)


def print_systems(rows: list[dict[str, Any]], claims: list[dict[str, Any]]) -> None:
    """Print a comparison's systems and the results of its claims."""
    from loram_ray.studies.comparison_table import difference_of, table_of

    table = Table(title="Systems")
    head, cells = table_of(rows)
    for key in head:
        left = key in ("system", "method", "task")
        table.add_column(key, justify="left" if left else "right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    shown = console(140)
    shown.print(table)
    table = Table(title="Claims")
    for key in ("claim", "method", "ratio", "", "advantage"):
        table.add_column(key)
    for claim in claims:
        ratio = "" if claim["ratio"] is None else f"{claim['ratio']:g}"
        table.add_row(claim["claim"], claim["method"], ratio, claim["seen"], difference_of(claim))
    shown.print(table)


def print_run(rows: list[dict[str, Any]]) -> None:
    """Print the scores of a run."""
    from loram_ray.stages.run import MAIN_SCORES

    measured = [key for key in MAIN_SCORES if key in rows[0]]
    table = Table(title="Held-out data")
    table.add_column("model")
    for key in (*measured, "trained", "against parameters", "bytes", "training"):
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            *(f"{row[key]:.1%}" if key == "exact_match" else f"{row[key]:.3f}" for key in measured),
            _millions(row["trained_parameters"]),
            _millions(row["model_parameters"]),
            f"{row['model_bytes'] / 1e6:,.0f} MB",
            "" if row["train_seconds"] is None else f"{row['train_seconds']:.0f} s",
        )
    console(140).print(table)


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} M"
