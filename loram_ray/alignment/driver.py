"""Drive alignment with Ray Train, from the first step to the last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from loram_ray.alignment.atomic_filesystem import atomic_local_filesystem
from loram_ray.alignment.checkpoints import (
    FailedStep,
    complete_checkpoints,
    remove_staging,
    step_of,
)
from loram_ray.alignment.loop import LoopSettings, train_loop
from loram_ray.artifacts.disk import FULL, full_disk
from loram_ray.errors import LoramError
from loram_ray.runtime.cluster import gpus_per_worker
from loram_ray.runtime.embedded import HOST
from loram_ray.runtime.interruption import handlers_kept
from loram_ray.runtime.progress import METRICS_FILE, Reporter, follow, last_step
from loram_ray.runtime.tracking import tracking

_ABORTING = 5.0  # seconds for workers to exit


def fit(loop: LoopSettings) -> None:
    """Train to the last step, resuming from the last checkpoint if there is one.

    Failed workers and lost nodes are replaced; metrics are shown and tracked throughout.

    Raises:
        LoramError: For mistakes the user can fix, which are not retried.
        ray.train.TrainingFailedError: If workers fail more often than allowed.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from loram_ray.alignment.rendezvous import OneAddressConfig

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Leave Ctrl-C to this process; Ray Train would handle it until the process ends."""

        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def abort(self) -> None:
            """Stop the workers without shutting down a Ray cluster started elsewhere."""
            if self.controller is not None:
                with suppress(Exception):
                    ray.get(self.controller.abort.remote(), timeout=_ABORTING)

    class StopAtMistakes(ray.train.UserCallback):
        """Stop a run immediately on errors that a retry cannot fix."""

        def __init__(self, complete: dict[int, str]) -> None:
            self._complete = complete

        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            if checkpoint is not None:
                self._complete[metrics[0]["step"]] = checkpoint.path

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            mistake = _mistake_in(worker_exceptions.values())
            if isinstance(mistake, FailedStep):
                raise LoramError(f"{mistake}; {_last_good(self._complete, mistake.good_until)}")
            if mistake is not None:
                raise mistake

    config, gpus = loop.config, gpus_per_worker()
    trainer = Trainer(
        train_loop,
        train_loop_config={"loop": loop},
        torch_config=OneAddressConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers)
            if config.min_workers
            else config.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=loop.storage.name,
            storage_path=str(loop.work),
            storage_filesystem=atomic_local_filesystem(),
            callbacks=[StopAtMistakes(complete_checkpoints(loop.storage))],
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": str(config.cpus_per_worker),
                    "TOKENIZERS_PARALLELISM": "false",
                    **_interfaces(),
                }
            },
        ),
    )
    ended = threading.Event()
    settings = config.model_dump(mode="json")
    with (
        Reporter("align", total=config.total_steps, unit="step") as reporter,
        tracking(config.trackers, "align", config.output, loop.work, settings) as tracked,
    ):
        watcher = threading.Thread(
            target=follow, args=(reporter, loop.work / METRICS_FILE, ended.wait, tracked)
        )
        watcher.start()
        try:
            with handlers_kept():
                trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {}).values()
            mistake = _mistake_in([*failures, getattr(error, "controller_failure", None)])
            raise mistake or _full_disk_of(error, loop) or error from error
        finally:
            ended.set()
            watcher.join()
            remove_staging(loop.storage, config.staging_folder, _ABORTING)


def _interfaces() -> dict[str, str]:
    """Return variables that keep the workers' connections on loopback if Ray is on loopback."""
    import psutil
    import ray

    if ray.util.get_node_ip_address() != HOST:
        return {}
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == HOST for address in addresses)
    )
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, loopback) for name in variables}


def _last_good(complete: dict[int, str], until: int) -> str:
    good = [step for step, path in complete.items() if step <= until and Path(path).is_dir()]
    if not good:
        return "there is no good checkpoint before it"
    return f"the last good checkpoint is {complete[max(good)]}"


def _full_disk_of(error: Any, loop: LoopSettings) -> LoramError | None:
    """Return the error to raise if Ray Train itself ran out of disk space."""
    import ray.train

    failure = getattr(error, "controller_failure", None)
    if not isinstance(failure, OSError) or failure.errno not in FULL:
        return None
    try:
        last = ray.train.Result.from_path(str(loop.storage), atomic_local_filesystem()).checkpoint
    except RuntimeError:  # Ray Train has no list of checkpoints yet
        last = None
    complete = {step_of(Path(last.path)): last.path} if last is not None else {}
    step = last_step(loop.work / METRICS_FILE)
    return LoramError(f"{full_disk('align', loop.storage, step)}; {_last_good(complete, step)}")


def _mistake_in(failures: Iterable[Any]) -> LoramError | None:
    """Return the first worker failure that the user can fix."""
    for failure in failures:
        cause = getattr(failure, "cause", None) or getattr(failure, "_base_exc", None) or failure
        if isinstance(cause, LoramError):
            return cause
    return None
