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
from loram_ray.commands import COMMAND_OF
from loram_ray.config import load_command
from loram_ray.stages.run import plan_steps

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
        "evaluate": {"data": str(data), "precision": "fp32", "cpus_per_worker": 2},
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
def test_a_comparison_and_a_run_of_one_file_do_each_stage_once(
    base: Path, tmp_path: Path, embedded_ray: None
) -> None:
    raw = settings(base, tmp_path, tmp_path / "run", merge=None)
    data = str(tmp_path / "data.jsonl")
    raw["evaluate"].update(exact_match=True, max_new_tokens=4)
    raw["compare"] = {
        "systems": ["base", "pruned", "unaligned", "loram", "full"],
        "tasks": {"sums": {"data": data, "held_out": data}},
    }
    config = lr.RunConfig.model_validate(raw)
    compared = lr.compare(config.compare, config.ray)
    assert not compared.failed
    rows = {row["system"]: row for row in compared.rows}
    assert list(rows) == ["base", "full", "pruned", "unaligned", "loram"]
    assert all(math.isfinite(row["mean"]) for row in rows.values())
    assert rows["full"]["mean"] < rows["base"]["mean"]
    assert rows["loram"]["model_parameters"] < rows["full"]["model_parameters"]
    assert rows["loram"]["trained_parameters"] < rows["full"]["trained_parameters"]
    assert rows["base"]["trained_parameters"] is None
    before = hashes(tmp_path / "run")
    assert {"pruned", "aligned", "adapter_pruned", "adapter"} <= {Path(n).parts[0] for n in before}
    result = lr.run(config)
    assert all(stage["skipped"] for stage in result.stages.values())
    assert hashes(tmp_path / "run") == before
    [row] = result.rows
    assert (row["name"], row["answer_perplexity"]) == ("LoRAM", rows["loram"]["mean"])
    assert {"exact_match": row["exact_match"]} == rows["loram"]["other_scores"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == result.rows
    page = lr.report(tmp_path / "run").read_text()
    assert "LoRAM without alignment" in page and "exact match" in page


def test_without_alignment_the_pruned_model_is_what_is_trained(base: Path, tmp_path: Path) -> None:
    raw = settings(base, tmp_path, tmp_path / "run")
    del raw["align"]
    steps = plan_steps(lr.RunConfig.model_validate(raw))
    assert [step.name for step in steps] == ["prune", "train", "recover", "merge", "evaluate"]
    assert steps[1].config.model == tmp_path / "run" / "pruned"  # type: ignore[attr-defined]


def test_a_run_file_with_baselines_names_the_command_that_compares(
    base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(base, tmp_path, tmp_path / "run", baselines=True)))
    command = COMMAND_OF["train"]
    for load in (lambda: lr.load_run(file), lambda: load_command(command, file)):
        with pytest.raises(lr.LoramError, match="baselines must .* loram compare --config") as e:
            load()
        assert len(str(e.value).splitlines()) == 1
    with pytest.warns(FutureWarning, match="baselines was removed from run files; remove it"):
        lr.load_run(file, ["baselines=false"])


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
