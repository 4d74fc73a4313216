import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loram_ray as lr
from helpers import tiny
from loram_ray.stages.run import loram_keeps, plan_steps

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pruning_plan.safetensors")


def settings(base: Path, folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    text = folder / "text.jsonl"
    if not data.exists():
        tiny.write_jsonl(data, tiny.questions())
        tiny.write_jsonl(text, tiny.texts())
    optimiser = {"learning_rate": 3e-3, "warmup_steps": 1}
    return {
        "base": str(base),
        "output": str(output),
        "ray": {"num_cpus": 6},
        "prune": {"ratio": 0.5, "layers": [1, 3]},
        "align": {
            "corpus": {"sources": [{"path": str(text)}], "sequence_length": 32},
            "steps": 8,
            "batch_size": 4,
            "micro_batch_size": 2,
            "workers": 2,
            "precision": "fp32",
            "checkpoint_every": 2,
            "optimiser": optimiser,
        },
        "train": {
            "data": str(data),
            "steps": 8,
            "batch_size": 4,
            "precision": "fp32",
            "checkpoint_every": 2,
            "optimiser": optimiser,
            "cpus": 2,
        },
        "recover": {},
        "merge": {},
        "evaluate": {"data": str(data), "precision": "fp32", "cpus": 2},
        **changes,
    }


def hashes(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.name in WEIGHTS and not any(part.startswith(".") for part in path.parts[1:])
    }


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_compares_every_way_and_a_second_run_skips_all(
    base: Path, tmp_path: Path, embedded_ray: None
) -> None:
    exact = {"data": str(tmp_path / "data.jsonl"), "exact_match": True, "max_new_tokens": 4}
    raw = settings(base, tmp_path, tmp_path / "run", baselines=True)
    raw["evaluate"].update(exact)
    config = lr.RunConfig.model_validate(raw)
    result = lr.run(config)
    assert [row["name"] for row in result.rows] == [
        "full base, untouched",
        "pruned model, as it is",
        "LoRAM without alignment",
        "LoRAM",
        "LoRA on the full base",
    ]
    rows = {row["name"]: row for row in result.rows}
    assert all(math.isfinite(row["answer_perplexity"]) for row in result.rows)
    untouched, full = rows["full base, untouched"], rows["LoRA on the full base"]
    assert full["answer_perplexity"] < untouched["answer_perplexity"]
    assert rows["LoRAM"]["model_parameters"] < full["model_parameters"]
    assert rows["LoRAM"]["trained_parameters"] < full["trained_parameters"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == result.rows
    before = hashes(tmp_path / "run")
    again = lr.run(config)
    assert all(stage["skipped"] for stage in again.stages.values())
    assert hashes(tmp_path / "run") == before
    assert [row["answer_perplexity"] for row in again.rows] == [
        row["answer_perplexity"] for row in result.rows
    ]


def test_gain_kept_is_the_share_of_full_loras_gain_in_log_perplexity() -> None:
    rows = [
        {"name": "full base, untouched", "answer_perplexity": math.e**2},
        {"name": "LoRAM", "answer_perplexity": math.e**1.25},
        {"name": "LoRA on the full base", "answer_perplexity": math.e**1},
    ]
    assert loram_keeps(rows) == pytest.approx(0.75)
    assert loram_keeps(rows[:2]) is None


def test_without_alignment_the_pruned_model_is_what_is_trained(base: Path, tmp_path: Path) -> None:
    raw = settings(base, tmp_path, tmp_path / "run", baselines=True)
    del raw["align"]
    steps, rows = plan_steps(lr.RunConfig.model_validate(raw))
    assert [step.name for step in steps][:4] == ["prune", "train", "recover", "merge"]
    assert steps[1].config.model == tmp_path / "run" / "pruned"  # type: ignore[attr-defined]
    assert "LoRAM without alignment" not in [row.name for row in rows]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    base = tiny.write_base(
        tmp_path / "base",
        hidden=512,
        head_dim=64,
        intermediate=2048,
        dtype=torch.float32,
        layers=4,
    )
    reference = settings(base, tmp_path, tmp_path / "reference")
    assert loram_run(reference, tmp_path / "reference.yaml").wait() == 0
    raw = settings(base, tmp_path, tmp_path / "killed")
    output = tmp_path / "killed"
    moments = {
        "pruned": lambda: some_bytes(output / ".pruned.partial"),
        "aligned_corpus": lambda: some_bytes(output / ".aligned_corpus.work"),
        "aligned": lambda: lines(output / ".aligned.work" / "metrics.jsonl") >= 5,
        "adapter_pruned": lambda: lines(output / ".adapter_pruned.work" / "metrics.jsonl") >= 5,
        "adapter": lambda: some_bytes(output / ".adapter.partial"),
        "merged": lambda: some_bytes(output / ".merged.partial"),
        "evaluation/loram": lambda: (output / "evaluation" / ".loram.work").exists(),
    }
    complete: dict[str, int] = {}
    for stage, reached in moments.items():
        process = loram_run(raw, tmp_path / "killed.yaml")
        while not reached():
            assert process.poll() is None, f"the run ended before {stage} could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (output / stage).exists()
        for name, inode in complete.items():  # what was complete before was not made again
            assert (output / name).stat().st_ino == inode
        complete = {
            name: (output / name).stat().st_ino for name in moments if (output / name).exists()
        }
    assert loram_run(raw, tmp_path / "killed.yaml").wait() == 0
    assert hashes(output) == hashes(tmp_path / "reference")
    ours, theirs = (
        json.loads((folder / "evaluation" / "loram" / "scores.json").read_text())
        for folder in (output, tmp_path / "reference")
    )
    assert ours["answer_perplexity"] == theirs["answer_perplexity"]
    left = [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert left == []


def loram_run(raw: dict[str, Any], path: Path) -> subprocess.Popen[bytes]:
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "loram_ray.cli", "run", "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ.copy())


def some_bytes(directory: Path) -> bool:
    try:
        return any(entry.stat().st_size > 0 for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        return False


def lines(path: Path) -> int:
    time.sleep(0.005)
    return path.read_text().count("\n") if path.exists() else 0
