"""A batch's tasks on actors against the ideal: nothing but training, on all of them, all the time.

    python tests/benchmarks/batching.py FOLDER
    python tests/benchmarks/batching.py FOLDER --actors 1 --adapters 4
    python tests/benchmarks/batching.py FOLDER --quick

Tasks of reasoning-gym on SmolLM2-135M pruned at 0.65, on actors of one thread. The ideal is the
steps of all tasks at each task's own pace, from its metrics, shared out to the actors; what it is
compared with is the time from the first step of any task to the last adapter recovered. What lies
between: tokenising, putting adapters on and taking them off, checkpoints, writing, recovery, and
an actor that waits while the other works on the last task. With several adapters an actor the
paces are those of each beside the others, so the ideal says little; compare the seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from inputs import write_inputs

import loram_ray as lr
from loram_ray.runtime.progress import METRICS_FILE

TASKS = (
    "chain_sum",
    "family_relationships",
    "letter_counting",
    "gcd",
    "number_sorting",
    "spell_backward",
    "prime_factorization",
    "calendar_arithmetic",
)
STEPS, BATCH, EXAMPLES, ACTORS = 20, 8, 200, 2


def write_tasks(folder: Path) -> None:
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        rows = reasoning_gym.create_dataset(name, size=EXAMPLES, seed=1)
        lines = (
            json.dumps({"prompt": r["question"], "completion": str(r["answer"])}) for r in rows
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def measure(folder: Path, base: Path, options: argparse.Namespace) -> dict[str, Any]:
    quick, actors = options.quick, options.actors
    output = folder / "batch"
    shutil.rmtree(output, ignore_errors=True)
    config = lr.BatchConfig.model_validate(
        {
            "model": folder / "pruned",
            "base": str(base),
            "output": output,
            "workers": actors,
            "adapters_per_worker": options.adapters,
            "cpus_per_worker": options.cpus,
            "train": {
                "lora": {"r": 8, "dropout": 0.0},
                "steps": 3 if quick else options.steps,
                "batch_size": BATCH,
                "micro_batch_size": BATCH,
                "max_length": 256,
                "max_bad_share": 1.0 if quick else 0.01,
                "packing": True,
                "precision": "fp32",
                "checkpoint_every": 10,
            },
            "tasks": [{"data": f"{folder}/tasks/*.jsonl"}],
        }
    )
    started = time.time()
    result = lr.batch(config, lr.RayConfig(num_cpus=actors * options.cpus + 2))
    ended = time.time()
    ideal, first = 0.0, ended
    for row in result.rows:
        assert row["state"] == "done", row
        trained = output / row["name"] / "adapter_pruned"
        lines = [json.loads(line) for line in (trained / METRICS_FILE).read_text().splitlines()]
        paces = [BATCH / line["examples_per_s"] for line in lines]
        ideal += sum(paces)
        manifest = json.loads((trained / "manifest.json").read_text())
        first = min(first, manifest["created"] - manifest["details"]["seconds"])
    return {
        "tasks": len(result.rows),
        "actors": actors,
        "adapters": options.adapters,
        "steps": options.steps,
        "ideal_seconds": ideal / actors,
        "durations": [row["seconds"] for row in result.rows],
        "seconds": ended - first,
        "whole_seconds": ended - started,
        "efficiency": ideal / actors / (ended - first),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a task")
    parser.add_argument("--actors", type=int, default=ACTORS)
    parser.add_argument("--adapters", type=int, default=1, help="at a time in an actor")
    parser.add_argument("--cpus", type=int, default=1, help="threads of an actor")
    options = parser.parse_args()
    folder = options.folder.resolve()
    inputs = write_inputs(folder, options.quick)
    write_tasks(folder / "tasks")
    print(json.dumps(measure(folder, inputs.base, options)))


if __name__ == "__main__":
    main()
