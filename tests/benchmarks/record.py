"""Record the results of a command in ``records/``, for the documents.

    make demo && python tests/benchmarks/record.py demo runs/demo/comparison/results.json

Run it in the checkout that ran the command, with nothing uncommitted: the record names its commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from figures import RECORDS
from measure import commit, machine

from loram_ray.studies.comparison_table import name_of

COMMANDS = {"demo": "make demo"}


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a comparison with the names of its system and of its metric."""
    sizes = ("trained_parameters", "model_parameters", "model_bytes", "train_seconds")
    scores = {row["metric"]: row["mean"], **row["other_scores"]}
    return {"name": name_of(row["system"]), **scores, **{key: row[key] for key in sizes}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=COMMANDS, help="the record")
    parser.add_argument("results", type=Path, help="results.json of the comparison")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.results.read_text())
    record = {
        "command": COMMANDS[arguments.name],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "found": {"rows": [_named(row) for row in rows]},
    }
    path = RECORDS / f"{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
