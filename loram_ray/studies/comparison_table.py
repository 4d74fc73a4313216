"""Format a comparison as Markdown and as table cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loram_ray.runtime.results import markdown_table

NAMES = {
    "base": "full base, untouched",
    "full": "LoRA on the full base",
    "sibling": "LoRA on a smaller sibling",
    "pruned": "pruned model, as it is",
    "small": "trained and used on the pruned model",
    "unaligned": "LoRAM without alignment",
    "loram": "LoRAM",
    "causal": "LoRAM, aligned as in the paper",
    "distilled": "LoRAM, aligned by distillation",
    "qloram": "QLoRAM",
}
CLAIM_COLUMNS = ("claim", "whose", "method", "ratio", "result", "advantage", "pairs")
COLUMNS = ("system", "method", "ratio", "task", "score", "gain kept", "seeds", "parameters")
"""Columns of every comparison; see `table_of`."""


def name_of(system: str) -> str:
    """Return the display name of a system."""
    name, _, more = system.partition(" ")
    return f"{NAMES.get(name) or f'LoRAM, alignment {name}'} {more}".strip()


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the head and the cells of a comparison's table.

    To `COLUMNS` it adds the other scores, the trained parameters and the bytes, where rows have
    them. The column of the score is named after the metric.
    """
    others = dict.fromkeys(_words(name) for row in rows for name in row.get("other_scores") or {})
    columns = [*COLUMNS[:5], *others, *COLUMNS[5:7]]
    columns += ["trained"] if any(row.get("trained_parameters") for row in rows) else []
    columns += [*COLUMNS[7:], *(["bytes"] if any(row.get("model_bytes") for row in rows) else [])]
    metric = next((_words(row["metric"]) for row in rows if row.get("metric")), "score")
    head = [metric if column == "score" else column for column in columns]
    return head, [cells_of(row, columns) for row in rows]


def cells_of(row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> tuple[str, ...]:
    """Return a row as text, for the given columns."""
    cells = {
        "system": name_of(row["system"]),
        "method": row["method"] or "",
        "ratio": "" if row["ratio"] is None else f"{row['ratio']:g}",
        "task": row["task"],
        "score": row["reason"] or _with_deviation(row["mean"], row["deviation"], ".4g"),
        "gain kept": _with_deviation(row["gain_kept"], row["gain_kept_deviation"], ".1%"),
        "seeds": str(row["seeds"]),
        "trained": _millions(row.get("trained_parameters"), 2),
        "parameters": _millions(row["model_parameters"], 1),
        "bytes": f"{row['model_bytes'] / 1e6:,.0f} MB" if row.get("model_bytes") else "",
    }
    for name, value in (row.get("other_scores") or {}).items():
        cells[_words(name)] = f"{value:.4g}" if name.endswith("perplexity") else f"{value:.1%}"
    return tuple(cells.get(column, "") for column in columns)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _millions(count: int | None, digits: int) -> str:
    return "" if count is None else f"{count / 1e6:,.{digits}f} M"


def cells_of_claim(claim: dict[str, Any]) -> tuple[str, ...]:
    """Return a claim as text, for `CLAIM_COLUMNS`."""
    return (
        claim["claim"],
        "the paper's" if claim["paper"] else "ours",
        claim["method"] or "",
        "" if claim["ratio"] is None else f"{claim['ratio']:g}",
        claim["seen"],
        difference_of(claim),
        str(claim["pairs"]),
    )


def difference_of(claim: dict[str, Any]) -> str:
    """Return a claim's difference with its interval."""
    return _with_deviation(claim["difference"], claim["interval"], "+.4f")


def _with_deviation(mean: float | None, deviation: float | None, form: str) -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form.lstrip('+')}}")


def as_markdown(
    rows: Sequence[dict[str, Any]], claims: Sequence[dict[str, Any]], metric: str
) -> str:
    """Return the Markdown page of a comparison.

    Args:
        rows: Rows of `compare`.
        claims: Claims of `compare`.
        metric: Metric of the comparison.
    """
    unit = "log-perplexity" if metric.endswith("perplexity") else metric
    parts = [
        "# Comparison\n",
        f"Scores are {metric.replace('_', ' ')}: mean ± standard deviation over seeds. *Gain "
        "kept* is a system's gain over the untouched base as a share of the gain of LoRA on the "
        f"full base, in {unit}.\n",
        markdown_table(*table_of(rows)),
        "\n## Claims\n",
        f"The better system's advantage in {unit}, over pairs of task and seed: mean ± half-width "
        "of its 95% interval (Student's t). Noise is the variation between seeds within a task, "
        "or between tasks if there is only one seed. *Seen*: the interval is above zero; *not "
        "seen*: below; *within noise*: it contains zero; *one pair*: the noise is unknown.\n",
        markdown_table(CLAIM_COLUMNS, map(cells_of_claim, claims), bold="result"),
    ]
    return "\n".join(parts) + "\n"
