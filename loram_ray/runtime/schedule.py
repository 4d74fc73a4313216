"""Which task runs next, and which is given up: the rules, without Ray and without a clock."""

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
"""Seconds that threads have to clean up after an interruption."""


class WorkerDied(Exception):
    """The process that worked on a task is gone; the task may be tried again."""


@dataclass
class Outcome:
    """What became of a task.

    Attributes:
        name: the task's.
        state: ``done``, ``skipped`` (complete before) or ``failed``.
        reason: why it failed.
        deaths: workers that died of it and of nothing else.
        details: results.
        error: that made it fail, unless its worker died.
    """

    name: str
    state: str
    reason: str = ""
    deaths: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class Schedule:
    """Tasks that wait, and what became of the others; not to be used by two threads at a time.

    Of tasks that share a process when it dies, none is known to be to blame: each then has a
    process to itself until its end, and only deaths of such a one count against it.

    Args:
        names: of the tasks, those that begin first in front.
        max_deaths: deaths of its worker that a task survives.
    """

    def __init__(self, names: Sequence[str], max_deaths: int) -> None:
        self._names, self._max_deaths = list(names), max_deaths
        self._waiting = deque(names)
        self._deaths: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}

    def take(self) -> str | None:
        """The task that begins next, or None where none waits."""
        return self._waiting.popleft() if self._waiting else None

    def is_suspect(self, name: str) -> bool:
        """Whether a task must be alone in its process."""
        return name in self._suspects

    def died(self, name: str, reason: str, alone: bool = True) -> Outcome | None:
        """A task's worker is gone: the task is next again, or given up, which is its outcome.

        Args:
            name: of the task.
            reason: of the death.
            alone: whether no other task was in that process.
        """
        self._suspects.add(name)
        self._deaths[name] += alone
        if self._deaths[name] <= self._max_deaths:
            self._waiting.appendleft(name)
            return None
        times = self._deaths[name]
        return self.ended(Outcome(name, "failed", f"its worker died {times} times ({reason})"))

    def ended(self, outcome: Outcome) -> Outcome:
        """Keep what became of a task."""
        outcome.deaths = self._deaths[outcome.name]
        self._outcomes[outcome.name] = outcome
        return outcome

    @property
    def outcomes(self) -> list[Outcome]:
        """Of all tasks that have ended, in the order of their names."""
        return [self._outcomes[name] for name in self._names if name in self._outcomes]


class _Process:
    """Who is in a worker's process; one that must be alone waits until all others have left."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = self._waiting = 0
        self._taken = False
        self._changed = threading.Condition()

    @contextmanager
    def entered(self, alone: bool) -> Iterator[bool]:
        """Be inside; tells whether no other can be."""
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
    """Work through a schedule, several tasks at a time; one that fails harms no other.

    An interruption stops the workers and waits a moment for the threads, which clean up.

    Args:
        schedule: of the tasks.
        workers: processes.
        work: does one, given a worker's number and the task's name; called in threads. It raises
            `WorkerDied` where the task may be tried again, and anything else where it failed.
        ended: told each outcome, one after another.
        tick: called now and then while there is work.
        tasks_per_worker: tasks at a time in a worker.
        idle: told the number of a worker that gets no more task.
        stop: ends all workers; called when the schedule ends before its tasks.
    """
    lock = threading.Lock()
    stopped = threading.Event()
    broken: list[BaseException] = []
    processes = [_Process(tasks_per_worker) for _ in range(workers)]
    working = [tasks_per_worker] * workers

    def one(worker: int, name: str) -> None:
        with lock:
            suspect = schedule.is_suspect(name)
        with processes[worker].entered(suspect) as alone:
            in_process(worker, name, alone)

    def in_process(worker: int, name: str, alone: bool) -> None:
        try:
            outcome = work(worker, name)
        except WorkerDied as error:
            if stopped.is_set():
                return
            with lock:
                given_up = schedule.died(name, str(error), alone)
                if given_up is not None:
                    ended(given_up)
            return
        except Exception as error:
            if stopped.is_set():
                return
            outcome = Outcome(name, "failed", one_line(error), error=error)
        with lock:
            ended(schedule.ended(outcome))

    def loop(worker: int) -> None:
        try:
            while not stopped.is_set():
                with lock:
                    name = schedule.take()
                    working[worker] -= name is None
                    last = not working[worker]
                if name is None:
                    if last:
                        idle(worker)
                    return
                one(worker, name)
        except BaseException as error:  # not of a task: of the schedule itself
            broken.append(error)
            stopped.set()

    threads = [
        threading.Thread(target=loop, args=(worker,), daemon=True)
        for _ in range(tasks_per_worker)
        for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # so that an interrupt is heard
                tick()
        if broken:
            raise broken[0]
    except BaseException:
        stopped.set()
        stop()
        until = time.monotonic() + _CLEANING
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        raise
