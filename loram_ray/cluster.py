"""Starting or joining Ray, and what its cluster can place."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_ray.config import RayConfig
from loram_ray.errors import LoramError
from loram_ray.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable

_CPUS_FOR_DATA = 2
_ROUNDING = 1e-9
_advised: set[str] = set()
_autoscaling: ContextVar[str] = ContextVar("autoscaling", default="off")
_WORKER_ENVIRONMENT = ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "HF_HOME", "HF_HUB_OFFLINE")


@contextmanager
def ray_session(config: RayConfig, cpus: int = 1) -> Iterator[None]:
    """Have Ray initialised inside the block; an embedded one is shut down after it.

    A process that has initialised Ray before keeps what it has. Where Ray is initialised here,
    standard output is standard error inside the block.

    Args:
        config: where Ray runs.
        cpus: logical CPUs that a stage's workers ask for, besides those of Ray Data.

    Raises:
        LoramError: there is no cluster at the address.
    """
    before = _autoscaling.set(config.autoscaling)
    try:
        with _connected(config, cpus):
            yield
    finally:
        _autoscaling.reset(before)


@contextmanager
def _connected(config: RayConfig, cpus: int) -> Iterator[None]:
    if config.address == "local":
        _authenticate_embedded_ray()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    environment = {k: os.environ[k] for k in _WORKER_ENVIRONMENT if k in os.environ}
    for name in _job_variables():  # which workers have anyway, and Ray refuses to be told twice
        environment.pop(name, None)
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": False}
    if config.address == "local":
        count = config.num_cpus or max(os.cpu_count() or 1, cpus + _CPUS_FOR_DATA)
        options.update(num_cpus=count, include_dashboard=False)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # for the dashboard
    try:
        ray.init(address=config.address, logging_level="ERROR", **options)
    except (ConnectionError, ValueError) as error:
        raise LoramError(
            f"ray.address must be 'local' or a running cluster, got '{config.address}' ({error}); "
            "start one or use 'local'"
        ) from error
    try:
        # Ray prints what befalls nodes to standard output, where a command's result belongs.
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()


def _job_variables() -> set[str]:
    """Names of the environment variables that the Ray Job gives which this process is of."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set(job.get("runtime_env", {}).get("env_vars", {}))


def gpus_per_worker(share: float = 1) -> float:
    """A GPU, or the share of one, where the cluster has or gets GPUs; none where it has not."""
    import ray

    if _autoscaling.get() == "gpu":
        return share
    return share if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def require_resources(workers: int, cpus: int, gpus: float, key: str) -> None:
    """Refuse at once what the cluster can never place, unless it grows.

    Args:
        workers: number of workers.
        cpus: CPUs of each; Ray Data needs one more for the whole.
        gpus: GPUs of each, or the share of one.
        key: configuration key to name.

    Raises:
        LoramError: the cluster has less; the message says what is missing.
    """
    import ray

    if _autoscaling.get() != "off":
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, wanted in (("CPU", workers * cpus + 1), ("GPU", workers * gpus)):
        have = sum(node.get(kind, 0) for node in nodes)
        if have < wanted:
            raise LoramError(
                f"{key} needs {wanted:g} {kind}s in the Ray cluster, it has {math.floor(have)}; "
                "lower it, add nodes, or set ray.autoscaling where an autoscaler does"
            )
    places = sum(
        min(node.get("CPU", 0) // cpus, _places_of(node.get("GPU", 0), gpus)) for node in nodes
    )
    if places < workers:
        each = f"{cpus} CPUs" + (f" and {gpus:g} GPU" if gpus else "")
        raise LoramError(
            f"{key} needs {workers} places of {each}, each on one node, the Ray cluster's nodes "
            f"have {math.floor(places)}; lower it or add larger nodes"
        )


def advise_precision(precision: str, stage: str) -> None:
    """Say, once for a stage, that bf16 is slow where workers run on this machine's CPU.

    A CPU with AVX2 and no AVX-512 multiplies in bf16 7 to 30 times as slowly as in fp32: torch 2.13
    has no kernels for it but plain loops.

    Args:
        precision: of the workers' weights and activations.
        stage: to name, with its setting.
    """
    import ray
    import torch

    if precision != "bf16" or stage in _advised or _autoscaling.get() != "off":
        return
    if gpus_per_worker():
        return
    elsewhere = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    elsewhere -= {ray.get_runtime_context().get_node_id()}
    if not elsewhere and torch.backends.cpu.get_cpu_capability() == "AVX2":
        _advised.add(stage)
        say(
            stage.partition(".")[0],
            f"this CPU has no AVX-512: {stage}.precision=fp32 is many times faster than bf16",
        )


def _places_of(have: float, gpus: float) -> float:
    """How many fit into the GPUs of a node; a share of less than one lies on one of them."""
    if not gpus:
        return math.inf
    return have // gpus if gpus >= 1 else have * math.floor(1 / gpus + _ROUNDING)


def require_shared(folder: Path, key: str) -> None:
    """Refuse a folder that is not on storage which all nodes of the cluster share.

    Args:
        folder: where the driver will write.
        key: configuration key to name.

    Raises:
        LoramError: a node does not see what the driver wrote there.
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
                f"{key} must be on storage that all nodes share, {folder} is not the same folder "
                f"on node {node['NodeManagerAddress']} ({node['NodeID'][:8]}); name a folder on "
                "NFS or the like, mounted on all of them"
            )


def _exists(path: str) -> bool:
    return Path(path).exists()


def run_in_actor(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    cpus: int,
    max_failures: int,
    wait: Callable[[Callable[[float], bool]], None],
    gpus: float = 1,
) -> Any:
    """Run a function in one Ray actor with a GPU where there is one, and return its result.

    An actor that dies is replaced and the function called again, so it must resume by itself.

    Args:
        function: a function of a module (not a closure).
        arguments: its arguments.
        cpus: logical CPUs, and threads, of the actor.
        max_failures: deaths survived.
        wait: called with a function that waits some seconds and tells whether the work is done.
        gpus: share of a GPU, where there is one.

    Raises:
        LoramError: the function raised it, or the actor died too often.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    actor = actor_of(_Caller, cpus, gpus, max_failures).remote()
    result = actor.call.remote(function, arguments)

    def finished(seconds: float) -> bool:
        return bool(ray.wait([result], timeout=seconds)[0])

    try:
        wait(finished)
        return ray.get(result)
    except RayTaskError as error:
        raise cause_of(error) from error
    except RayActorError as error:
        raise LoramError(
            f"the worker died more than max_failures = {max_failures} times ({error}); "
            "see Ray's logs, often it is memory: lower micro_batch_size or max_length"
        ) from error
    finally:
        ray.kill(actor)


def actor_of(
    kind: type, cpus: int, gpus: float, max_failures: int, calls_at_a_time: int = 1
) -> Any:
    """A class of actors of so many logical CPUs, and threads, with a share of a GPU, if any."""
    import ray

    return ray.remote(kind).options(
        num_cpus=cpus,
        num_gpus=gpus_per_worker(gpus),
        max_restarts=max_failures,
        max_task_retries=max_failures,
        max_concurrency=calls_at_a_time,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}},
    )


def cause_of(error: Any) -> BaseException:
    """What was raised in a worker: our errors and the system's as they are, with their errno."""
    found: BaseException = error
    return error.cause if isinstance(error.cause, LoramError | OSError) else found


class _Caller:
    """The actor: calls what it is given."""

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


def _authenticate_embedded_ray() -> None:
    """Give an embedded Ray a token of its own, unless the user has chosen otherwise.

    Ray reads these when it is first imported; other users of the machine cannot connect without.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
