"""Ray Train's trainer of an alignment.

Imports Ray Train, so import this module only after Ray is set up.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from ray.train.torch import TorchTrainer

from loram_ray.alignment.atomic_filesystem import atomic_local_filesystem
from loram_ray.alignment.checkpoints import FailedStep, complete_checkpoints
from loram_ray.alignment.loop import LoopSettings, train_loop
from loram_ray.alignment.rendezvous import OneAddressConfig
from loram_ray.errors import LoramError, root_cause
from loram_ray.runtime.cluster import gpus_per_worker
from loram_ray.runtime.embedded import HOST

ABORTING = 5.0
"""Seconds that workers have to exit."""


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A trainer that leaves Ctrl-C to this process; Ray Train would keep its own handler."""

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """Stop the workers without shutting down a Ray cluster started elsewhere."""
        if self.controller is not None:
            with suppress(Exception):
                ray.get(self.controller.abort.remote(), timeout=ABORTING)


class StopAtMistakes(ray.train.UserCallback):
    """Stop a run immediately on errors that a retry cannot fix."""

    def __init__(self, complete: dict[int, str]) -> None:
        self._complete = complete

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Remember a checkpoint."""
        if checkpoint is not None:
            self._complete[metrics[0]["step"]] = checkpoint.path

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
        """Raise a worker's error if the user can fix it."""
        mistake = mistake_in(worker_exceptions.values())
        if isinstance(mistake, FailedStep):
            raise LoramError(f"{mistake}; {last_good(self._complete, mistake.good_until)}")
        if mistake is not None:
            raise mistake


def trainer_of(loop: LoopSettings) -> Trainer:
    """Build the trainer of an alignment, which resumes from the last checkpoint in its storage."""
    config, gpus = loop.config, gpus_per_worker()
    return Trainer(
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


def _interfaces() -> dict[str, str]:
    """Return variables that keep the workers' connections on loopback if Ray is on loopback."""
    if ray.util.get_node_ip_address() != HOST:
        return {}
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == HOST for address in addresses)
    )
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, loopback) for name in variables}


def last_good(complete: dict[int, str], until: int) -> str:
    """Describe the last good checkpoint at a step or before it.

    Args:
        complete: Directories of the complete checkpoints, by step.
        until: Last step that may be good.
    """
    good = [step for step, path in complete.items() if step <= until and Path(path).is_dir()]
    if not good:
        return "there is no checkpoint before it"
    return f"the last good checkpoint is {complete[max(good)]}"


def mistake_in(failures: Iterable[Any]) -> LoramError | None:
    """Return the first worker failure that the user can fix."""
    for failure in failures:
        cause = root_cause(failure)
        if isinstance(cause, LoramError):
            return cause
    return None
