"""A trial in Ray Tune's hands: it trains until an evaluation, and waits for leave to go on."""

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

Tell = Callable[[int, float], None]
"""Told a step and the held-out loss after it."""


class Stopped(Exception):
    """Nobody wants to know how the trial goes on."""


class TrialActor(tune.Trainable):
    """Trial after trial on one copy of the model."""

    def setup(self, config: dict[str, Any], trials: Mapping[str, tuple[TrainConfig, Path]]) -> None:
        """Begin.

        Args:
            config: the ``trial``'s name.
            trials: for each name its training, with absolute paths, and a directory for it, which
                has what an earlier attempt left.
        """
        self._trials = trials
        self._frozen: FrozenModel | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in this process."""
        self.cleanup()
        train, folder = self._trials[new_config["trial"]]
        torch.set_num_threads(train.cpus or 1)
        self._talk = _Talk(lambda tell: self._try(train, folder, tell))
        return True

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation, or the end."""
        return self._talk.next()

    def cleanup(self) -> None:
        """End the training where it is; what it has saved stays."""
        if hasattr(self, "_talk"):
            self._talk.stop()

    def _try(self, train: TrainConfig, folder: Path, tell: Tell) -> None:
        """Tell each evaluation once, be it of now or of an earlier attempt."""
        told = 0

        def once(step: int, loss: float) -> None:
            nonlocal told
            if step > told:
                told = step
                tell(step, loss)

        if not (folder / SUMMARY_FILE).exists():
            if self._frozen is None or not self._frozen.serves(train):
                from loram_ray.finetuning.frozen import FrozenModel

                self._frozen = None
                require_room(train)
                self._frozen = FrozenModel.load(train)
            _train(train, folder, self._frozen, once)
        for step, loss in _evaluations(folder / METRICS_FILE):
            once(step, loss)


def _train(train: TrainConfig, folder: Path, frozen: FrozenModel, tell: Tell) -> None:
    """Train from the last checkpoint in a trial's directory; its summary says that it is whole."""
    from loram_ray.finetuning.trainer import train_adapter

    work, adapter = folder / WORK, folder / ADAPTER
    work.mkdir(parents=True, exist_ok=True)
    adapter.mkdir(exist_ok=True)
    for step, loss in _evaluations(work / METRICS_FILE):
        tell(step, loss)

    def heard(step: int, loss: float) -> None:
        if step < train.steps:  # what has learnt to the end is saved before it can be stopped
            tell(step, loss)

    summary = train_adapter(train, work, adapter, frozen, heard=heard)
    shutil.copyfile(work / METRICS_FILE, folder / METRICS_FILE)
    write_json(folder / SUMMARY_FILE, asdict(summary))


def _evaluations(path: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in read_metrics(path) if "eval_loss" in row]


class _Talk:
    """Work in a thread that says something now and then, and each time waits to be asked on."""

    def __init__(self, work: Callable[[Tell], None]) -> None:
        self._work = work
        self._said: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._asked = threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """What is said next; ``done`` is in the last."""
        self._asked.release()
        return self._said.get()

    def stop(self) -> None:
        """End the work at the next thing it says."""
        self._stopping = True
        self._asked.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self._work(self._tell)
        except Stopped:
            return
        except Exception as error:
            kind = "" if isinstance(error, LoramError) else f"{type(error).__name__}: "
            self._said.put({"done": True, "reason": f"{kind}{error}"})
        else:
            self._said.put({"done": True, "reason": ""})

    def _tell(self, step: int, loss: float) -> None:
        self._said.put({"step": step, "eval_loss": loss})
        self._wait()

    def _wait(self) -> None:
        self._asked.acquire()
        if self._stopping:
            raise Stopped
