"""Signals end a command that waits: for a hub's answer, for a lock that another process holds."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path

import pytest

import loram_ray as lr
from helpers import hub as hubs
from helpers import tiny
from helpers.processes import CommandProcess, write_run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
REPO = "someone/small-model"


def assert_interrupted(command: CommandProcess, number: signal.Signals) -> None:
    code = command.end(40)
    line = f"loram: interrupted by {number.name}; run the same command again to continue"
    assert (code, command.err.splitlines()[-1:]) == (128 + number, [line])
    assert "Traceback" not in command.err


@pytest.mark.parametrize("number", tiny.fast_of(SIGNALS, signal.SIGINT))
def test_while_a_hub_answers(base: Path, tmp_path: Path, number: signal.Signals) -> None:
    config = lr.PruneConfig(base=str(base), output=tmp_path / "pruned", ratio=0.5, layers=(1, 3))
    pruned = lr.prune(config).output
    words = ["publish"]
    for setting in ("base=b", "output=o", f"publish.repo={REPO}", f"publish.directory={pruned}"):
        words += ["--set", setting]
    with hubs.serve() as hub:
        hub.delay = 5.0
        command = CommandProcess(tmp_path, *words, **hubs.client(hub, tmp_path))
        try:
            command.when(lambda: bool(hub.requests))
            command.send(number)
            assert_interrupted(command, number)
        finally:
            command.kill()
        hub.delay = 0.0
        again = CommandProcess(tmp_path, *words, **hubs.client(hub, tmp_path))
        assert again.end(60) == 0, again.err
        assert "config.json" in hub.repositories[REPO].files()


@pytest.mark.slow
@pytest.mark.cluster
def test_while_another_process_holds_the_work_directory(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path, base, steps=1)
    work = tmp_path / ".adapter.work"
    work.mkdir()
    words = ["train", "--config", "run.yaml", "--set", f"train.model={base}"]
    words += ["--set", "train.output=adapter"]
    with open(work / "worker.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = CommandProcess(tmp_path, *words)
        try:
            command.when(lambda: _waits(command, work / "worker.lock"))
            command.send(signal.SIGTERM)
            assert_interrupted(command, signal.SIGTERM)
        finally:
            command.kill()
    again = CommandProcess(tmp_path, *words)
    assert again.end(150) == 0, again.err[-2000:]


def _waits(command: CommandProcess, lock: Path) -> bool:
    """Whether a process of the command has the lock's file open."""
    for process in command.processes():
        for link in (Path("/proc") / str(process.pid) / "fd").glob("*"):
            try:
                if link.readlink() == lock:
                    return True
            except OSError:
                continue
    return False
