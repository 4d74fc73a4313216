"""Start or join Ray, and check that its cluster can place a stage's workers."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from loram_ray.config import RayConfig
from loram_ray.errors import LoramError
from loram_ray.runtime.embedded import authenticate, embedded_ray
from loram_ray.runtime.joined import joined_ray
from loram_ray.runtime.launchers import forget_launchers, without_launchers
from loram_ray.runtime.progress import say
from loram_ray.utils.parsing import parse_json

_CPUS_FOR_DATA = 2
_ROUNDING = 1e-9
ADVISED: set[str] = set()
"""Sections whose precision `advise_precision` has commented on in this process."""
_autoscaling: ContextVar[str] = ContextVar("autoscaling", default="off")
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_WORKER_ENVIRONMENT = ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "HF_HOME", "HF_HUB_OFFLINE")


@contextmanager
def ray_session(config: RayConfig, cpus: int = 1) -> Iterator[None]:
    """Initialise Ray for the block; an embedded Ray is shut down afterwards.

    If the process has already initialised Ray, that session is used. Otherwise, standard output is
    redirected to standard error inside the block.

    Args:
        config: Connection settings of Ray.
        cpus: Number of logical CPUs of the stage's workers, without those of Ray Data.

    Raises:
        LoramError: No cluster answers at the address, or it rejects the token.
    """
    before = _autoscaling.set(config.autoscaling)
    try:
        with _connected(config, cpus):
            yield
    finally:
        _autoscaling.reset(before)


@contextmanager
def _connected(config: RayConfig, cpus: int) -> Iterator[None]:
    local = config.address == "local"
    if _is_initialised():
        yield
        return
    if local:
        authenticate()
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # for the dashboard
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray would print stack traces instead of one line, and errors of its internal actors.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    options = {"runtime_env": _runtime_env(), "log_to_driver": False}
    count = config.num_cpus or max(os.cpu_count() or 1, cpus + _CPUS_FOR_DATA)
    with (
        without_launchers(),
        embedded_ray(count, options) if local else joined_ray(config.address, options),
        # Ray prints node events to standard output, which is reserved for a command's result.
        redirect_stdout(sys.stderr),
    ):
        yield


def _is_initialised() -> bool:
    """Return whether this process has initialised Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _runtime_env() -> dict[str, Any]:
    """Return the workers' runtime environment: some of our variables, none of a launcher's."""
    environment = {k: os.environ[k] for k in _WORKER_ENVIRONMENT if k in os.environ}
    for name in _job_variables():  # workers inherit them, and Ray rejects duplicates
        environment.pop(name, None)
    return {
        "env_vars": environment,
        "worker_process_setup_hook": f"{forget_launchers.__module__}.{forget_launchers.__name__}",
    }


def _job_variables() -> set[str]:
    """Return the names of the environment variables set by the Ray Job of this process."""
    job: Any = parse_json(os.environ.get(_JOB_CONFIG, "{}"), _JOB_CONFIG, remedy="unset it")
    for key in ("runtime_env", "env_vars"):
        job = job.get(key) or {}
        if not isinstance(job, dict):
            raise LoramError(f"{_JOB_CONFIG} must have a JSON object under {key}; unset it")
    return set(job)


def gpus_per_worker(share: float = 1) -> float:
    """Return the GPU share to request per worker: ``share`` if the cluster has GPUs, else 0."""
    import ray

    if _autoscaling.get() == "gpu":
        return share
    return share if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def require_resources(workers: int, cpus: int, gpus: float, key: str) -> None:
    """Raise an error if the cluster can never place the workers and does not autoscale.

    Args:
        workers: Number of workers.
        cpus: CPUs per worker; Ray Data needs one more in total.
        gpus: GPUs per worker, or a share of one.
        key: Configuration key of the number of workers, for the message.

    Raises:
        LoramError: The cluster lacks resources; the message names them.
    """
    import ray

    if _autoscaling.get() != "off":
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, wanted in (("CPU", workers * cpus + 1), ("GPU", workers * gpus)):
        have = sum(node.get(kind, 0) for node in nodes)
        if have < wanted:
            raise LoramError(
                f"{key} needs {wanted:g} {kind}s, but the Ray cluster has {math.floor(have)}; "
                "lower it, add nodes, or set ray.autoscaling if the cluster has an autoscaler"
            )
    places = sum(
        min(node.get("CPU", 0) // cpus, _places_of(node.get("GPU", 0), gpus)) for node in nodes
    )
    if places < workers:
        each = f"{cpus} CPUs" + (f" and {gpus:g} GPU" if gpus else "")
        raise LoramError(
            f"{key} needs {workers} workers with {each}, each on one node, but the Ray cluster's "
            f"nodes can hold {math.floor(places)}; lower it or add larger nodes"
        )


def advise_precision(precision: str, stage: str) -> None:
    """Print a hint, once per stage, if workers will use bf16 on a CPU where it is slow.

    On CPUs with AVX2 but without AVX-512, matrix products in bf16 are 7 to 30 times slower than in
    fp32, as torch 2.13 has no optimised kernels for them.

    Args:
        precision: Data type of the workers' weights and activations.
        stage: Configuration section to name in the hint.
    """
    import ray
    import torch

    if precision != "bf16" or stage in ADVISED or _autoscaling.get() != "off":
        return
    if gpus_per_worker():
        return
    elsewhere = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    elsewhere -= {ray.get_runtime_context().get_node_id()}
    if not elsewhere and torch.backends.cpu.get_cpu_capability() == "AVX2":
        ADVISED.add(stage)
        say(
            stage.partition(".")[0],
            f"this CPU has no AVX-512: {stage}.precision=fp32 is many times faster than bf16",
        )


def _places_of(have: float, gpus: float) -> float:
    """Return how many GPU shares a node can place; a share below 1 must fit on one GPU."""
    if not gpus:
        return math.inf
    return have // gpus if gpus >= 1 else have * math.floor(1 / gpus + _ROUNDING)


def require_shared(folder: Path, key: str) -> None:
    """Raise an error if a directory is not on storage that all nodes share.

    Args:
        folder: Directory that the driver writes to.
        key: Configuration key of the directory, for the message.

    Raises:
        LoramError: A node does not see a file that the driver wrote there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-") as mark:
        exists = ray.remote(_exists)
        seen = ray.get(
            [
                exists.options(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                ).remote(mark.name)
                for node in nodes
            ]
        )
    for node, sees in zip(nodes, seen, strict=True):
        if not sees:
            raise LoramError(
                f"{key} must be on storage that all nodes share, but {folder} is not the same "
                f"directory on node {node['NodeManagerAddress']} ({node['NodeID'][:8]}); use a "
                "shared file system such as NFS, mounted on all nodes"
            )


def _exists(path: str) -> bool:
    return Path(path).exists()
