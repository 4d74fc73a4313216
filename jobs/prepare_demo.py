"""Make the inputs of the demo from installed packages; no hub is needed.

    python jobs/prepare_demo.py --output runs/demo/inputs

Writes ``base/`` (SmolLM2-135M-Instruct) and the data of `loram_ray.demo`. What exists already is
kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loram_ray.demo import write_inputs
from loram_ray.errors import LoramError


def main() -> None:
    """Write the inputs that do not exist yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to fill")
    parser.add_argument("--task", default="chain_sum", help="reasoning-gym task to fine-tune on")
    arguments = parser.parse_args()
    try:
        write_inputs(arguments.output, arguments.task)
    except LoramError as error:
        print(f"prepare_demo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"demo inputs: {arguments.output}")


if __name__ == "__main__":
    main()
