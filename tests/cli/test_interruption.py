"""Signals end each command with one line, one exit code, and nothing left; the same goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import tiny
from helpers.processes import (
    CommandProcess,
    contents,
    default_signals,
    has_bytes,
    lines_in,
    write_run,
)
from loram_ray.runtime.interruption import CONTINUE, Interruption, handlers_kept

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
Moment = Callable[[Path, CommandProcess], bool]


def _partial(name: str) -> Moment:
    return lambda out, command: has_bytes(out / f".{name}.partial")


def _steps(name: str, count: int = 3) -> Moment:
    return lambda out, command: lines_in(out / f".{name}.work" / "metrics.jsonl") >= count


def _learning(folder: str) -> Moment:
    return lambda out, command: any(
        lines_in(path) >= 3 for path in (out / folder).rglob("metrics.jsonl")
    )


def _starting(out: Path, command: CommandProcess) -> bool:
    return any("gcs_server" in process.name() for process in command.processes())


# stage, the moment of the signal
MOMENTS: dict[str, tuple[str, Moment]] = {
    "prune": ("prune", lambda out, c: has_bytes(out / ".pruned.work")),
    "Ray starts": ("prune", _starting),
    "corpus": ("align", lambda out, c: (out / ".aligned_corpus.work").exists()),
    "align": ("align", _steps("aligned")),
    "train": ("train", _steps("adapter_pruned")),
    "recover": ("recover", _partial("adapter")),
    "merge": ("merge", _partial("merged")),
    "evaluate": ("evaluate", lambda out, c: (out / "evaluation" / ".loram.work").exists()),
    "run": ("run", _steps("aligned")),
    "batch": ("batch", _learning("batch")),
    "sweep": ("sweep", _learning(".sweep.work")),
    "quantize": ("quantize", _partial("quantized")),
    "export": ("export", _partial("gguf")),
}
"""Where a signal is sent."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone, on a model large enough to be hit while it is written."""
    folder = tmp_path_factory.mktemp("finished")
    sizes = {"hidden": 256, "head_dim": 32, "intermediate": 1024, "layers": 4}
    base = tiny.write_base(folder / "base", **sizes)
    write_run(folder, base, steps=40)
    command = CommandProcess(folder, "run", "--config", "run.yaml")
    assert command.end(600) == 0, command.err[-2000:]
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A temporary directory of its own for the command, short enough for sockets."""
    folder = Path("/tmp") / f"l{os.getpid() % 10**6}-{abs(hash(tmp_path)) % 10**6}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


def copy_until(finished: Path, stage: str, folder: Path) -> None:
    """The run as it was before a stage."""
    made = {
        "prune": (),
        "align": ("pruned",),
        "train": ("pruned", "aligned"),
        "recover": ("pruned", "aligned", "adapter_pruned"),
        "merge": ("pruned", "aligned", "adapter_pruned", "adapter"),
        "evaluate": ("pruned", "aligned", "adapter_pruned", "adapter", "merged"),
        "run": (),
        "batch": ("aligned",),
        "sweep": ("aligned",),
        "quantize": ("aligned",),
        "export": ("merged",),
    }[stage]
    for name in ("run.yaml", "data.jsonl", "text.jsonl"):
        shutil.copy(finished / name, folder / name)
    for name in made:
        shutil.copytree(finished / "out" / name, folder / "out" / name)


OUTPUTS = {
    "prune": "pruned",
    "align": "aligned",
    "train": "adapter_pruned",
    "recover": "adapter",
    "merge": "merged",
    "evaluate": "evaluation/loram",
    "run": "merged",
    "batch": "batch/results.json",
    "sweep": "sweep",
    "quantize": "quantized",
    "export": "gguf",
}


def assert_interrupted(command: CommandProcess, number: signal.Signals, scratch: Path) -> None:
    code = command.end(90)
    line = f"loram: interrupted by {number.name}; run the same command again to continue"
    assert (code, command.own_lines()) == (128 + number, [line]), command.err[-3000:]
    rest = [text for text in command.err.splitlines() if not text.startswith("loram: ")]
    assert not [text for text in rest if not is_progress(text)], command.err[-3000:]
    deadline = time.monotonic() + 5
    while (left := command.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert not list(scratch.glob("loram-*"))


def partial_outside_of_work(out: Path) -> Iterator[Path]:
    """What was half written and kept, but for a checkpoint in a work directory that goes on."""
    for path in out.rglob(".*.partial"):
        if not any(parent.name.endswith(".work") for parent in path.parents):
            yield path


def is_progress(line: str) -> bool:
    if line.startswith("Adding merges requested"):
        return True  # gguf's, of a tokenizer without merges
    return line.split()[0] in (
        *OUTPUTS,
        "corpus",
        "batch",
        "sweep",
        "run",
        "calibration",
        "targets",
    )


def _cases() -> list[object]:
    """All signals in all stages, of which a few are not for `make thorough`."""
    cases: list[object] = []
    for number, place in enumerate(MOMENTS):
        for turn, which in enumerate(SIGNALS):
            group = (number + turn) % 2 == 0
            marks = [pytest.mark.slow, pytest.mark.timeout(600)]
            if turn != number % 3 or place not in ("Ray starts", "align", "train", "merge"):
                marks.append(pytest.mark.thorough)
            name = f"{place}-{which.name}-{'group' if group else 'process'}"
            cases.append(pytest.param(place, which, group, marks=marks, id=name))
    return cases


@pytest.mark.cluster
@pytest.mark.parametrize(("place", "number", "group"), _cases())
def test_a_signal_in_a_stage_is_one_line_and_the_same_command_goes_on(
    finished: Path, tmp_path: Path, scratch: Path, place: str, number: signal.Signals, group: bool
) -> None:
    stage, reached = MOMENTS[place]
    copy_until(finished, stage, tmp_path)
    command = CommandProcess(tmp_path, stage, "--config", "run.yaml", TMPDIR=str(scratch))
    try:
        command.when(lambda: reached(tmp_path / "out", command))
        command.send(number, group)
        assert_interrupted(command, number, scratch)
    finally:
        command.kill()
    output = tmp_path / "out" / OUTPUTS[stage]
    assert not output.exists()
    assert not list(partial_outside_of_work(tmp_path / "out"))
    again = CommandProcess(tmp_path, stage, "--config", "run.yaml", TMPDIR=str(scratch))
    assert again.end() == 0, again.err[-2000:]
    assert not list(scratch.glob("loram-*"))
    assert output.exists()
    assert not list((tmp_path / "out").rglob(".*.partial"))
    if stage in ("prune", "align", "train", "recover", "merge", "run"):
        assert contents(output) == contents(finished / "out" / OUTPUTS[stage])


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "process"),
    tiny.first_of(
        [("train", "gcs_server"), ("align", "raylet"), ("align", "gcs_server"), ("train", "raylet")]
    ),
)
def test_a_lost_head_is_one_line_within_seconds(
    finished: Path, tmp_path: Path, scratch: Path, stage: str, process: str
) -> None:
    _, reached = MOMENTS[stage]
    copy_until(finished, stage, tmp_path)
    command = CommandProcess(tmp_path, stage, "--config", "run.yaml", TMPDIR=str(scratch))
    try:
        command.when(lambda: reached(tmp_path / "out", command))
        (victim,) = [one for one in command.processes() if one.name() == process]
        victim.kill()
        assert command.end(60) == 1
    finally:
        command.kill()
    line = f"loram: failed: Ray's {process} process died; run the same command again to continue"
    assert command.own_lines() == [line]
    again = CommandProcess(tmp_path, stage, "--config", "run.yaml", TMPDIR=str(scratch))
    assert again.end() == 0, again.err[-2000:]
    assert contents(tmp_path / "out" / OUTPUTS[stage]) == contents(
        finished / "out" / OUTPUTS[stage]
    )


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_variables_of_a_launcher_do_not_make_training_wait(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path, base, steps=1)
    launched = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "OMPI_COMM_WORLD_SIZE": "2",
        "PMI_SIZE": "2",
        "ACCELERATE_USE_DEEPSPEED": "true",
    }
    adapters = []
    for number, variables in enumerate((launched, {})):
        words = ["--set", f"train.model={base}", "--set", f"train.output=adapter{number}"]
        command = CommandProcess(tmp_path, "train", "--config", "run.yaml", *words, **variables)
        try:
            assert command.end(150) == 0, command.err[-2000:]
        finally:
            command.kill()
        adapters.append(contents(tmp_path / f"adapter{number}"))
    assert adapters[0] == adapters[1]


def test_signals_that_were_ignored_stay_ignored() -> None:
    """As ``nohup`` and shells want it; the handlers before are put back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        terminating = signal.getsignal(signal.SIGTERM)
        with Interruption() as interruption:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert interruption.handler(signal.SIGHUP) is None
            with handlers_kept():
                signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
            assert signal.getsignal(signal.SIGTERM) == interruption.handler(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is terminating
    finally:
        signal.signal(signal.SIGHUP, before)


ENDLESS = """
import sys, time
from loram_ray.cli import main as cli
def app():
    try:
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
    finally:
        %s
cli.main(app)
"""


def test_signals_are_heard_beside_thousands_of_open_files() -> None:
    code = """
import os, resource
from loram_ray.runtime.interruption import Interruption
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 4096), limit))
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
import signal, time
with Interruption() as interruption:
    time.sleep(0.2)  # the thread that waits for signals begins
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except KeyboardInterrupt:
        pass
print(interruption.ending.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("143\n", "")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("cleaning", "again"), [("pass", False), ("time.sleep(60)", True)])
def test_a_signal_is_one_line_and_a_second_one_ends_at_once(
    number: signal.Signals, cleaning: str, again: bool
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS % cleaning],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.send_signal(number)  # as timeout does, which sends it to the process and to its group
    if again:
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert err == f"loram: interrupted by {number.name}; {CONTINUE}\n"


def test_a_signal_that_python_loses_is_raised_again() -> None:
    """An exception in ``__del__`` is printed and forgotten."""
    code = ENDLESS.replace("import sys, time", "import os, signal, sys, time") % "pass"
    code = code.replace(
        "while True:",
        """class Lost:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
        Lost()
        while True:""",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 143
    assert done.stderr == f"loram: interrupted by SIGTERM; {CONTINUE}\n"
