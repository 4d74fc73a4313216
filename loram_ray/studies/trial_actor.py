"""Run a trial under Ray Tune: train until an evaluation, then wait for permission to continue."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from ray import tune

from loram_ray.artifacts.manifest import write_json
from loram_ray.config import TrainConfig
from loram_ray.errors import LoramError
from loram_ray.runtime.progress import METRICS_FILE, read_metrics
from loram_ray.stages.train import require_room
from loram_ray.studies.trials import ADAPTER, SUMMARY_FILE, WORK

if TYPE_CHECKING:
    from loram_ray.finetuning.frozen import FrozenModel

Report = Callable[[int, float], None]
"""Callback that receives a step and the held-out loss after it."""


class Stopped(Exception):
    """The scheduler stopped the trial."""


class TrialActor(tune.Trainable):
    """Run trials one after another on one copy of the model."""

    def setup(self, config: dict[str, Any], trials: Mapping[str, tuple[TrainConfig, Path]]) -> None:
        """Start the first trial.

        Args:
            config: Tune configuration with the name of the ``trial``.
            trials: Training configuration, with absolute paths, and directory of each trial by
                name; the directory may hold files of an earlier attempt.
        """
        self._trials = trials
        self._frozen: FrozenModel | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial in the same process."""
        self.cleanup()
        train, folder = self._trials[new_config["trial"]]
        torch.set_num_threads(train.cpus or 1)
        self._work = _SteppedWork(lambda report: self._try(train, folder, report))
        return True

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation or the end."""
        return self._work.next()

    def cleanup(self) -> None:
        """Stop the training; saved files remain."""
        if hasattr(self, "_work"):
            self._work.stop()

    def _try(self, train: TrainConfig, folder: Path, report: Report) -> None:
        """Report each evaluation once, including those of earlier attempts."""
        reported = 0

        def once(step: int, loss: float) -> None:
            nonlocal reported
            if step > reported:
                reported = step
                report(step, loss)

        if not (folder / SUMMARY_FILE).exists():
            if self._frozen is None or not self._frozen.serves(train):
                from loram_ray.finetuning.frozen import FrozenModel

                self._frozen = None
                require_room(train)
                self._frozen = FrozenModel.load(train)
            _train(train, folder, self._frozen, once)
        for step, loss in _evaluations(folder / METRICS_FILE):
            once(step, loss)


def _train(train: TrainConfig, folder: Path, frozen: FrozenModel, report: Report) -> None:
    """Train from the last checkpoint in a trial's directory; the summary file marks it complete."""
    from loram_ray.finetuning.trainer import train_adapter

    work, adapter = folder / WORK, folder / ADAPTER
    work.mkdir(parents=True, exist_ok=True)
    adapter.mkdir(exist_ok=True)
    for step, loss in _evaluations(work / METRICS_FILE):
        report(step, loss)

    def on_evaluation(step: int, loss: float) -> None:
        if step < train.steps:  # the last step is saved before the trial can be stopped
            report(step, loss)

    summary = train_adapter(train, work, adapter, frozen, on_evaluation=on_evaluation)
    shutil.copyfile(work / METRICS_FILE, folder / METRICS_FILE)
    write_json(folder / SUMMARY_FILE, asdict(summary))


def _evaluations(path: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in read_metrics(path) if "eval_loss" in row]


class _SteppedWork:
    """Run work in a thread that reports results and waits for permission after each."""

    def __init__(self, work: Callable[[Report], None]) -> None:
        self._work = work
        self._reports: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._permits = threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """Resume the work and return its next report; the last one contains ``done``."""
        self._permits.release()
        return self._reports.get()

    def stop(self) -> None:
        """Stop the work at its next report."""
        self._stopping = True
        self._permits.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self._work(self._report)
        except Stopped:
            return
        except Exception as error:
            kind = "" if isinstance(error, LoramError) else f"{type(error).__name__}: "
            self._reports.put({"done": True, "reason": f"{kind}{error}"})
        else:
            self._reports.put({"done": True, "reason": ""})

    def _report(self, step: int, loss: float) -> None:
        self._reports.put({"step": step, "eval_loss": loss})
        self._wait()

    def _wait(self) -> None:
        self._permits.acquire()
        if self._stopping:
            raise Stopped
