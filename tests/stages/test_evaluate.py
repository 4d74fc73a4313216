"""The evaluate stage on Ray: several actors, interruptions, what it writes and prints."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import loram_ray as lr
from helpers import quizzes, tiny
from helpers.scored import score
from loram_ray.errors import LoramError
from loram_ray.runtime.progress import read_lines
from loram_ray.stages.evaluate import _data_digest, _settings

pytestmark = pytest.mark.cluster
WITHOUT_TIME = ("seconds",)


def settings_of(directory: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Benchmarks of several kinds, one of them sampled."""
    folder.mkdir(exist_ok=True)
    quiz = str(tiny.write_jsonl(folder / "quiz.jsonl", quizzes.CHOICES))
    code = str(tiny.write_jsonl(folder / "code.jsonl", quizzes.PROBLEMS))
    return {
        "model": str(directory),
        "adapter": None,
        "output": str(folder / "out"),
        "precision": "fp32",
        "batch_size": 2,
        "cpus_per_worker": 1,
        "benchmarks": [
            {"kind": "choice", "data": quiz},
            {"kind": "code", "data": code, "samples": 4, "pass_at": [1, 3], "max_new_tokens": 8},
            {"kind": "reasoning_gym", "dataset": "chain_sum", "size": 5, "max_new_tokens": 4},
        ],
        **changes,
    }


def scores_in(output: Path) -> dict[str, float | int]:
    scores = json.loads((output / "scores.json").read_text())
    return {key: value for key, value in scores.items() if key not in WITHOUT_TIME}


def items_in(output: Path) -> dict[str, list[Any]]:
    return {path.stem: read_lines(path) for path in sorted((output / "items").iterdir())}


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_ray")
def test_scores_do_not_depend_on_the_number_of_actors(
    loud_directory: Path,
    tmp_path: Path,
) -> None:
    outputs = []
    for workers in (1, 2):
        config = settings_of(
            loud_directory, tmp_path, output=str(tmp_path / str(workers)), workers=workers
        )
        outputs.append(lr.evaluate(lr.EvaluateConfig.model_validate(config)).output)
    assert scores_in(outputs[0]) == scores_in(outputs[1])
    assert items_in(outputs[0]) == items_in(outputs[1])
    assert {name: len(found) for name, found in items_in(outputs[0]).items()} == {
        "chain_sum": 5,
        "code": 12,
        "quiz": 6,
    }
    config = lr.EvaluateConfig.model_validate(settings_of(loud_directory, tmp_path))
    assert scores_in(outputs[0]) == score(config)
    other = config.model_copy(update={"output": outputs[0], "workers": 2})
    assert lr.evaluate(other).skipped, "the number of workers does not make another evaluation"
    moved = settings_of(loud_directory, tmp_path / "moved", output=str(outputs[0]))
    assert lr.evaluate(lr.EvaluateConfig.model_validate(moved)).skipped, "nor does where data are"


def test_tasks_of_ones_own_make_another_evaluation_where_they_change(tmp_path: Path) -> None:
    def found(folder: Path) -> tuple[dict[str, Any], str]:
        lm_eval = {"tasks": ["own"], "include_path": str(folder)}
        output = str(folder / "scores")
        config = lr.EvaluateConfig.model_validate(
            {"model": "m", "output": output, "adapter": None, "lm_eval": lm_eval}
        )
        return _settings(config), _data_digest(config)

    for name in ("here", "there"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "own.yaml").write_text("task: own\ndata: rows.jsonl")
        (tmp_path / name / "inner" / "rows.jsonl").write_text("{}")
    here = tmp_path / "here"
    before = found(here)
    assert found(tmp_path / "there") == before
    for other in ("scores/own.yaml", "inner/__pycache__/own.pyc", "notes.jsonl"):
        (here / other).parent.mkdir(exist_ok=True)
        (here / other).write_text("by a run, or a person")
    assert found(here) == before, "what is no part of a task makes none of another"
    (here / "inner" / "rows.jsonl").write_text('{"another": "row"}')
    changed = found(here)
    assert changed != before
    (here / "inner" / "own.yaml").write_text("task: own\ndata: rows.jsonl\nrepeats: 2")
    assert found(here) not in (before, changed)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_ray")
def test_an_error_of_an_actor_is_told_as_it_is(
    loud_directory: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    from helpers import adapters

    adapter, _ = adapters.train_randomly(base, tmp_path / "adapter")
    (adapter / "manifest.json").unlink()  # as one that others made
    wider = tiny.write_base(tmp_path / "wider", intermediate=128)
    config = settings_of(wider, tmp_path, adapter=str(adapter))
    with pytest.raises(LoramError, match=r"^evaluate\.adapter .* does not match the model"):
        lr.evaluate(lr.EvaluateConfig.model_validate(config))
    assert not (tmp_path / "out").exists()


def is_scorer(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("Scorer" in part for part in process.cmdline())
    return False


@pytest.mark.slow
def test_a_killed_actor_and_a_killed_driver_change_nothing(
    loud_directory: Path,
    tmp_path: Path,
) -> None:
    """Nothing is scored twice, nothing is lost, and sampled programs are the same."""
    section = settings_of(loud_directory, tmp_path, workers=2, batch_size=1)
    section["benchmarks"][1] |= {"samples": 20, "max_new_tokens": 40}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"base": str(loud_directory), "output": "o", "evaluate": section}))
    command = [sys.executable, "-m", "loram_ray.cli", "evaluate", "--config", str(file)]
    record = tmp_path / ".out.work" / "batches.jsonl"

    def wait_for(batches: int) -> None:
        deadline = time.monotonic() + 240
        while len(read_lines(record)) < batches:
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.02)

    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        family = psutil.Process(driver.pid)
        everyone = [family]
        try:
            wait_for(8)
            everyone += family.children(recursive=True)
            scorers = [process for process in everyone if is_scorer(process)]
            assert scorers, "one may have begun before the other"
            scorers[0].kill()
            wait_for(25)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended; the error says why
                everyone += family.children(recursive=True)
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everyone, timeout=10)
    before = read_lines(record)
    assert 25 <= len(before) < 70
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    numbers = [line["batch"] for line in before]
    assert len(set(numbers)) == len(numbers)
    config = lr.EvaluateConfig.model_validate({**section, "output": str(tmp_path / "alone")})
    assert scores_in(tmp_path / "out") == score(config)
