"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Prometheus.

The driver reads the workers' metrics and logs them, so accounts and credentials are needed on its
machine only. All libraries are optional, except Prometheus, which is part of Ray.

`accelerate.tracking` is not used: it has no tracker for Ray's Prometheus metrics, does not find an
MLflow run again after a restart, and does not convert metric names to those that MLflow accepts.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from loram_ray.artifacts.manifest import digest_of, write_json
from loram_ray.errors import LoramError

_NOTE = "tracked.json"
_NOT_IN_METRICS = re.compile(r"[^A-Za-z0-9_. :/-]")
_LONGEST_METRIC = 250
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Receives metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Flush buffered metrics and close."""


class TensorBoard:
    """Logs to TensorBoard event files in a directory."""

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        self._stage = stage

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{self._stage}/{name}", value, step)

    def close(self) -> None:
        """Flush buffered metrics and close."""
        self._writer.close()


class WandB:
    """Logs to a Weights & Biases run in the project ``loram``, or in ``WANDB_PROJECT``."""

    def __init__(self, folder: Path, stage: str, name: str, settings: dict[str, Any]) -> None:
        import os

        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "loram"),
            id=_identity(folder, stage),
            name=name,
            group=stage,
            resume="allow",
            config=settings,
            dir=str(folder),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Flush buffered metrics and close."""
        self._run.finish()


class MLflow:
    """Logs to a run of the experiment ``loram`` at ``MLFLOW_TRACKING_URI``."""

    def __init__(self, folder: Path, stage: str, name: str, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name("loram")
        experiment = known.experiment_id if known else self._client.create_experiment("loram")
        identity = _identity(folder, stage)
        runs = self._client.search_runs([experiment], f"tags.loram_run = '{identity}'")
        if runs:
            self._run = runs[0].info.run_id
            return
        run = self._client.create_run(experiment, tags={"loram_run": identity}, run_name=name)
        self._run = run.info.run_id
        for key, value in _flat(settings):
            self._client.log_param(self._run, key, value)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, mlflow_metric_name(name), value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def mlflow_metric_name(name: str) -> str:
    """Convert a metric's name, which may contain a source's name, to one that MLflow accepts."""
    parts = (part.strip(".") for part in _NOT_IN_METRICS.sub("_", name).split("/"))
    return "/".join(filter(None, parts))[:_LONGEST_METRIC].rstrip("/")


class Prometheus:
    """Sets gauges ``ray_loram_<stage>_<metric>`` among the metrics that Ray exports."""

    def __init__(self, stage: str, name: str) -> None:
        self._stage, self._name = stage, name
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Set the gauges."""
        from ray.util.metrics import Gauge

        for name, value in {"step": float(step), **metrics}.items():
            if name not in self._gauges:
                safe = re.sub(r"\W", "_", f"loram_{self._stage}_{name}", flags=re.ASCII)
                self._gauges[name] = Gauge(safe, f"{name} of {self._stage}", tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._name})

    def close(self) -> None:
        """Do nothing, as no metrics are buffered."""


class Tracking:
    """Logs every step once, in order, to all trackers.

    Args:
        trackers: Trackers to log to.
        note: File that stores the last logged step, for a restarted driver.
    """

    def __init__(self, trackers: Iterable[Tracker], note: Path) -> None:
        self._trackers = list(trackers)
        self._note = note
        self._last = last_tracked(note)

    def __call__(self, lines: list[dict[str, Any]]) -> None:
        """Log the new lines among all lines of ``metrics.jsonl``."""
        new = [line for line in lines if line["step"] > self._last]
        for line in new:
            metrics = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
            for tracker in self._trackers:
                tracker.log(line["step"], metrics)
            self._last = line["step"]
        if new:
            with suppress(OSError):  # a full disk is reported by the run itself
                write_json(self._note, self._last)


def last_tracked(note: Path) -> int:
    """Return the last logged step, or -1 before the first."""
    from loram_ray.utils.parsing.documents import read_as

    return read_as(note, int) if note.exists() else -1


@contextmanager
def tracking(
    names: Iterable[str], stage: str, output: Path, work: Path, settings: dict[str, Any]
) -> Iterator[Tracking]:
    """Track a run inside the block.

    Args:
        names: Trackers to use: ``tensorboard``, ``wandb`` and ``mlflow``.
        stage: Name of the stage.
        output: Output directory of the stage; logs are written to ``<output>_logs`` beside it.
        work: Work directory of the stage.
        settings: Settings to record with the run.

    Raises:
        LoramError: A library is not installed.
    """
    note = work / _NOTE
    folder = output.with_name(f"{output.name}_logs")
    with ExitStack() as stack:
        trackers: list[Tracker] = [Prometheus(stage, output.name)]
        for name in names:
            folder.mkdir(parents=True, exist_ok=True)
            match name:
                case "tensorboard":
                    trackers.append(TensorBoard(folder, stage, last_tracked(note)))
                case "wandb":
                    trackers.append(WandB(folder, stage, output.name, settings))
                case "mlflow":
                    trackers.append(MLflow(folder, stage, output.name, settings))
        for tracker in trackers:
            stack.callback(tracker.close)
        yield Tracking(trackers, note)


def require_trackers(names: Iterable[str], key: str) -> None:
    """Check that the libraries of trackers are installed.

    Raises:
        LoramError: A library is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise LoramError(
                f"{key} must contain installed trackers, got {name}; run pip install {name}"
            )


def _identity(folder: Path, stage: str) -> str:
    """Return an id that depends on the output only, so a resumed run continues the same run."""
    return digest_of([str(folder.resolve()), stage])[:16]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
