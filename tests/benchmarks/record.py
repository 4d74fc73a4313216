"""Record the results of a command in ``records/``, for the documents.

    make demo && python tests/benchmarks/record.py demo runs/demo/results.json

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

COMMANDS = {"demo": "make demo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=COMMANDS, help="the record")
    parser.add_argument("results", type=Path, help="results.json of the run")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.results.read_text())
    record = {
        "command": COMMANDS[arguments.name],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "found": {"rows": results["rows"]},
    }
    path = RECORDS / f"{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
