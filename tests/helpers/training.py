"""Small trainings, in this process and in others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import loram_ray as lr
from loram_ray.artifacts.adapter import ADAPTER_FILE
from loram_ray.corpus.examples import Example
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.runtime.progress import METRICS_FILE

STEPS, BATCH, LR = 6, 4, 5e-3


def config(model: Path, data: Path, output: Path, **changes: object) -> lr.TrainConfig:
    settings = {
        "model": model,
        "output": output,
        "data": str(data),
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": 2,
        "max_length": 64,
        "optimiser": {"learning_rate": LR, "warmup_steps": 2},
        "precision": "fp32",
        "checkpoint_every": 2,
        **changes,
    }
    return lr.TrainConfig.model_validate(settings)


def metrics(directory: Path, key: str) -> list[float]:
    lines = (directory / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def run_directly(settings: lr.TrainConfig, folder: Path) -> Path:
    """Train as the actor does, in this process."""
    (folder / "work").mkdir(parents=True)
    (folder / "adapter").mkdir()
    train_adapter(settings, folder / "work", folder / "adapter")
    return folder


def as_row(example: Example) -> dict[str, list[int]]:
    [(begin, _)] = example.learnt
    return {
        "input_ids": example.input_ids,
        "labels": [-100] * begin + example.input_ids[begin:],
    }


def plain_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    """Train on the same batch with plain torch; return the loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, 2, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def started(settings: lr.TrainConfig, folder: Path) -> subprocess.Popen[bytes]:
    """Start a training in a separate process, in a folder's ``work`` and ``adapter``."""
    code = (
        "import sys; from pathlib import Path; import loram_ray as lr;"
        "from loram_ray.finetuning.trainer import train_adapter;"
        "config = lr.TrainConfig.model_validate_json(sys.argv[1]);"
        "train_adapter(config, Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    arguments = [settings.model_dump_json(), str(folder / "work"), str(folder / "adapter")]
    return subprocess.Popen([sys.executable, "-c", code, *arguments])


def wait_for_steps(path: Path, steps: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {steps} lines")


def difference(found: Path, expected: Path) -> float:
    """Return the norm of two adapters' difference, relative to the norm of the learnt B."""
    left, right = load_file(found / ADAPTER_FILE), load_file(expected / ADAPTER_FILE)
    assert left.keys() == right.keys()
    learnt = sum(float(right[name].square().sum()) for name in right if "lora_B" in name)
    return (sum(float((left[n] - right[n]).square().sum()) for n in right) / learnt) ** 0.5


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / ADAPTER_FILE)


def lines(folder: Path, key: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "work" / METRICS_FILE).read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if key in row]


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in lines(folder, "loss")]
