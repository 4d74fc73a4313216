"""Results table of many trainings, as JSON, Parquet and Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loram_ray.artifacts.manifest import write_json
from loram_ray.errors import LoramError, shown
from loram_ray.utils.parsing import read_json
from loram_ray.utils.printing import markdown, plain

RESULTS_FILE, TABLE_FILE = "results.json", "results.parquet"


def write_results(
    directory: Path, rows: Sequence[dict[str, Any]], columns: dict[str, pa.DataType]
) -> None:
    """Write rows to ``results.json`` and ``results.parquet``, each atomically.

    Args:
        directory: Existing directory to write to.
        rows: One row per training; nested dictionaries become columns with dotted names.
        columns: Names and types of the Parquet columns.
    """
    rows = [{k: plain(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    write_json(directory / RESULTS_FILE, rows)
    schema = pa.schema(list(columns.items()))
    partial = directory / f".{TABLE_FILE}.{os.getpid()}"
    pq.write_table(pa.Table.from_pylist([_flat(row) for row in rows], schema=schema), partial)
    partial.replace(directory / TABLE_FILE)


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of a directory's ``results.json``.

    Raises:
        LoramError: The file cannot be read.
    """
    return read_rows(directory / RESULTS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file that holds a list of objects.

    Raises:
        LoramError: The file cannot be read, or holds anything else.
    """
    remedy = "run the command that wrote it again"
    rows: list[Any] = read_json(path, kind=list, remedy=remedy, constants=True)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise LoramError(f"{path}: {number} must be a JSON object, got {shown(row)}; {remedy}")
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": nested for inner, nested in value.items()}
        else:
            flat[key] = value
    return {key: plain(v) if isinstance(v, str) else v for key, v in flat.items()}


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], bold: str | None = None
) -> str:
    """Format a Markdown table, with markup in cells escaped.

    Args:
        head: Names of the columns.
        rows: Rows of cells.
        bold: Name of a column to print in bold.
    """
    shown = [
        [
            f"**{markdown(cell)}**" if name == bold else markdown(cell)
            for name, cell in zip(head, row, strict=True)
        ]
        for row in rows
    ]
    lines = [list(map(markdown, head)), ["---"] * len(head), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
