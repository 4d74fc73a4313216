"""Sweeps: trials compared alike, the bad ones stopped, the best adapter as if it were alone."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import loram_ray as lr
from helpers import tiny
from helpers.tasks import TRAIN, same
from helpers.training import wait_for_steps
from loram_ray.cli.main import app
from loram_ray.config import validate
from loram_ray.runtime.progress import METRICS_FILE, read_lines
from loram_ray.studies.trials import trials_of

SHARED: dict[str, Any] = {**TRAIN, "eval_share": 0.25, "evaluate_every": 2}


def run_of(base: Path, model: Path, data: Path, output: Path, /, **changes: Any) -> lr.RunConfig:
    sections = {name: changes.pop(name) for name in ("prune", "align") if name in changes}
    sweep = {
        "model": str(model),
        "data": str(data),
        "train": SHARED,
        "grid": {"lora.r": [2, 4]},
        **changes,
    }
    settings = {"base": str(base), "output": str(output), "sweep": sweep, **sections}
    found: lr.RunConfig = validate(lr.RunConfig, settings, "test")
    return found


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((output / "results.json").read_text())
    return {row["name"]: row for row in rows}


# Trials


def names(run: lr.RunConfig) -> list[str]:
    assert run.sweep is not None
    return [trial.name for trial in trials_of(run.sweep, {"": run.sweep.model})]


def test_a_grid_is_every_combination(base: Path, pruned: Path, data: Path, tmp_path: Path) -> None:
    grid = {"lora.r": [2, 4], "optimiser.learning_rate": ["1e-3", 0.01, 0.1]}
    run = run_of(base, pruned, data, tmp_path, grid=grid)
    assert run.sweep is not None
    found = trials_of(run.sweep, {"": pruned})
    assert [(t.train.lora.r, t.train.optimiser.learning_rate) for t in found] == [
        (rank, rate) for rank in (2, 4) for rate in (1e-3, 0.01, 0.1)
    ]
    assert found[0].name == "r=2-learning_rate=1e-3"
    assert {t.train.lora.alpha for t in found} == {8}  # what is not tried is shared
    some = run_of(base, pruned, data, tmp_path, grid=grid, trials=4)
    assert len(set(names(some))) == 4 and set(names(some)) < {t.name for t in found}
    assert len(names(run_of(base, pruned, data, tmp_path, grid=grid, trials=10))) == 6


def test_draws_are_in_their_ranges_and_the_same_again(
    base: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    ranges = {
        "optimiser.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "lora.r": {"low": 2, "high": 5},
    }
    settings: dict[str, Any] = {"grid": {}, "ranges": ranges, "trials": 200}
    run = run_of(base, pruned, data, tmp_path, **settings)
    assert run.sweep is not None
    found = trials_of(run.sweep, {"": pruned})
    assert names(run) == [trial.name for trial in found] and len(set(names(run))) == 200
    rates = [trial.train.optimiser.learning_rate for trial in found]
    assert 1e-5 <= min(rates) < 3e-5 and 3e-3 < max(rates) <= 1e-2
    assert 60 < sum(rate < 10**-3.5 for rate in rates) < 140  # half of the decades
    assert {trial.train.lora.r for trial in found} == {2, 3, 4, 5}
    other = run_of(base, pruned, data, tmp_path, **settings, seed=1)
    assert names(other) != names(run)
    few = run_of(
        base, pruned, data, tmp_path, grid={}, ranges={"lora.r": {"low": 2, "high": 4}}, trials=9
    )
    assert sorted(names(few)) == ["r=2", "r=3", "r=4"]  # there are no more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "grid, ranges, ratios or models must be given"),
        ({"grid": {"lora.r": []}}, "grid must have values for lora.r"),
        (
            {"grid": {"steps": [1, 2]}},
            "grid must not contain steps, as trials would not be comparable",
        ),
        (
            {"ranges": {"lora.r": {"low": 1, "high": 4}}, "trials": 2},
            "ranges must not contain lora.r",
        ),
        ({"ranges": {"seed": {"low": 1, "high": 4}}, "trials": 2}, "ranges must not contain seed"),
        ({"ranges": {"lora.alpha": {"low": 1, "high": 4}}}, "trials must be given with ranges"),
        (
            {"ranges": {"lora.alpha": {"low": 4, "high": 1}}, "trials": 2},
            "high must be above low = 4",
        ),
        (
            {"ranges": {"lora.alpha": {"low": 0, "high": 1, "log": True}}, "trials": 2},
            "low must be above 0",
        ),
        ({"train": {**SHARED, "output": "x"}}, "train must not set output"),
        ({"train": TRAIN}, "sweep.train must hold out examples"),
        ({"grace_steps": 7}, "grace_steps must be at most train.steps = 6, got 7"),
        ({"grid": {"lora.rank": [2]}}, "lora.rank is not a known key"),
        (
            {"ratios": [0.5, 0.6], "models": ["a", "b"]},
            "ratios and models must not be given together",
        ),
        ({"ratios": [0.5]}, "sweep.ratios needs the section prune"),
        ({"finalists": 2, "base": None}, "base must be given"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_runs(
    base: Path, pruned: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    before = tiny.tree(tmp_path)
    with pytest.raises(lr.LoramError, match=message):
        lr.sweep(run_of(base, pruned, data, tmp_path, **changes).sweep)
    assert tiny.tree(tmp_path) == before


# The sweep


@pytest.mark.slow
@pytest.mark.cluster
def test_the_best_adapter_is_that_of_its_own_training(
    base: Path, pruned: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    grid = {"optimiser.learning_rate": [1e-6, 5e-3], "lora.r": [2, 4]}
    run = run_of(base, pruned, data, tmp_path, grid=grid, grace_steps=6, workers=2)
    result = lr.sweep(run.sweep, run.ray)
    rows = rows_of(result.output)
    assert len(rows) == 4 and {row["state"] for row in rows.values()} == {"done"}
    best = min(rows.values(), key=lambda row: row["eval_loss"])
    assert [row["name"] for row in rows.values() if row["best"]] == [best["name"]]
    assert result.manifest.details["best"] == best["name"] and "=0.005" in best["name"]
    settings = yaml.safe_load((result.output / "best.yaml").read_text())["train"]
    trained = lr.train(lr.TrainConfig(**settings, output=tmp_path / "alone"))
    assert same(result.output / "adapter_pruned", trained.output)
    recovered = lr.recover(
        lr.RecoverConfig(adapter=trained.output, base=str(base), output=tmp_path / "recovered")
    )
    assert same(result.output / "adapter", recovered.output)
    for row in rows.values():  # each trial's loss is that of its metrics
        lines = read_lines(result.output / "trials" / f"{row['name']}.jsonl")
        assert row["eval_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    table = pq.read_table(result.output / "results.parquet").to_pylist()
    assert [row["values.lora.r"] for row in table] == [2, 4, 2, 4]
    assert lr.sweep(run.sweep, run.ray).skipped
    again = run_of(base, pruned, data, tmp_path, grid={"lora.r": [2]})
    with pytest.raises(lr.LoramError, match=r"sweep.output must be a new or empty directory"):
        lr.sweep(again.sweep, again.ray)


@pytest.mark.slow
@pytest.mark.cluster
def test_bad_trials_are_stopped_early(
    base: Path, pruned: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    """One after another, each better one first seen by a worse: what is worse ends at its rung."""
    rates = [4e-3, 5e-3, 1e-7, 1e-8]
    run = run_of(
        base, pruned, data, tmp_path, grid={"optimiser.learning_rate": rates}, cpus_per_worker=2
    )
    rows = rows_of(lr.sweep(run.sweep, run.ray).output)
    stopped = {name: row["steps"] for name, row in rows.items() if row["state"] == "stopped"}
    assert stopped == {"learning_rate=1e-07": 2, "learning_rate=1e-08": 2}
    assert all(row["eval_loss"] is not None for row in rows.values())


@pytest.mark.slow
@pytest.mark.cluster
def test_models_are_compared_on_their_base(
    base: Path, data: Path, tmp_path: Path, embedded_ray: None
) -> None:
    """Of one pruned hardly and one pruned hard, each has its best, judged where it is used."""
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.questions()[25:])
    run = run_of(
        base,
        tmp_path / "unused",
        data,
        tmp_path / "out",
        train={**TRAIN, "eval_data": str(held_out), "evaluate_every": 2},
        prune={"layers": [1, 3]},
        ratios=[0.2, 0.8],
    )
    result = lr.sweep(run.sweep, run.ray)
    rows = rows_of(result.output)
    assert set(rows) == {f"ratio={ratio}-r={rank}" for ratio in (0.2, 0.8) for rank in (2, 4)}
    judged = {name: row for name, row in rows.items() if row["base_loss"] is not None}
    assert {row["model"] for row in judged.values()} == {"ratio=0.2", "ratio=0.8"}
    assert [row["state"] for row in judged.values()] == ["done", "done"]
    best = min(judged.values(), key=lambda row: row["base_loss"])
    assert best["best"] and result.manifest.details["best"] == best["name"]
    scored = lr.evaluate(
        lr.EvaluateConfig(
            model=str(base),
            adapter=result.output / "adapter",
            data=str(held_out),
            output=tmp_path / "scores",
            precision="fp32",
        )
    )
    expected = math.log(scored.manifest.details["answer_perplexity"])
    assert best["base_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_failed_trial_harms_no_other(
    base: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    grid = {"lora.targets": [["q_proj"], ["nowhere"]]}
    file = tmp_path / "run.yaml"
    sweep = {"model": str(pruned), "data": str(data), "train": SHARED, "grid": grid}
    file.write_text(
        yaml.safe_dump({"base": str(base), "output": str(tmp_path / "out"), "sweep": sweep})
    )
    called = CliRunner().invoke(app, ["sweep", "--config", str(file)])
    assert called.exit_code == 0, called.output
    rows = rows_of(tmp_path / "out" / "sweep")
    states = {name: (row["state"], row["reason"][:18]) for name, row in rows.items()}
    assert sorted(states.values()) == [("done", ""), ("failed", "train.lora.targets")]
    assert "nowhere" in called.output and "best" in called.output
    sweep["grid"] = {"lora.targets": [["nowhere"]]}
    sweep["output"] = str(tmp_path / "none")
    file.write_text(
        yaml.safe_dump({"base": str(base), "output": str(tmp_path / "out"), "sweep": sweep})
    )
    with pytest.raises(lr.LoramError, match="no trial succeeded; .*nowhere"):
        CliRunner().invoke(app, ["sweep", "--config", str(file)], catch_exceptions=False)
    assert not (tmp_path / "none").exists()


def is_trial(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("ResourceTrainable" in part for part in process.cmdline())
    return False


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_actor_and_a_killed_driver_change_nothing(
    base: Path, pruned: Path, data: Path, tmp_path: Path
) -> None:
    """The first trial's actor dies, in the second the driver; each goes on where it was."""
    train = {**SHARED, "steps": 40, "checkpoint_every": 4, "evaluate_every": 4}
    run = run_of(
        base, pruned, data, tmp_path / "out", train=train, grid={"lora.r": [2, 4]}, grace_steps=40
    )
    assert run.sweep is not None
    file = tmp_path / "run.json"
    file.write_text(run.model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "loram_ray.cli", "sweep", "--config", str(file)]
    trials = tmp_path / "out" / ".sweep.work" / "trials"
    metrics = [trials / f"r={rank}" / "work" / METRICS_FILE for rank in (2, 4)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            family = psutil.Process(driver.pid)
            wait_for_steps(metrics[0], 15)
            actors = [p for p in family.children(recursive=True) if is_trial(p)]
            assert len(actors) == 1
            actors[0].kill()
            wait_for_steps(metrics[1], 15)
            assert (trials / "r=2" / "summary.json").exists()
        finally:
            everyone = [family, *family.children(recursive=True)]
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everyone, timeout=10)
    assert 0 < len(metrics[1].read_text().splitlines()) < 50
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    rows = rows_of(tmp_path / "out" / "sweep")
    assert {row["state"] for row in rows.values()} == {"done"}
    best = next(row for row in rows.values() if row["best"])
    settings = yaml.safe_load((tmp_path / "out" / "sweep" / "best.yaml").read_text())["train"]
    trained = lr.train(lr.TrainConfig(**settings, output=tmp_path / "alone"))
    assert same(tmp_path / "out" / "sweep" / "adapter_pruned", trained.output)
    for name in rows:  # no step twice, none missing
        lines = read_lines(tmp_path / "out" / "sweep" / "trials" / f"{name}.jsonl")
        assert [row["step"] for row in lines if "loss" in row] == list(range(1, 41))
    assert best["eval_loss"] == min(row["eval_loss"] for row in rows.values())
