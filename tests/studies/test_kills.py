"""A whole run under seeded kills of its driver and its workers ends as one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from helpers import tiny
from helpers.processes import CommandProcess, contents, lines_in, write_run

STEPS = 60
SURVIVED = [
    word
    for key in ("prune.calibration", "align", "train", "evaluate")
    for word in ("--set", f"{key}.max_failures=20")
]


class Kill(NamedTuple):
    """One kill.

    Attributes:
        stage: in which it happens.
        amount: of the stage's progress when it happens.
        driver: whether the driver is killed, or else one of the stage's workers.
    """

    stage: str
    amount: float
    driver: bool


WORKERS = {
    "prune": "CalibrationWorker",
    "align": "RayTrainWorker",
    "train": "_Caller",
    "evaluate": "Scorer",
}


def seeded(seed: int) -> list[Kill]:
    """27 kills in the order in which they happen."""
    chance = random.Random(seed)
    kills = []
    for stage, count, most in (
        ("prune", 4, 2.0),  # seconds of its workers' life
        ("align", 8, STEPS - 4),
        ("train", 8, STEPS - 4),
        ("recover", 2, 1),
        ("merge", 2, 1),
        ("evaluate", 3, 4),
    ):
        for amount in sorted(chance.uniform(0, most) for _ in range(count)):
            driver = stage not in WORKERS or chance.random() < 0.5
            kills.append(Kill(stage, amount, driver))
    return kills


class Run:
    """The run, started again whenever its driver was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._out = folder, folder / "out"
        self.start()

    def start(self) -> None:
        self.command = CommandProcess(self._folder, "run", "--config", "run.yaml", *SURVIVED)

    def workers(self, stage: str) -> list[psutil.Process]:
        found = []
        for process in self.command.processes():
            with suppress(psutil.Error):
                if WORKERS.get(stage, "?") in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def reached(self, kill: Kill) -> Callable[[], bool]:
        """Whether the moment of a kill has come; the stage is not over before."""
        out, amount = self._out, kill.amount
        if kill.stage == "prune":
            return lambda: bool(self.workers("prune"))
        if kill.stage in ("align", "train"):
            name = {"align": "aligned", "train": "adapter_pruned"}[kill.stage]
            metrics = out / f".{name}.work" / "metrics.jsonl"
            return lambda: lines_in(metrics) > amount
        if kill.stage == "evaluate":
            record = out / "evaluation" / ".loram.work" / "batches.jsonl"
            return lambda: lines_in(record) > amount
        name = {"recover": "adapter", "merge": "merged"}[kill.stage]
        return lambda: (out / f".{name}.partial").exists()

    def suffer(self, kill: Kill, chance: random.Random) -> None:
        self.command.when(self.reached(kill), 400)
        if kill.stage == "prune":
            time.sleep(kill.amount)
        victims = [] if kill.driver else self.workers(kill.stage)
        if victims:
            with suppress(psutil.NoSuchProcess):
                chance.choice(victims).kill()
            return
        self.command.send(signal.SIGKILL)
        self.command.process.wait()
        self.start()


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    sizes = {"hidden": 256, "head_dim": 32, "intermediate": 1024, "layers": 4}
    base = tiny.write_base(tmp_path / "base", **sizes)
    made = tmp_path / "alone", tmp_path / "killed"
    for folder in made:
        folder.mkdir()
        write_run(folder, base, STEPS)
    yield made


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_a_run_killed_27_times_ends_as_one_that_was_not(folders: tuple[Path, Path]) -> None:
    alone, killed = folders
    untouched = CommandProcess(alone, "run", "--config", "run.yaml", *SURVIVED)
    assert untouched.end(900) == 0, untouched.err[-2000:]
    kills = seeded(20)
    assert len(kills) >= 25
    assert {kill.stage for kill in kills if not kill.driver} == set(WORKERS)
    run, chance = Run(killed), random.Random(20)
    try:
        for kill in kills:
            run.suffer(kill, chance)
        assert run.command.end(900) == 0, run.command.err[-2000:]
    finally:
        run.command.kill()
    ours, theirs = contents(killed / "out"), contents(alone / "out")
    assert len(theirs) >= 5
    assert ours == theirs
    scores = [
        json.loads((folder / "out/evaluation/loram/scores.json").read_text())
        for folder in (killed, alone)
    ]
    assert scores[0]["answer_perplexity"] == scores[1]["answer_perplexity"]
    assert [path.name for path in (killed / "out").iterdir() if path.name.startswith(".")] == []
