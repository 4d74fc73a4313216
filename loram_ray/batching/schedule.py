"""Which task runs next, and which is given up: the rules, without Ray."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loram_ray.errors import LoramError


class WorkerDied(Exception):
    """The process that worked on a task is gone; the task may be tried again."""


@dataclass
class Outcome:
    """What became of a task.

    Attributes:
        name: the task's.
        state: ``done``, ``skipped`` (complete before) or ``failed``.
        reason: why it failed.
        deaths: workers that died of it.
        details: results.
    """

    name: str
    state: str
    reason: str = ""
    deaths: int = 0
    details: dict[str, Any] = field(default_factory=dict)


def run_tasks(
    names: Sequence[str],
    workers: int,
    work: Callable[[int, str], Outcome],
    ended: Callable[[Outcome], None],
    max_deaths: int,
    replace: Callable[[int], None],
    tick: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Work through tasks, several at a time; one that fails harms no other.

    Args:
        names: of the tasks, those that begin first in front.
        workers: tasks at a time.
        work: does one, given a worker's number and the task's name; called in threads. It raises
            `WorkerDied` where the task may be tried again, and anything else where it failed.
        ended: told each outcome, one after another.
        max_deaths: deaths of its worker that a task survives.
        replace: makes a new worker of this number.
        tick: called now and then while there is work.

    Returns:
        Outcomes in the order of the names.
    """
    waiting = deque(names)
    outcomes: dict[str, Outcome] = {}
    lock = threading.Lock()
    stopped = threading.Event()
    broken: list[BaseException] = []

    def next_name() -> str | None:
        with lock:
            return waiting.popleft() if waiting and not stopped.is_set() else None

    def keep(outcome: Outcome) -> None:
        with lock:
            outcomes[outcome.name] = outcome
            ended(outcome)

    def loop(worker: int) -> None:
        try:
            while (name := next_name()) is not None:
                outcome = _until_it_ends(worker, name, work, max_deaths, replace, stopped)
                if outcome is not None:
                    keep(outcome)
        except BaseException as error:  # not of a task: of the schedule itself
            broken.append(error)
            stopped.set()

    threads = [
        threading.Thread(target=loop, args=(number,), daemon=True)
        for number in range(min(workers, len(names)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # so that an interrupt is heard
                tick()
    except BaseException:
        stopped.set()
        raise
    if broken:
        raise broken[0]
    return [outcomes[name] for name in names]


def _until_it_ends(
    worker: int,
    name: str,
    work: Callable[[int, str], Outcome],
    max_deaths: int,
    replace: Callable[[int], None],
    stopped: threading.Event,
) -> Outcome | None:
    deaths = 0
    while True:
        try:
            outcome = work(worker, name)
            outcome.deaths = deaths
            return outcome
        except WorkerDied as error:
            if stopped.is_set():
                return None
            deaths += 1
            replace(worker)
            if deaths > max_deaths:
                reason = f"its worker died {deaths} times ({error})"
                return Outcome(name, "failed", reason, deaths)
        except Exception as error:
            if stopped.is_set():
                return None
            kind = "" if isinstance(error, LoramError) else f"{type(error).__name__}: "
            return Outcome(name, "failed", f"{kind}{error}", deaths)
