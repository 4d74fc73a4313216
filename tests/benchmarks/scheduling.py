"""The batch's schedule at scale: thousands of tasks on hundreds of virtual GPUs that come and go.

    python tests/benchmarks/scheduling.py
    python tests/benchmarks/scheduling.py --durations runs/demo/batch/results.json

Time is virtual, the schedule is the one that `loram batch` uses. Durations are drawn from those of
a batch's results.json, stretched to an hour each on the average, or lognormal with a median of ten
minutes; a GPU loads the model before its first task and again when it is back. Preemptions come to
each GPU at random, once in some hours; the task goes on from its last checkpoint, on whichever GPU
takes it, and the GPU is back after some minutes. *Idle* is the share of the GPUs' time, while they
are there, between the first task's begin and the last one's end, in which they neither load nor
train: the time when fewer tasks are left than GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

from loram_ray.runtime.schedule import Outcome, Schedule

TASKS, GPUS = (1_000, 10_000), (10, 100, 500)
LOAD, CHECKPOINT, HOURS_BETWEEN, BACK = 60.0, 60.0, 6.0, 300.0


def simulate(tasks: int, gpus: int, durations: list[float], seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    left = {str(number): draw.choice(durations) for number in range(tasks)}
    schedule = Schedule(list(left), max_deaths=10**6)
    order = itertools.count()
    events: list[tuple[float, int, str, int, str]] = []
    busy = 0.0
    loaded = [False] * gpus
    idle_since: dict[int, float] = {}
    began: dict[int, tuple[str, float, float]] = {}
    generation = [0] * gpus
    preemptions = decisions = 0

    def push(at: float, kind: str, gpu: int) -> None:
        heapq.heappush(events, (at, next(order), kind, gpu, str(generation[gpu])))

    def start(gpu: int, now: float) -> None:
        nonlocal decisions
        decisions += 1
        name = schedule.take()
        if name is None:
            idle_since[gpu] = now
            return
        load = 0.0 if loaded[gpu] else LOAD
        loaded[gpu] = True
        began[gpu] = name, now, load
        push(now + load + left[name], "done", gpu)

    for gpu in range(gpus):
        push(0.0, "back", gpu)
    now, absent = 0.0, 0.0
    while True:
        now, _, kind, gpu, of = heapq.heappop(events)
        if of != str(generation[gpu]):
            continue
        if kind == "back":
            push(now + draw.expovariate(1 / (HOURS_BETWEEN * 3600)), "preempted", gpu)
            start(gpu, now)
        elif kind == "done":
            name, since, _ = began.pop(gpu)
            busy += now - since
            schedule.ended(Outcome(name, "done"))
            left.pop(name)
            if not left:
                break
            start(gpu, now)
        else:
            preemptions += 1
            generation[gpu] += 1
            loaded[gpu] = False
            idle_since.pop(gpu, None)
            if gpu in began:
                name, since, load = began.pop(gpu)
                busy += now - since
                done = max(now - since - load, 0.0)
                left[name] -= done - done % CHECKPOINT
                schedule.died(name, "preempted")
                if idle_since:  # a GPU without work takes it
                    other = next(iter(idle_since))
                    del idle_since[other]
                    start(other, now)
            absent += BACK
            push(now + BACK, "back", gpu)
    there = gpus * now - absent
    return {
        "tasks": tasks,
        "gpus": gpus,
        "hours": now / 3600,
        "preemptions": preemptions,
        "idle": 1 - busy / there,
        "decisions": decisions,
        "all_done": len(schedule.outcomes) == tasks,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--durations", type=Path, help="results.json of a batch")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    if options.durations is None:
        durations = [600 * draw.lognormvariate(0, 0.5) for _ in range(1000)]
    else:
        rows = json.loads(options.durations.read_text())
        durations = [row["seconds"] for row in rows if row["seconds"]]
        hour = 3600 * len(durations) / sum(durations)
        durations = [hour * seconds for seconds in durations]
    found = []
    for tasks, gpus in itertools.product(options.tasks, options.gpus):
        started = time.perf_counter()
        row = simulate(tasks, gpus, durations, options.seed)
        seconds = time.perf_counter() - started
        tracemalloc.start()
        simulate(tasks, gpus, durations, options.seed)
        row["microseconds_a_task"] = 1e6 * seconds / tasks
        row["peak_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        found.append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
