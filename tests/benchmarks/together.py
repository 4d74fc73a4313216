"""K adapters on one copy of a pruned model, in one forward, against K trainings one after another.

    python tests/benchmarks/together.py FOLDER
    python tests/benchmarks/together.py FOLDER --quantized --adapters 2 4 8
    python tests/benchmarks/together.py FOLDER --quick

SmolLM2-135M pruned at 0.65, a reasoning-gym task of its own for each adapter. Both ways train the
same: each adapter has its seed, data and optimiser. Each is measured in a process of its own once
the model is loaded, in rounds in which the two take turns: examples per second of trainings from
their first line to their last, with tokenising, checkpoints and the adapters' files, of which the
ratio is the median of the rounds', and the process's peak memory. What K actors need is K times the
peak of one training; how fast they are where cores are shared is that of trainings one after
another, at best.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from batching import TASKS, write_tasks
from inputs import write_inputs

import loram_ray as lr
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.lockstep import Lockstep
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.runtime.memory import peak_memory_gb


def settings_of(folder: Path, number: int, options: argparse.Namespace) -> lr.TrainConfig:
    return lr.TrainConfig.model_validate(
        {
            "model": folder / ("quantized" if options.quantized else "pruned"),
            "output": folder / "unused",
            "data": str(folder / "tasks" / f"{TASKS[number]}.jsonl"),
            "lora": {"r": 8, "dropout": 0.0},
            "steps": options.steps,
            "batch_size": options.batch,
            "micro_batch_size": options.batch,
            "max_length": 512,
            "max_bad_share": 1.0,
            "packing": True,
            "precision": "fp32",
            "seed": number,
            "checkpoint_every": options.steps,
        }
    )


def work(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train in this process, and tell how fast and with how much memory."""
    count, at_a_time = options.adapters[0], options.together
    settings = [settings_of(folder, number, options) for number in range(count)]
    together = Lockstep(lambda: FrozenModel.load(settings[0])) if at_a_time else None
    frozen = together.frozen if together else FrozenModel.load(settings[0])
    folders = [folder / "scratch" / str(number) for number in range(count)]
    shutil.rmtree(folder / "scratch", ignore_errors=True)

    def train(number: int) -> None:
        target = folders[number]
        (target / "work").mkdir(parents=True)
        (target / "adapter").mkdir()
        train_adapter(settings[number], target / "work", target / "adapter", frozen, together)

    started = time.perf_counter()
    if at_a_time:
        threads = [threading.Thread(target=train, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for number in range(count):
            train(number)
    seconds = time.perf_counter() - started
    missing = [
        number for number in range(count) if not any((folders[number] / "adapter").iterdir())
    ]
    assert not missing, missing
    examples = count * options.batch * options.steps
    return {"examples_per_s": examples / seconds, "memory_gb": peak_memory_gb()}


def run(folder: Path, options: argparse.Namespace, count: int, together: bool) -> dict[str, float]:
    line = [sys.executable, __file__, str(folder), "--work", "--adapters", str(count)]
    line += ["--steps", str(options.steps), "--batch", str(options.batch)]
    line += ["--together"] * together + ["--quantized"] * options.quantized
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="examples of an adapter's step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantized", action="store_true", help="in NF4")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all run?")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.work:
        print(json.dumps(work(folder, options)))
        return
    write_inputs(folder, options.quick)
    write_tasks(folder / "tasks")
    if options.quantized:
        config = lr.QuantizeConfig(model=folder / "pruned", output=folder / "quantized")
        lr.quantize(config)
    one = run(folder, options, 1, together=False)
    rows: list[dict[str, Any]] = []
    for count in options.adapters:
        rounds = [
            [run(folder, options, count, together) for together in (False, True)]
            for _ in range(options.rounds)
        ]
        ratios = [joined["examples_per_s"] / apart["examples_per_s"] for apart, joined in rounds]
        apart, joined = (
            {key: statistics.median(way[key] for way in ways) for key in ways[0]}
            for ways in zip(*rounds, strict=True)
        )
        row = {
            "adapters": count,
            "apart": apart,
            "together": joined,
            "speed": statistics.median(ratios),
            "speeds": ratios,
            "memory": joined["memory_gb"] / (count * one["memory_gb"]),
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    print(json.dumps({"quantized": options.quantized, "batch": options.batch, "rows": rows}))


if __name__ == "__main__":
    main()
