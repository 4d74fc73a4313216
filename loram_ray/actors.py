"""Actors that keep what they loaded, each made when there is first something for it to do."""

from __future__ import annotations

import threading
from typing import Any

from loram_ray.cluster import actor_of, cause_of
from loram_ray.errors import LoramError
from loram_ray.schedule import WorkerDied


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
        self._changing = threading.Lock()

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of an actor and wait for what it returns.

        Raises:
            WorkerDied: the actor is gone.
            LoramError: the method raised it, or an error of the system's, as it is.
            RayTaskError: it raised something else, and who knows what state the actor is in: it is
                made anew, too.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        with self._changing:
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
            raise WorkerDied(" ".join(str(error).split())[:200]) from error

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
        """Give back what all of them hold."""
        for number in list(self._made):
            self.release(number)
