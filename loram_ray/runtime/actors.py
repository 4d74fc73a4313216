"""Ray actors: one for a function, or several that keep what they loaded."""

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
        raise death_of(error, "max_failures", max_failures) from error
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


def death_of(error: Any, key: str, max_failures: int) -> BaseException:
    """What to raise for an actor that is gone: as a mistake of ours, or why it is gone.

    Args:
        error: Ray's.
        key: of the configuration, that says how many deaths are survived.
        max_failures: its value.
    """
    if error.actor_init_failed:  # its constructor raised, and would again
        line = one_line(error).partition(": ")[2]
        if line.startswith(_OF_OURS):
            return LoramError(line.removeprefix(_OF_OURS))
        found: BaseException = error
        return found
    return LoramError(
        f"a worker died more than {key} = {max_failures} times ({one_line(error)}); "
        "often it is memory: lower the batch size, or the length of what is in it"
    )


class _Caller:
    """The actor: calls what it is given."""

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)


class Actors:
    """An actor for each worker's number; one that died is made anew at the next call.

    Args:
        kind: class of the actors.
        arguments: of its constructor.
        cpus: logical CPUs, and threads, of each.
        gpus: share of a GPU of each, where there is one.
        calls_at_a_time: in one actor.
    """

    def __init__(
        self,
        kind: type,
        arguments: tuple[Any, ...],
        cpus: int,
        gpus: float,
        calls_at_a_time: int = 1,
    ) -> None:
        self._class = actor_of(kind, cpus, gpus, max_failures=0, calls_at_a_time=calls_at_a_time)
        self._arguments = arguments
        self._made: dict[int, Any] = {}
        self._stopped = False
        self._changing = threading.Lock()

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of an actor and wait for what it returns.

        Raises:
            WorkerDied: the actor is gone, or all have been stopped.
            LoramError: the method raised it, or an error of the system's, as it is.
            RayTaskError: it raised something else, and who knows what state the actor is in: it is
                made anew, too.
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
            cause = cause_of(error)
            if not isinstance(cause, LoramError | OSError):
                self._forget(number, actor)
                ray.kill(actor)
            raise cause from error
        except RayActorError as error:
            self._forget(number, actor)
            if error.actor_init_failed:
                raise death_of(error, "max_failures", 0) from error
            raise WorkerDied(one_line(error)) from error

    def _forget(self, number: int, actor: Any) -> None:
        with self._changing:
            if self._made.get(number) is actor:  # and no other thread was here before
                del self._made[number]

    def release(self, number: int) -> None:
        """Give back what an actor holds: another may wait for it, or the cluster shrinks."""
        import ray

        with self._changing:
            actor = self._made.pop(number, None)
        if actor is not None:
            ray.kill(actor)

    def stop(self) -> None:
        """Give back what all of them hold; later calls fail."""
        with self._changing:
            self._stopped = True
        for number in list(self._made):
            self.release(number)
