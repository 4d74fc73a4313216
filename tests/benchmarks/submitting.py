"""From `loram submit` to the first optimiser step, on a warm cluster of this machine.

    python tests/benchmarks/submitting.py FOLDER

A tiny model's training: what takes time is everything but training. Against it, in turns, the same
command without a job on the same cluster, and on a Ray of its own. A round's time is from the
start of the command to the first line of metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "cluster")]
LORAM = [sys.executable, "-m", "loram_ray.cli"]
WAYS = {
    "loram submit, warm cluster": ["submit", "train"],
    "loram train, warm cluster": ["train", "--set", "ray.address=auto"],
    "loram train, a Ray of its own": ["train"],
}


def seconds_to_first_step(arguments: list[str], folder: Path, environment: dict[str, str]) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)
    metrics = (folder / "out" / ".adapter.work" / "metrics.jsonl").resolve()
    started = time.perf_counter()
    command = subprocess.Popen(
        [*LORAM, *arguments, "--config", "run.yaml"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (metrics.exists() and metrics.stat().st_size):
        if command.poll() is not None:
            raise SystemExit(command.stderr.read() if command.stderr else "")
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if command.wait():
        raise SystemExit(command.stderr.read() if command.stderr else "")
    return seconds


def main() -> None:
    import local_cluster

    from helpers import tiny

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        tiny.write_base(folder / "base")
    tiny.write_jsonl(folder / "data.jsonl", tiny.questions())
    train = {
        "model": "base", "output": "out/adapter", "data": "data.jsonl", "cpus": 1, "steps": 30,
        "batch_size": 4, "max_length": 64, "precision": "fp32",
    }  # fmt: skip
    (folder / "run.yaml").write_text(
        yaml.safe_dump({"base": "base", "output": "out", "train": train})
    )
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with local_cluster.cluster(Path("/tmp") / f"loram-{os.getpid()}", workers=1, cpus=2) as local:
        environment = {
            **os.environ,
            **local.environment,
            "RAY_API_SERVER_ADDRESS": local.dashboard,
        }
        cluster = {**environment, "RAY_ADDRESS": f"127.0.0.1:{local.port}"}
        for number in range(options.rounds + 1):
            for way, arguments in WAYS.items():
                used = cluster if "--set" in arguments else environment
                seconds = seconds_to_first_step(arguments, folder, used)
                if number:  # the first warms the cluster up
                    found[way].append(seconds)
    result: dict[str, Any] = {
        way: {"seconds": statistics.median(each), "all": each} for way, each in found.items()
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
