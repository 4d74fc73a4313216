"""Run functions in Ray actors, and keep actors with loaded state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from loram_ray.errors import LoramError, one_line
from loram_ray.runtime.cluster import gpus_per_worker
from loram_ray.runtime.schedule import WorkerDied

_OF_OURS = f"{LoramError.__module__}.{LoramError.__name__}: "


def run_in_actor(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    cpus: int,
    max_failures: int,
    wait: Callable[[Callable[[float], bool]], None],
    gpus: float = 1,
) -> Any:
    """Run a function in one Ray actor, on a GPU if there is one, and return its result.

    If the actor dies, it is restarted and the function is called again. The function must therefore
    resume its own work.

    Args:
        function: Module-level function to run (not a closure).
        arguments: Positional arguments of the function.
        cpus: Number of logical CPUs, and of threads, of the actor.
        max_failures: Number of actor failures to tolerate.
        wait: Callback that receives a function ``finished(seconds)``, which waits up to that long
            and returns whether the work is done.
        gpus: GPU share of the actor, if there are GPUs.

    Raises:
        LoramError: The function raised it, or the actor died too often.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    actor = remote_class(_Caller, cpus, gpus, max_failures).remote()
    result = actor.call.remote(function, arguments)

    def finished(seconds: float) -> bool:
        return bool(ray.wait([result], timeout=seconds)[0])

    try:
        wait(finished)
        return ray.get(result)
    except RayTaskError as error:
        raise unwrap_task_error(error) from error
    except RayActorError as error:
        raise actor_death_error(error, "max_failures", max_failures) from error
    finally:
        ray.kill(actor)


def remote_class(
    kind: type, cpus: int, gpus: float, max_failures: int, calls_at_a_time: int = 1
) -> Any:
    """Return a Ray actor class with this many CPUs (and threads) and this GPU share."""
    import ray

    return ray.remote(kind).options(
        num_cpus=cpus,
        num_gpus=gpus_per_worker(gpus),
        max_restarts=max_failures,
        max_task_retries=max_failures,
        max_concurrency=calls_at_a_time,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}},
    )


def unwrap_task_error(error: Any) -> BaseException:
    """Return the `LoramError` or `OSError` that a Ray task error wraps, or the error itself."""
    wrapper: BaseException = error
    return error.cause if isinstance(error.cause, LoramError | OSError) else wrapper


def actor_death_error(error: Any, key: str, max_failures: int) -> BaseException:
    """Return the exception to raise for a dead actor.

    Args:
        error: Ray's actor error.
        key: Configuration key of the tolerated failures, for the message.
        max_failures: Value of the key.
    """
    if error.actor_init_failed:  # the constructor would fail again
        line = one_line(error).partition(": ")[2]
        if line.startswith(_OF_OURS):
            return LoramError(line.removeprefix(_OF_OURS))
        wrapper: BaseException = error
        return wrapper
    return LoramError(
        f"a worker died more than {key} = {max_failures} times ({one_line(error)}); it probably "
        "ran out of memory: lower the batch size or the sequence length"
    )


class _Caller:
    """Actor that calls any function."""

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class Actors:
    """Actors addressed by worker number, created on first use and after their death.

    Args:
        kind: Class of the actors.
        arguments: Arguments of its constructor.
        cpus: Number of logical CPUs, and of threads, of each actor.
        gpus: GPU share of each actor, if there are GPUs.
        calls_at_a_time: Number of concurrent calls in one actor.
    """

    def __init__(
        self,
        kind: type,
        arguments: tuple[Any, ...],
        cpus: int,
        gpus: float,
        calls_at_a_time: int = 1,
    ) -> None:
        self._class = remote_class(
            kind, cpus, gpus, max_failures=0, calls_at_a_time=calls_at_a_time
        )
        self._arguments = arguments
        self._made: dict[int, Any] = {}
        self._stopped = False
        self._changing = threading.Lock()

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of an actor and return its result.

        Raises:
            WorkerDied: The actor died, or all actors were stopped.
            LoramError: The method raised it.
            OSError: The method raised it.
            RayTaskError: The method raised anything else. The state of the actor is unknown, so it
                is killed and created again at the next call.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        with self._changing:
            if self._stopped:
                raise WorkerDied("all workers have been stopped")
            if number not in self._made:
                self._made[number] = self._class.remote(*self._arguments)
            actor = self._made[number]
        try:
            return ray.get(getattr(actor, method).remote(*arguments))
        except RayTaskError as error:
            cause = unwrap_task_error(error)
            if not isinstance(cause, LoramError | OSError):
                self._forget(number, actor)
                ray.kill(actor)
            raise cause from error
        except RayActorError as error:
            self._forget(number, actor)
            if error.actor_init_failed:
                raise actor_death_error(error, "max_failures", 0) from error
            raise WorkerDied(one_line(error)) from error

    def _forget(self, number: int, actor: Any) -> None:
        with self._changing:
            if self._made.get(number) is actor:  # unless another thread has replaced it
                del self._made[number]

    def release(self, number: int) -> None:
        """Kill an actor and free its resources for others, or for the cluster to scale down."""
        import ray

        with self._changing:
            actor = self._made.pop(number, None)
        if actor is not None:
            ray.kill(actor)

    def stop(self) -> None:
        """Kill all actors; later calls fail."""
        with self._changing:
            self._stopped = True
        for number in list(self._made):
            self.release(number)
