"""Progress of stages: a bar on a terminal, periodic lines elsewhere, and metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loram_ray.utils.files import read_regular, write_atomic
from loram_ray.utils.parsing.text import decode
from loram_ray.utils.printing import PlainConsole, plain

METRICS_FILE = "metrics.jsonl"
HELD_OUT = "held_out_nll_"
"""Prefix of the metrics for alignment's loss on each source's held-out documents."""
_LINE_EVERY_SECONDS = 5.0
_STILL_THERE_EVERY_SECONDS = 30.0
_NOT_SHOWN = ("data_s", "checkpoint_s", "copy_s")
_notices: list[tuple[str, str]] = []


class Reporter:
    """Displays the progress of a stage on standard error.

    Args:
        stage: Name of the stage.
        total: Total amount of work.
        unit: Unit of the amount: ``step``, ``example`` or ``B`` (bytes).
        line_every: Seconds between lines where there is no terminal.
    """

    def __init__(
        self, stage: str, total: int, unit: str, line_every: float = _LINE_EVERY_SECONDS
    ) -> None:
        self._stage, self._total, self._unit = stage, max(total, 1), unit
        self._done, self._line_every = 0, line_every
        self._shown = -1
        self._started = self._last_line = time.monotonic()
        self._first_done: int | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<10}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[amount]}  {task.fields[metrics]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=PlainConsole(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=self._total, amount="", metrics="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            print_notices()
            self._bar.start()
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif exc_type is None and self._last_line > self._started:
            self._line("done")

    def advance(self, amount: int) -> None:
        """Add to the completed work."""
        self.update(self._done + amount, {})

    def update(self, done: int, metrics: dict[str, Any]) -> None:
        """Set the completed work and the metrics to display; a metric ``total`` sets the total."""
        self._done = done
        metrics = dict(metrics)
        self._total = metrics.pop("total", self._total)
        if self._first_done is None:
            self._first_done = done
            self._started_first = time.monotonic()
        shown = plain("  ".join(f"{k} {_short(v)}" for k, v in metrics.items()))
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, total=self._total, amount=self._amount(), metrics=shown
            )
        elif self._line_is_due():
            self._line(f"{shown}  {self._time_left()}")

    def waiting(self, reason: str) -> None:
        """Display at intervals why no work is done yet."""
        if self._bar is not None:
            self._bar.update(self._task, amount=self._amount(), metrics=plain(reason))
        elif self._line_is_due():
            self._line(reason)

    def _line_is_due(self) -> bool:
        waited = time.monotonic() - self._last_line
        moved = self._done != self._shown
        return waited >= (self._line_every if moved else _STILL_THERE_EVERY_SECONDS)

    def _amount(self) -> str:
        if self._unit == "B":
            return f"{self._done / 1e6:,.0f}/{self._total / 1e6:,.0f} MB"
        return f"{self._unit} {self._done:,}/{self._total:,}"

    def _time_left(self) -> str:
        advanced = self._done - (self._first_done or 0)
        if advanced <= 0:
            return ""
        seconds = (time.monotonic() - self._started_first) / advanced * (self._total - self._done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _line(self, text: str) -> None:
        self._last_line, self._shown = time.monotonic(), self._done
        say(self._stage, f"{self._amount()}  {text}")


def say(stage: str, text: str) -> None:
    """Print one line about a stage on standard error."""
    print_notices()
    print(plain(f"{stage:<10} {text}"), file=sys.stderr, flush=True)


@contextmanager
def notice(stage: str, text: str | None) -> Iterator[None]:
    """Print one line when the block's work begins, at the latest at its end.

    A mistake that prevents the work is then the only line.

    Args:
        stage: Name of the stage.
        text: The line; None for none.
    """
    _notices[:] = [(stage, text)] if text else []
    try:
        yield
        print_notices()
    finally:
        _notices.clear()


def print_notices() -> None:
    """Print the line of `notice` if it has not been printed."""
    while _notices:
        say(*_notices.pop())


class MetricsLog:
    """Appends one JSON object per step to ``metrics.jsonl``; a resumed run continues the file.

    Args:
        path: Path of the file.
        resume_at: Number of completed steps; later lines of an earlier attempt are dropped.
        count_restarts: Whether to add the number of restarts so far to each line, as ``restarts``.
    """

    def __init__(self, path: Path, resume_at: int = 0, count_restarts: bool = True) -> None:
        before = read_metrics(path)
        self._restarts = restarts_in(before) + 1 if count_restarts and path.exists() else 0
        kept = [line for line in before if resume_at and line["step"] <= resume_at]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path

    def write(self, step: int, **metrics: float | str | list[int]) -> None:
        """Append the metrics of a step."""
        restarts = {"restarts": self._restarts} if self._restarts else {}
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **metrics, **restarts}) + "\n")


def follow(
    reporter: Reporter,
    path: Path,
    finished: Callable[[float], bool],
    tracking: Callable[[list[dict[str, Any]]], None] | None = None,
) -> None:
    """Display the last line of ``metrics.jsonl`` until ``finished`` returns True.

    Args:
        reporter: Display of the stage's progress.
        path: File that a worker appends to.
        finished: Function that waits up to the given number of seconds and returns whether the
            work is done.
        tracking: Callback that repeatedly receives all lines, the last time after the end.
    """
    ended = False
    while not ended:
        ended = finished(0.5)
        lines = read_metrics(path)
        if tracking is not None:
            tracking(lines)
        if lines:
            newest = {k: v for k, v in lines[-1].items() if k not in _NOT_SHOWN}
            reporter.update(newest.pop("step"), newest)
        else:
            reporter.waiting("starting workers")


def last_step(path: Path) -> int:
    """Return the last step in ``metrics.jsonl``, or 0 if there is none."""
    line = last_line(path)
    return int(line["step"]) if line else 0


def last_line(path: Path, having: str = "step") -> dict[str, Any] | None:
    """Return the last line of ``metrics.jsonl`` with the key ``having``, or None."""
    return next((line for line in reversed(read_metrics(path)) if having in line), None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of ``metrics.jsonl`` with a step; none if it does not exist."""
    return [line for line in read_lines(path) if type(line.get("step")) is int]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON Lines file of objects; none if it does not exist."""
    try:
        text = decode(read_regular(path), str(path), "delete the file")
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # incomplete line of a killed writer
        if isinstance(value, dict):
            lines.append(value)
    return lines


def restarts_in(lines: Sequence[dict[str, Any]]) -> int:
    """Return how often a run was restarted, according to the lines of ``metrics.jsonl``."""
    return max((line.get("restarts", 0) for line in lines), default=0)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
