"""The share of an alignment in which its workers wait for data or stand still for a checkpoint.

And the share of the checkpoints' time that is hidden: they are copied while training goes on.

    python tests/benchmarks/standstill.py FOLDER
    python tests/benchmarks/standstill.py FOLDER --quick

SmolLM2-135M pruned at 0.65, two workers of one thread, ZeRO-1; the first worker's own clock, from
``metrics.jsonl``. The first step is left out: it waits for the first block of the corpus. A share
is null where the metrics do not say.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from inputs import read_metrics, write_inputs
from measure import in_fresh_process

import loram_ray as lr

STEPS, EVERY, BATCH, LENGTH, MICRO_BATCH = 24, 8, 8, 256, 2
QUICK = {"steps": 6, "every": 2, "length": 32}


def work(folder: Path, steps: int, every: int, length: int) -> dict[str, Any]:
    """Align once and add up the metrics."""
    config = lr.AlignConfig.model_validate(
        {
            "pruned": folder / "pruned",
            "output": folder / "aligned",
            "corpus": {
                "sources": [{"path": str(folder / "text.jsonl")}],
                "sequence_length": length,
            },
            "objective": "causal_lm",
            "steps": steps,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "workers": 2,
            "checkpoint_every": every,
        }
    )
    lines = read_metrics(lr.align(config, lr.RayConfig(num_cpus=6)).output)[1:]
    training = sum(BATCH * length / line["tokens_per_s"] for line in lines)
    waited, stood = total(lines, "data_s"), total(lines, "checkpoint_s")
    copied = total(lines, "copy_s")
    whole = training + (stood or 0.0)
    return {
        "steps": len(lines),
        "training_seconds": training,
        "data_seconds": waited,
        "data_share": None if waited is None else waited / training,
        "checkpoints": sum(1 for line in lines if line.get("checkpoint_s")),
        "checkpoint_seconds": stood,
        "checkpoint_share": None if stood is None else stood / whole,
        "copy_seconds": copied,
        "hidden_share": copied / (copied + stood) if copied and stood else None,
    }


def total(lines: list[dict[str, Any]], key: str) -> float | None:
    """Sum of a metric, None where no line has it."""
    values = [line.get(key) for line in lines]
    known = [float(value) for value in values if value is not None]
    return sum(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between checkpoints")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--work", action="store_true", help="in the process that is measured")
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    folder = options.folder.resolve()
    if options.work:
        print(json.dumps(work(folder, options.steps, options.every, options.length)))
        return
    write_inputs(folder, options.quick)
    sizes = ("--steps", "--every", "--length")
    values = (options.steps, options.every, options.length)
    arguments = [text for pair in zip(sizes, map(str, values), strict=True) for text in pair]
    print(json.dumps(in_fresh_process(Path(__file__), str(folder), *arguments, "--work")))


if __name__ == "__main__":
    main()
