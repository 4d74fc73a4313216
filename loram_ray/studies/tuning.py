"""Run a sweep's trials under Ray Tune, with ASHA among the trials of each model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from loram_ray.config import SweepConfig
from loram_ray.runtime.progress import Reporter
from loram_ray.stages.train import absolute
from loram_ray.studies.trial_actor import TrialActor
from loram_ray.studies.trials import Trial

_TRIAL = "trial"
_LOSS, _STEP = "eval_loss", "step"


def run_trials(
    config: SweepConfig, trials: Sequence[Trial], folder: Path, scratch: Path, gpus: float
) -> dict[str, str]:
    """Run all trials, stopping those that fall behind others on the same model.

    Args:
        config: Configuration of the sweep.
        trials: Trials to run.
        folder: Parent of the trials' directories, which may exist from an earlier call.
        scratch: Directory for Tune's own files.
        gpus: Number of GPUs per trial.

    Returns:
        The reason of failure of each trial, empty if it did not fail.
    """
    _configure_tune()
    shutil.rmtree(scratch, ignore_errors=True)
    given = {trial.name: (absolute(trial.train), folder / trial.name) for trial in trials}
    training = trials[0].train
    schedule = _AshaPerModel(
        {trial.name: trial.model for trial in trials},
        max_t=training.steps,
        grace_period=config.grace_steps or min(training.evaluate_every, training.steps),
        reduction_factor=config.reduction_factor,
    )
    with Reporter("sweep", len(trials), "trial") as reporter:
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialActor, trials=given),
                {"cpu": config.cpus_per_worker, "gpu": gpus},
            ),
            param_space={_TRIAL: tune.grid_search(list(given))},
            tune_config=tune.TuneConfig(
                scheduler=schedule,
                max_concurrent_trials=config.workers,
                reuse_actors=True,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                name=scratch.name,
                storage_path=str(scratch.parent),
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_at_end=False
                ),  # trials write their own checkpoints
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                callbacks=[
                    _ProgressCallback(reporter, training.steps, len({t.model for t in trials}) == 1)
                ],
                verbose=0,
            ),
        ).fit()
    reasons = {result.config[_TRIAL]: _reason(result, config.max_failures) for result in results}
    return {name: reasons.get(name, "") for name in given}


def _configure_tune() -> None:
    """Set the environment variables that Ray Tune reads."""
    os.environ.setdefault(
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1"
    )  # metrics.jsonl contains everything
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output ignores verbose=0
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep immediately


def _reason(result: Any, max_failures: int) -> str:
    """Return why a trial failed; empty if it did not."""
    if result.error is not None:
        message = " ".join(str(result.error).split())[:200]
        return f"its worker died {max_failures + 1} times ({message})"
    reason: str = (result.metrics or {}).get("reason", "")
    return reason


def _name_of(trial: Any) -> str:
    name: str = trial.config[_TRIAL]
    return name


class _AshaPerModel(FIFOScheduler):  # type: ignore[misc]
    """ASHA among the trials of each model; losses on different models are not comparable.

    Args:
        models: Model of each trial.
        settings: Settings of ASHA.
    """

    def __init__(self, models: Mapping[str, str], **settings: Any) -> None:
        super().__init__()
        self._models = models
        self._schedules = {
            model: ASHAScheduler(time_attr=_STEP, metric=_LOSS, mode="min", **settings)
            for model in dict.fromkeys(models.values())
        }

    def _of(self, trial: Any) -> ASHAScheduler:
        return self._schedules[self._models[_name_of(trial)]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = self._of(trial).on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class _ProgressCallback(tune.Callback):  # type: ignore[misc]
    """Show the number of finished trials, the progress of running ones, and the best if comparable.

    Args:
        reporter: Reporter of the progress line.
        steps: Number of steps per trial.
        compares: Whether the losses of all trials are comparable.
    """

    def __init__(self, reporter: Reporter, steps: int, compares: bool) -> None:
        self._reporter, self._steps, self._compares = reporter, steps, compares
        self._ended: set[str] = set()
        self._best: tuple[float, str] | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if self._compares and _LOSS in result:
            newest = result[_LOSS], _name_of(trial)
            self._best = newest if self._best is None else min(self._best, newest)
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended.add(_name_of(trial))
        self._show(trials)

    def _show(self, trials: list[Any]) -> None:
        shown: dict[str, Any] = {}
        for trial in trials:
            if trial.status == "RUNNING" and _name_of(trial) not in self._ended:
                step = (trial.last_result or {}).get(_STEP, 0)
                shown[_name_of(trial)] = f"{step}/{self._steps}"
        if self._best is not None:
            shown["best"] = f"{self._best[1]} {self._best[0]:.4f}"
        self._reporter.update(len(self._ended), shown)
