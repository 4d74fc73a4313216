"""Workers of a calibration: one in this process, or Ray actors.

`ray.util.ActorPool` is not used: its ordered ``map`` gives a free actor its next job only after
the results of all earlier jobs have been taken, so one slow job leaves the other actors idle. Its
``map_unordered`` does not say which job a result belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from loram_ray.config import CalibrationConfig, RayConfig
from loram_ray.pruning.text import KEY
from loram_ray.pruning.worker import CalibrationSpec, CalibrationWorker
from loram_ray.runtime.actors import actor_death_error, remote_class, unwrap_task_error
from loram_ray.runtime.cluster import gpus_per_worker, ray_session, require_resources

Job = tuple[str, tuple[Any, ...]]
"""Name of a method of `CalibrationWorker`, and its arguments."""


class Pool(Protocol):
    """Interface of worker pools."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Run jobs concurrently and yield their results in the jobs' order."""

    def share(self, value: Any) -> Any:
        """Send a large argument of several jobs only once; pass the returned value to the jobs."""


class InProcess:
    """Pool with one worker in this process."""

    def __init__(self, spec: CalibrationSpec) -> None:
        self._worker = CalibrationWorker(spec)

    def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Run the jobs one after another."""
        for method, arguments in jobs:
            yield getattr(self._worker, method)(*arguments)

    def share(self, value: Any) -> Any:
        """Return the value unchanged."""
        return value


class RayPool:
    """Pool of Ray actors; an actor that dies is replaced and its job is retried.

    Args:
        spec: Settings of each worker.
        config: Number and size of the workers.
        cpus: Number of logical CPUs, and of threads, of each worker.
    """

    def __init__(self, spec: CalibrationSpec, config: CalibrationConfig, cpus: int) -> None:
        import ray

        self._ray = ray
        self._max_failures = config.max_failures
        actor_class = remote_class(CalibrationWorker, cpus, 1, config.max_failures)
        self._actors = [actor_class.remote(spec) for _ in range(config.workers)]

    def run(self, jobs: Sequence[Job]) -> Iterator[Any]:
        """Run jobs on free actors and yield the results in order."""
        waiting = list(reversed(list(enumerate(jobs))))
        free, running, done = list(self._actors), {}, {}
        following = 0
        while following < len(jobs):
            while free and waiting:
                number, (method, arguments) = waiting.pop()
                actor = free.pop()
                running[getattr(actor, method).remote(*arguments)] = number, actor
            if following not in done:
                for reference in self._ray.wait(list(running))[0]:
                    number, actor = running.pop(reference)
                    free.append(actor)
                    done[number] = reference
                continue
            yield self._result(done.pop(following))
            following += 1

    def share(self, value: Any) -> Any:
        """Put the value into Ray's object store."""
        return self._ray.put(value)

    def close(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def _result(self, reference: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            raise unwrap_task_error(error) from error
        except RayActorError as error:
            raise actor_death_error(error, f"{KEY}.max_failures", self._max_failures) from error


def threads_of(config: CalibrationConfig) -> int:
    """Return the CPUs and threads of each worker; by default, an equal share of this machine's."""
    return config.cpus_per_worker or max((os.cpu_count() or 1) // config.workers, 1)


@contextmanager
def ray_pool(
    spec: CalibrationSpec, config: CalibrationConfig, ray_config: RayConfig
) -> Iterator[RayPool]:
    """Start Ray and the configured workers for the block.

    Raises:
        LoramError: If the cluster can never place the workers.
    """
    cpus = threads_of(config)
    with ray_session(ray_config, cpus * config.workers):
        require_resources(config.workers, cpus, gpus_per_worker(), f"{KEY}.workers")
        pool = RayPool(spec, config, cpus)
        try:
            yield pool
        finally:
            pool.close()
