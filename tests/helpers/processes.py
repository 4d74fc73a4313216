"""A small run, its commands in separate processes, and the files that they leave."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from helpers import tiny

MARK = "LORAM_TEST_COMMAND"
_OPTIMISER = {"learning_rate": 3e-3, "warmup_steps": 1}


def write_run(folder: Path, base: Path, steps: int = 8, **sections: Any) -> Path:
    """Write a run file of every stage, with paths relative to its folder, and its inputs."""
    tiny.write_jsonl(folder / "data.jsonl", tiny.questions())
    tiny.write_jsonl(folder / "text.jsonl", tiny.texts())
    text = {"sources": [{"path": "text.jsonl"}], "sequence_length": 32}
    training = {"precision": "fp32", "batch_size": 4, "optimiser": _OPTIMISER}
    settings = {
        "base": str(base),
        "output": "out",
        "ray": {"num_cpus": 4},
        "prune": {
            "method": "taylor",
            "ratio": 0.5,
            "layers": [1, 3],
            "calibration": {**text, "samples": 32, "cpus_per_worker": 1},
        },
        "align": {
            "corpus": text,
            "objective": "causal_lm",
            "steps": steps,
            "micro_batch_size": 2,
            "workers": 1,
            "cpus_per_worker": 1,
            "checkpoint_every": 2,
            **training,
        },
        "train": {
            "data": "data.jsonl",
            "steps": steps,
            "checkpoint_every": 2,
            "cpus": 1,
            **training,
        },
        "batch": {
            "tasks": [{"name": "one", "data": "data.jsonl"}, {"name": "two", "data": "data.jsonl"}],
            "train": {**training, "steps": steps, "checkpoint_every": 2},
        },
        "sweep": {
            "data": "data.jsonl",
            "grid": {"lora.r": [2, 4]},
            "workers": 1,
            "cpus_per_worker": 1,
            "train": {
                **training,
                "steps": steps,
                "eval_share": 0.2,
                "evaluate_every": steps,
                "checkpoint_every": 2,
            },
        },
        "quantize": {},
        "export": {},
        "recover": {},
        "merge": {},
        "evaluate": {"data": "data.jsonl", "precision": "fp32", "workers": 1, "cpus_per_worker": 1},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class CommandProcess:
    """A ``loram`` command in its own process group, as if started by a terminal.

    Args:
        folder: Directory in which the command runs and its output files are written.
        words: Arguments of the command.
        variables: Environment variables in addition to this process's.
    """

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.mark = secrets.token_hex(8)
        self._err = folder / f"{self.mark}.err"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | {
            "OMP_NUM_THREADS": "1",
            "RAY_memory_monitor_refresh_ms": "0",  # ignores the memory that other tests use
            MARK: self.mark,
            **variables,
        }
        with open(self._err, "wb") as err, open(folder / f"{self.mark}.out", "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "loram_ray.cli", *words],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=default_signals,
            )

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text()

    def own_lines(self) -> list[str]:
        """Return the lines of standard error without progress."""
        return [line for line in self.err.splitlines() if line.startswith("loram: ")]

    def when(self, reached: Callable[[], bool], seconds: float = 200) -> None:
        """Wait for a condition that must be met before the command ends."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None, f"it ended before: {self.err[-2000:]}"
            assert time.monotonic() < deadline, self.err[-2000:]
            time.sleep(0.005)

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to its group as a terminal does."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def end(self, seconds: float = 300) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(seconds)

    def processes(self) -> list[psutil.Process]:
        """Return all processes that the command started, including reparented ones."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = process.environ().get(MARK) == self.mark
                if ours and process.pid != self.process.pid:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill the command and all processes that it started."""
        self.process.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def default_signals() -> None:
    """Restore default signals in a child process, as shells ignore some for background jobs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def contents(output: Path) -> dict[str, str]:
    """Return the hashes of all weights that were written."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*.safetensors"))
    }


def lines_in(path: Path) -> int:
    """Return the number of lines of a file, which may not exist yet."""
    with contextlib.suppress(OSError):
        return path.read_text().count("\n")
    return 0


def has_bytes(directory: Path) -> bool:
    """Return whether a directory contains a non-empty file."""
    try:
        return any(entry.is_file() and entry.stat().st_size > 0 for entry in directory.rglob("*"))
    except OSError:
        return False


COMMAND = [sys.executable, "-m", "loram_ray.cli"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
