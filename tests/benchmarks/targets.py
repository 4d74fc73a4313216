"""What distillation costs: the base's likeliest tokens beforehand, against the base beside.

    python tests/benchmarks/targets.py FOLDER
    python tests/benchmarks/targets.py FOLDER --quick

SmolLM2-135M pruned at 0.65, one worker of one thread, fp32. Cached: tokens a second of the pass of
the base (by the actor's own clock, writing included), bytes that each token takes on disk, and
tokens a second of training. Live: tokens a second of training. Rates of training are of the median
step after the warm-up ones. A training visits each token once: its rate with the pass is ``1 / (1 /
pass + 1 / training)``. In fp32, because a CPU that has AVX2 alone multiplies in bf16 7 to 30 times
as slowly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from inputs import read_metrics, write_inputs
from measure import in_fresh_process, median

import loram_ray as lr

STEPS, BATCH, LENGTH, MICRO_BATCH, WARM = 12, 8, 256, 2, 4
CHARACTERS = 6
"""Of a token, at most, on the average of a file of prose."""
KINDS = ("8", "64", "live")
QUICK = {"steps": 4, "length": 32}


def work(folder: Path, kind: str, steps: int, length: int) -> dict[str, Any]:
    """Align once, from targets of so many tokens or live."""
    live = kind == "live"
    distillation = {"targets": "live"} if live else {"top_k": int(kind), "batch_size": MICRO_BATCH}
    config = lr.AlignConfig.model_validate(
        {
            "pruned": folder / "pruned",
            "base": str(folder / "base"),
            "output": folder / f"aligned_{kind}",
            "corpus": {
                "sources": [{"path": str(folder / "some.jsonl")}],
                "sequence_length": length,
            },
            "objective": "distillation",
            "distillation": distillation,
            "steps": steps,
            "batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "precision": "fp32",
            "checkpoint_every": steps,
        }
    )
    lines = read_metrics(lr.align(config, lr.RayConfig(num_cpus=4)).output)
    warm = min(WARM, steps // 2)
    training = median([line["tokens_per_s"] for line in lines[warm:]])
    if live:
        return {"training_tokens_per_s": training, "tokens_per_s": training}
    manifest = json.loads((folder / f"aligned_{kind}_targets" / "manifest.json").read_text())
    details = manifest["details"]
    computing = details["tokens"] / details["seconds"]
    return {
        "training_tokens_per_s": training,
        "targets_tokens_per_s": computing,
        "tokens_per_s": 1 / (1 / training + 1 / computing),
        "bytes_per_token": details["bytes_per_token"],
        "missing_probability": details["missing_probability"],
    }


def write_some(text: Path, output: Path, tokens: int) -> None:
    """Copy as many documents as have the tokens: the base passes over all of them."""
    with open(text) as documents, open(output, "w") as file:
        written = 0
        while written < CHARACTERS * tokens and (line := documents.readline()):
            written += file.write(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    folder = options.folder.resolve()
    if options.only:
        print(json.dumps(work(folder, options.only, options.steps, options.length)))
        return
    text = write_inputs(folder, options.quick).text
    write_some(text, folder / "some.jsonl", options.steps * BATCH * options.length)
    sizes = ("--steps", str(options.steps), "--length", str(options.length))
    found = {
        kind: in_fresh_process(Path(__file__), str(folder), *sizes, "--only", kind)
        for kind in KINDS
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
