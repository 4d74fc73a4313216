"""Tasks of a batch, and separate trainings of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers import tiny
from helpers.training import run_directly
from loram_ray.artifacts.adapter import ADAPTER_FILE

TRAIN: dict[str, Any] = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_length": 64,
    "optimiser": {"learning_rate": 5e-3, "warmup_steps": 2},
    "precision": "fp32",
    "checkpoint_every": 2,
}


def write_tasks(folder: Path, count: int) -> Path:
    """Write ``count`` files of small sums, each different."""
    folder.mkdir()
    for number in range(count):
        rows = [
            {"prompt": f"{a}+{b}+{number}=", "completion": str(a + b + number)}
            for a in range(4)
            for b in range(3)
        ]
        tiny.write_jsonl(folder / f"task{number}.jsonl", rows)
    return folder


def same(left: Path, right: Path) -> bool:
    found, expected = load_file(left / ADAPTER_FILE), load_file(right / ADAPTER_FILE)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def alone(task: Any, folder: Path) -> Path:
    """Train the task alone in this process, from the start and with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(task.train.cpus)  # other numbers of threads sum products in another order
    try:
        return run_directly(task.train, folder) / "adapter"
    finally:
        torch.set_num_threads(threads)
