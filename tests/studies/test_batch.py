"""Many tasks on few actors: each as if it were alone, whatever becomes of the others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

import loram_ray as lr
from helpers import tiny
from helpers.tasks import TRAIN, alone, same, write_tasks
from helpers.training import config as training
from helpers.training import difference, run_directly
from loram_ray.cli.main import app
from loram_ray.config import load_run, validate
from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.trainer import train_adapter
from loram_ray.runtime.progress import METRICS_FILE
from loram_ray.runtime.schedule import Outcome, Schedule, WorkerDied, run_tasks
from loram_ray.studies.tasks import tasks_of


def settings_of(model: Path, data: Path, output: Path, **changes: object) -> lr.BatchConfig:
    settings = {
        "model": model,
        "output": output,
        "tasks": [{"data": f"{data}/*.jsonl"}],
        "train": TRAIN,
        "workers": 2,
        **changes,
    }
    return lr.BatchConfig.model_validate(settings)


# One model, training after training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pruned", "quantized"])
def test_a_model_is_as_before_after_each_training(
    kind: str, pruned: Path, data: Path, tmp_path: Path
) -> None:
    model = pruned
    if kind == "quantized":
        model = lr.quantize(lr.QuantizeConfig(model=pruned, output=tmp_path / "quantized")).output
    changes: list[dict[str, Any]] = [
        {"lora": {"r": 4, "dropout": 0.1}},
        {"lora": {"r": 2, "lm_head": True}, "activation_checkpointing": True},
        {"lora": {"r": 4, "dropout": 0.1}, "eval_data": str(data), "evaluate_every": 2},
        {"optimiser": {"learning_rate": 1e38, "warmup_steps": 0}, "steps": 10},  # it diverges
        {"lora": {"r": 4, "dropout": 0.1}},
    ]
    settings = [training(model, data, tmp_path, **change) for change in changes]
    frozen = FrozenModel.load(settings[0])
    before = {name: tensor.clone() for name, tensor in frozen.model.state_dict().items()}
    folders = []
    for number, one in enumerate(settings):
        folder = tmp_path / f"one-{number}"
        (folder / "work").mkdir(parents=True)
        (folder / "adapter").mkdir()
        folders.append(folder)
        if number == 3:
            with pytest.raises(lr.LoramError, match="the loss is"):
                train_adapter(one, folder / "work", folder / "adapter", frozen)
            continue
        train_adapter(one, folder / "work", folder / "adapter", frozen)
    after = frozen.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for number in (0, 1, 2):
        expected = run_directly(settings[number], tmp_path / f"alone-{number}")
        assert same(folders[number] / "adapter", expected / "adapter")
    assert same(folders[4] / "adapter", folders[0] / "adapter")


def test_the_last_step_is_judged_too(pruned: Path, data: Path, tmp_path: Path) -> None:
    settings = training(pruned, data, tmp_path, eval_data=str(data), evaluate_every=4)
    folder = run_directly(settings, tmp_path / "run")
    rows = [json.loads(x) for x in (folder / "work" / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]


# Configuration


def test_globs_and_grids_become_tasks(tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data", 2)
    one = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.questions(4))
    config = settings_of(
        tmp_path / "model",
        data,
        tmp_path / "out",
        tasks=[
            {"data": f"{data}/*.jsonl", "grid": {"lora.r": [2, 4], "steps": [3]}, "seed": 7},
            {"data": str(one), "name": "urgent", "priority": 1, "train": {"lora": {"alpha": 3}}},
        ],
    )
    tasks = tasks_of(config)
    assert [task.name for task in tasks] == [
        "urgent",
        "task0-r=2-steps=3",
        "task0-r=4-steps=3",
        "task1-r=2-steps=3",
        "task1-r=4-steps=3",
    ]
    urgent, first = tasks[0].train, tasks[1].train
    assert (urgent.lora.r, urgent.lora.alpha, urgent.lora.dropout, urgent.steps) == (4, 3, 0.1, 6)
    assert (first.lora.r, first.steps, first.seed, first.lora.alpha) == (2, 3, 7, 8)
    assert first.output == tmp_path / "out" / "task0-r=2-steps=3" / "adapter"
    assert urgent.data == str(one)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "batch.tasks must not be empty"),
        ({"tasks": [{"data": "none/*.jsonl"}]}, "batch.tasks.0.data must match at least one file"),
        ({"tasks": [{"data": "a.jsonl"}, {"data": "b/a.jsonl"}]}, "a occurs twice"),
        ({"tasks": [{"data": "a.jsonl", "train": {"step": 3}}]}, "step is not a known key"),
        ({"tasks": [{"data": "a.jsonl", "grid": {"lora.r": [0]}}]}, "lora.r must be greater"),
    ],
)
def test_a_batch_that_cannot_be_is_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(lr.LoramError) as caught:
        tasks_of(settings_of(tmp_path, tmp_path, tmp_path / "out", **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_are_the_batch_s(tmp_path: Path) -> None:
    with pytest.raises(lr.LoramError, match=r"tasks.0.train must not set model"):
        validate(
            lr.BatchConfig,
            {"model": "m", "output": "o", "tasks": [{"data": "d", "train": {"model": "x"}}]},
            "batch.yaml",
        )
    found = load_run(None, ["base=b", "output=o", "batch.tasks=[{data: d.jsonl}]"]).batch
    assert found is not None
    assert (found.model, found.base, found.output) == (Path("o/pruned"), "b", Path("o/batch"))


# The schedule


def test_what_a_task_raises_harms_no_other() -> None:
    deaths: dict[str, int] = {}
    order: list[str] = []

    def work(worker: int, name: str) -> Outcome:
        order.append(name)
        if name == "poison":
            raise WorkerDied("it is gone")
        if name == "unlucky" and deaths.setdefault(name, 0) < 2:
            deaths[name] += 1
            raise WorkerDied("it is gone")
        if name == "wrong":
            raise lr.LoramError("train.data must contain examples")
        if name == "broken":
            raise OSError(28, "No space left on device")
        return Outcome(name, "done")

    names = ["a", "poison", "unlucky", "wrong", "broken", "b"]
    schedule = Schedule(names, 2)
    run_tasks(schedule, 1, work, lambda outcome: None)
    found = schedule.outcomes
    assert [outcome.state for outcome in found] == [
        "done",
        "failed",
        "done",
        "failed",
        "failed",
        "done",
    ]
    assert [outcome.deaths for outcome in found] == [0, 3, 2, 0, 0, 0]
    assert found[1].reason == "its worker died 3 times (it is gone)"
    assert found[3].reason == "train.data must contain examples"
    assert found[4].reason.startswith("OSError: ") and "No space left" in found[4].reason
    assert order == ["a", *["poison"] * 3, *["unlucky"] * 3, "wrong", "broken", "b"]


def test_as_many_tasks_run_at_a_time_as_there_are_workers() -> None:
    lock, running, most = threading.Lock(), set[str](), [0]

    def work(worker: int, name: str) -> Outcome:
        with lock:
            running.add(name)
            most[0] = max(most[0], len(running))
        time.sleep(0.01)
        with lock:
            running.discard(name)
        return Outcome(name, "done")

    names = [str(number) for number in range(200)]
    ended: list[str] = []
    idle: list[int] = []
    schedule = Schedule(names, 0)
    run_tasks(schedule, 7, work, lambda o: ended.append(o.name), idle=idle.append)
    assert sorted(idle) == list(range(7))
    assert [outcome.name for outcome in schedule.outcomes] == names
    assert sorted(ended) == sorted(names)
    assert most[0] == 7


def test_a_death_among_several_is_held_against_none_of_them() -> None:
    """A poison task among innocent ones in one process, which dies with all that are in it."""
    lock, inside, most = threading.Lock(), dict[int, set[str]](), [0]
    dead: dict[str, int] = {}

    def work(worker: int, name: str) -> Outcome:
        mine = threading.Event()
        with lock:
            here = inside.setdefault(worker, set())
            here.add(name)
            most[0] = max(most[0], len(here))
        try:
            for _ in range(20):
                mine.wait(0.002)
                with lock:
                    if name == "poison":
                        for other in here:
                            dead[other] = dead.get(other, 0) + 1
                    if dead.get(name):
                        dead[name] -= 1
                        raise WorkerDied("it is gone")
            return Outcome(name, "done")
        finally:
            with lock:
                here.discard(name)
                dead.pop(name, None)

    names = ["a", "poison", *"bcdefgh"]
    schedule = Schedule(names, 2)
    run_tasks(schedule, 2, work, lambda outcome: None, tasks_per_worker=4)
    found = {outcome.name: outcome for outcome in schedule.outcomes}
    assert most[0] == 4
    assert found.pop("poison").reason == "its worker died 3 times (it is gone)"
    assert {(outcome.state, outcome.deaths) for outcome in found.values()} == {("done", 0)}


def test_tasks_that_share_a_model_want_it_loaded_alike(tmp_path: Path) -> None:
    tasks = [{"data": "a.jsonl"}, {"data": "b.jsonl", "train": {"precision": "bf16"}}]
    config = settings_of(tmp_path, tmp_path, tmp_path, tasks=tasks, adapters_per_worker=2)
    with pytest.raises(lr.LoramError, match="needs the same precision"):
        tasks_of(config)


# Batches


@pytest.mark.slow
def test_each_adapter_is_the_one_trained_alone(
    base: Path, pruned: Path, tmp_path: Path, embedded_ray: None
) -> None:
    data = write_tasks(tmp_path / "data", 2)
    tiny.write_jsonl(data / "bad.jsonl", [{"prompt": "no answer"}])
    config = settings_of(pruned, data, tmp_path / "out", base=str(base), workers=1)
    file = tmp_path / "batch.yaml"
    section = config.model_dump(mode="json")
    file.write_text(yaml.safe_dump({"base": str(base), "output": "unused", "batch": section}))
    called = CliRunner().invoke(app, ["batch", "--config", str(file), "--json"])
    assert called.exit_code == 1
    assert "batch: 1 of 3 tasks failed" in called.stderr
    rows = json.loads(called.stdout)
    assert [row["state"] for row in rows] == ["failed", "done", "done"]
    assert "bad.jsonl:1" in rows[0]["reason"]
    for task, row in list(zip(tasks_of(config), rows, strict=True))[1:]:
        assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))
        assert row["steps"] == 6 and row["examples"] == 12 and row["loss"] > 0
        recovered = lr.recover(
            lr.RecoverConfig(
                adapter=task.train.output, base=str(base), output=tmp_path / f"by-{task.name}"
            )
        )
        assert same(Path(row["adapter"]), recovered.output)
    assert json.loads((config.output / "results.json").read_text()) == rows
    assert pq.read_table(config.output / "results.parquet").to_pylist() == rows

    both = settings_of(pruned, data, tmp_path / "both", base=str(base), workers=1)
    shared = lr.batch(both.model_copy(update={"adapters_per_worker": 3}))
    assert [row["state"] for row in shared.rows] == ["failed", "done", "done"]
    assert shared.rows[0]["reason"] == rows[0]["reason"]
    for found, wanted in zip(shared.rows[1:], rows[1:], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert difference(Path(found["adapter"]), Path(wanted["adapter"])) < 1e-3

    tiny.write_jsonl(data / "bad.jsonl", tiny.questions(8))  # mended: only it is trained
    written = {row["name"]: Path(row["adapter"]).stat().st_mtime_ns for row in rows[1:]}
    again = lr.batch(config)
    assert [row["state"] for row in again.rows] == ["done", "skipped", "skipped"]
    assert written == {
        row["name"]: Path(row["adapter"]).stat().st_mtime_ns for row in again.rows[1:]
    }


def adapters_in(folder: Path) -> list[Path]:
    """Adapters that are complete."""
    return list(folder.glob("*/adapter"))


def cut_twice(config: lr.BatchConfig, file: Path, begun: Callable[[], bool], adapters: int) -> None:
    """Run a batch whose actor is killed, then its driver, then again to its end.

    Args:
        config: of the batch.
        file: to write the configuration to.
        begun: whether an actor is to be killed.
        adapters: to be complete when the driver is killed.
    """
    file.write_text(config.model_dump_json())
    code = (
        "import sys; from pathlib import Path; import loram_ray as lr;"
        "lr.batch(lr.BatchConfig.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    command = [sys.executable, "-c", code, str(file)]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 900

    def wait_until(reached: Callable[[], bool]) -> None:
        while not reached():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)

    wait_until(begun)
    children = psutil.Process(first.pid).children(recursive=True)
    actors = [p for p in children if "TaskActor" in " ".join(p.cmdline())]
    actors[0].kill()
    wait_until(lambda: len(adapters_in(config.output)) >= adapters)
    first.kill()
    first.wait()
    for process in psutil.wait_procs(children, timeout=30)[1]:
        process.kill()
    complete = {path: path.stat().st_mtime_ns for path in adapters_in(config.output)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == made for path, made in complete.items())  # not again


@pytest.mark.slow
@pytest.mark.cluster
def test_killed_actors_and_a_killed_driver_change_nothing(pruned: Path, tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data", 3)
    changes = {"train": {**TRAIN, "steps": 24, "checkpoint_every": 5}}
    config = settings_of(pruned, data, tmp_path / "out", **changes)
    metrics = tmp_path / "out" / "task0" / ".adapter.work" / METRICS_FILE

    def half_way() -> bool:
        return metrics.exists() and len(metrics.read_text().splitlines()) >= 12

    cut_twice(config, tmp_path / "batch.json", half_way, adapters=1)
    for task in tasks_of(config):
        assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))


@pytest.mark.slow
@pytest.mark.cluster
def test_a_full_disk_fails_its_task_alone(pruned: Path, tmp_path: Path, embedded_ray: None) -> None:
    data = write_tasks(tmp_path / "data", 3)
    config = settings_of(pruned, data, tmp_path / "out")
    small = tmp_path / "out" / "task1"
    small.mkdir(parents=True)
    with tiny.disk(small, "100k"):
        rows = lr.batch(config).rows
        assert [row["state"] for row in rows] == ["done", "failed", "done"]
        reason = rows[1]["reason"]
        assert reason.startswith(f"train: the disk of {small}") and "is full at step" in reason
    again = lr.batch(config).rows  # there is room now
    assert [row["state"] for row in again] == ["skipped", "done", "skipped"]
    for task in tasks_of(config):
        assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))


TWENTY = (
    *("chain_sum", "gcd", "lcm", "letter_counting", "number_sorting", "spell_backward"),
    *("prime_factorization", "calendar_arithmetic", "family_relationships", "base_conversion"),
    *(
        "basic_arithmetic",
        "count_bits",
        "count_primes",
        "decimal_arithmetic",
        "fraction_simplification",
    ),
    *("leg_counting", "letter_jumble", "number_filtering", "products", "word_sorting"),
)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.cluster
@pytest.mark.timeout(3000)
def test_twenty_tasks_of_a_real_model(real_base: Path, tmp_path: Path) -> None:
    """Two actors, one killed, the driver killed, a poison task: each adapter as if alone."""
    import reasoning_gym

    data = tmp_path / "data"
    data.mkdir()
    for name in TWENTY:
        found = reasoning_gym.create_dataset(name, size=8, seed=1)
        rows = [{"prompt": r["question"], "completion": str(r["answer"])} for r in found]
        tiny.write_jsonl(data / f"{name}.jsonl", rows)
    tiny.write_jsonl(data / "a_poison.jsonl", [{"prompt": "no answer"}])
    pruned = tmp_path / "pruned"
    lr.prune(lr.PruneConfig(base=str(real_base), output=pruned, ratio=0.65, layers=(4, 28)))
    train = {**TRAIN, "steps": 2, "checkpoint_every": 1, "max_length": 256, "max_bad_share": 0.5}
    config = settings_of(pruned, data, tmp_path / "out", train=train)
    out = config.output
    cut_twice(config, tmp_path / "batch.json", lambda: len(adapters_in(out)) >= 3, adapters=6)
    rows = {r["name"]: r for r in json.loads((config.output / "results.json").read_text())}
    assert rows.pop("a_poison")["state"] == "failed"
    assert rows.keys() == set(TWENTY)
    assert all(row["state"] in ("done", "skipped") for row in rows.values())
    for task in tasks_of(config):
        if task.name != "a_poison":
            assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))
