"""Schedule tasks over workers, with retries; independent of Ray.

`ray.util.ActorPool` does none of this: it has no retries, does not replace dead actors, and runs
one task at a time in an actor.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loram_ray.errors import one_line

_CLEANING = 10.0
"""Time limit in seconds for threads to clean up after an interruption."""


class WorkerDied(Exception):
    """Raised when the process that runs a task died; the task can be retried."""


@dataclass
class Outcome:
    """Outcome of a task.

    Attributes:
        name: Name of the task.
        state: ``done``, ``skipped`` (already complete) or ``failed``.
        reason: Reason of the failure.
        deaths: Number of workers that died while they ran this task alone.
        details: Results of the task.
        error: Exception that made the task fail, unless its worker died.
    """

    name: str
    state: str
    reason: str = ""
    deaths: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class Schedule:
    """Queue of tasks and the outcomes of finished ones; not thread-safe.

    If a process dies while it runs several tasks, any of them may be the cause. Each then runs
    alone in a process until it ends, and only deaths during such a run count against it.

    Args:
        names: Names of the tasks, in the order in which they start.
        max_deaths: Number of worker deaths to tolerate per task.
    """

    def __init__(self, names: Sequence[str], max_deaths: int) -> None:
        self._names, self._max_deaths = list(names), max_deaths
        self._waiting = deque(names)
        self._deaths: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}

    def take(self) -> str | None:
        """Remove and return the next task, or None if the queue is empty."""
        return self._waiting.popleft() if self._waiting else None

    def is_suspect(self, name: str) -> bool:
        """Return whether a task must run alone in its process."""
        return name in self._suspects

    def died(self, name: str, reason: str, alone: bool = True) -> Outcome | None:
        """Record that a task's worker died: requeue the task first, or return its failure.

        Args:
            name: Name of the task.
            reason: Reason of the death.
            alone: Whether the task ran alone in the process.
        """
        self._suspects.add(name)
        self._deaths[name] += alone
        if self._deaths[name] <= self._max_deaths:
            self._waiting.appendleft(name)
            return None
        times = self._deaths[name]
        return self.ended(Outcome(name, "failed", f"its worker died {times} times ({reason})"))

    def ended(self, outcome: Outcome) -> Outcome:
        """Record and return the outcome of a task."""
        outcome.deaths = self._deaths[outcome.name]
        self._outcomes[outcome.name] = outcome
        return outcome

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of all finished tasks, in the order in which the tasks were given."""
        return [self._outcomes[name] for name in self._names if name in self._outcomes]


class _Process:
    """Admission of tasks to a worker's process; an exclusive task waits until all others leave."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = self._waiting = 0
        self._taken = False
        self._changed = threading.Condition()

    @contextmanager
    def entered(self, alone: bool) -> Iterator[bool]:
        """Enter the process for the block; yield whether no other task can enter."""
        with self._changed:
            self._waiting += alone
            while self._taken or (self._inside if alone else self._waiting):
                self._changed.wait()
            self._waiting -= alone
            self._inside += 1
            self._taken = alone
        try:
            yield alone or self._most == 1
        finally:
            with self._changed:
                self._inside -= 1
                self._taken = False
                self._changed.notify_all()


class _Run:
    """The threads' part of `run_tasks`, whose arguments it takes.

    Attributes:
        stopped: Set when no further task is to start.
        broken: Errors of the schedule itself, not of a task.
    """

    def __init__(
        self,
        schedule: Schedule,
        work: Callable[[int, str], Outcome],
        ended: Callable[[Outcome], None],
        idle: Callable[[int], None],
        slots: list[int],
    ) -> None:
        self._schedule, self._work, self._ended, self._idle = schedule, work, ended, idle
        self._processes = [_Process(count) for count in slots]
        self._working = list(slots)
        self._lock = threading.Lock()
        self.stopped = threading.Event()
        self.broken: list[BaseException] = []

    def loop(self, worker: int) -> None:
        """Run one task after the other on a worker."""
        try:
            while not self.stopped.is_set():
                with self._lock:
                    name = self._schedule.take()
                    self._working[worker] -= name is None
                    last = not self._working[worker]
                if name is None:
                    if last:
                        self._idle(worker)
                    return
                with self._lock:
                    suspect = self._schedule.is_suspect(name)
                with self._processes[worker].entered(suspect) as alone:
                    self._run(worker, name, alone)
        except BaseException as error:
            self.broken.append(error)
            self.stopped.set()

    def _run(self, worker: int, name: str, alone: bool) -> None:
        try:
            outcome = self._work(worker, name)
        except WorkerDied as error:
            if self.stopped.is_set():
                return
            with self._lock:
                given_up = self._schedule.died(name, str(error), alone)
                if given_up is not None:
                    self._ended(given_up)
            return
        except Exception as error:
            if self.stopped.is_set():
                return
            outcome = Outcome(name, "failed", one_line(error), error=error)
        with self._lock:
            self._ended(self._schedule.ended(outcome))


def run_tasks(
    schedule: Schedule,
    workers: int,
    work: Callable[[int, str], Outcome],
    ended: Callable[[Outcome], None],
    tick: Callable[[], None] = lambda: None,
    tasks_per_worker: int = 1,
    idle: Callable[[int], None] = lambda worker: None,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Run all tasks of a schedule concurrently; a failed task does not affect the others.

    An interruption stops the workers and waits briefly for the threads to clean up.

    Args:
        schedule: Schedule of the tasks.
        workers: Number of worker processes.
        work: Function that runs one task, given the worker's number and the task's name. It is
            called in threads, and raises `WorkerDied` if the task can be retried, or any other
            exception if it failed.
        ended: Callback for each outcome; calls do not overlap.
        tick: Callback that is called periodically while tasks run.
        tasks_per_worker: Number of concurrent tasks per worker.
        idle: Callback for the number of a worker that gets no further task.
        stop: Callback that stops all workers, called if the run is aborted.
    """
    run = _Run(schedule, work, ended, idle, [tasks_per_worker] * workers)
    threads = [
        threading.Thread(target=run.loop, args=(worker,), daemon=True)
        for _ in range(tasks_per_worker)
        for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # wake up regularly to handle interrupts
                tick()
        if run.broken:
            raise run.broken[0]
    except BaseException:
        run.stopped.set()
        stop()
        until = time.monotonic() + _CLEANING
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        raise
