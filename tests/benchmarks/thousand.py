"""A batch of a thousand real, tiny tasks: the driver's memory, and seconds that a task costs it.

    python tests/benchmarks/thousand.py FOLDER
    python tests/benchmarks/thousand.py FOLDER --tasks 100

Each task is one step of a tiny model, trained and recovered: what is measured is the batch around
it. Memory is that of this process alone, the driver, when the first tasks have ended and at the
end; seconds are of the wall clock, on two actors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import loram_ray as lr
    from helpers import tiny
    from loram_ray.studies import batch as batching

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=1000)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    base, pruned = folder / "base", folder / "pruned"
    if not base.exists():
        tiny.write_base(base)
        lr.prune(lr.PruneConfig(base=str(base), output=pruned, ratio=0.5, layers=(1, 3)))
    (folder / "tasks").mkdir(exist_ok=True)
    for number in range(options.tasks):
        tiny.write_jsonl(folder / "tasks" / f"{number:05}.jsonl", tiny.questions(8))
    shutil.rmtree(folder / "batch", ignore_errors=True)
    config = lr.BatchConfig.model_validate(
        {
            "model": pruned,
            "base": str(base),
            "output": folder / "batch",
            "workers": 2,
            "tasks": [{"data": f"{folder}/tasks/*.jsonl"}],
            "train": {
                "lora": {"r": 2, "dropout": 0.0},
                "steps": 1,
                "batch_size": 4,
                "max_length": 64,
                "precision": "fp32",
            },
        }
    )
    driver = psutil.Process()
    seen: list[tuple[int, float, float]] = []
    shown = batching._Progress.ended

    def ended(progress: Any, outcome: Any) -> None:
        shown(progress, outcome)
        seen.append((len(seen) + 1, time.perf_counter(), driver.memory_info().rss / 1e6))

    batching._Progress.ended = ended  # type: ignore[method-assign]
    rows = lr.batch(config, lr.RayConfig(num_cpus=4)).rows
    states = {state: sum(row["state"] == state for row in rows) for state in ("done", "failed")}
    tenth = max(len(seen) // 10, 1)
    started = time.perf_counter()
    page = lr.report(folder / "batch")
    written = {"seconds": time.perf_counter() - started, "mb": page.stat().st_size / 1e6}
    print(
        json.dumps(
            {
                "report": written,
                "tasks": states,
                "seconds_a_task": (seen[-1][1] - seen[0][1]) / (len(seen) - 1),
                "memory_mb": {str(count): round(mb) for count, _, mb in seen[::tenth]},
                "last_mb": round(seen[-1][2]),
                "kb_a_task": (seen[-1][2] - seen[tenth][2]) / (len(seen) - tenth) * 1000,
            }
        )
    )


if __name__ == "__main__":
    main()
