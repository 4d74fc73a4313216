"""Stages as Ray Jobs on a cluster of processes with a token: what users see, come what may."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import local_cluster
import psutil
import pytest
import yaml

import loram_ray as lr
from helpers import tiny
from loram_ray.config import load_run
from loram_ray.runtime.locks import backoff
from loram_ray.runtime.submission import (
    Jobs,
    JobSpec,
    exit_code,
    is_retryable,
    pins,
    require_directory,
    run_job,
)

LORAM = Path(sys.executable).with_name("loram")


def write_run(folder: Path, **train: object) -> Path:
    """A tiny base, its examples, and a run file with paths that are relative to it."""
    tiny.write_base(folder / "base")
    tiny.write_jsonl(folder / "data.jsonl", tiny.questions())
    settings = {
        "base": "base",
        "output": "out",
        "prune": {"ratio": 0.5, "layers": [1, 3]},
        "train": {
            "model": "base",
            "data": "data.jsonl",
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "cpus": 1,
            "lora": {"r": 2},
            **train,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def spec_of(file: Path, **changes: object) -> JobSpec:
    settings = {"command": "train", "config": file, "overrides": (), "directory": str(file.parent)}
    return JobSpec(**{**settings, **changes})  # type: ignore[arg-type]


def test_what_goes_with_a_job(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    spec = spec_of(file, overrides=["train.steps=4"], directory="/a b", variables={"A": "b"})
    (tmp_path / "folder").mkdir()
    found = spec.runtime_env(tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["run.yaml"]
    assert found["py_modules"] == [str(Path(lr.__file__).parent)]
    assert found["env_vars"] == {"A": "b"}
    shown = subprocess.run(
        ["sh", "-c", spec.entrypoint().replace("exec python", "exec echo python")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.returncode == 2  # there is no such folder: not worth another try
    there = spec_of(file).entrypoint().replace("exec python", "exec echo python")
    shown = subprocess.run(["sh", "-c", there], capture_output=True, text=True, cwd=tmp_path)
    assert shown.stdout.split()[2:4] == ["loram_ray.cli", "train"]
    assert shown.stdout.split()[-2:] == ["--config", str(file)]


def test_pins_are_what_is_installed_but_not_ray() -> None:
    import torch

    found = pins()
    assert f"torch=={torch.__version__.partition('+')[0]}" in found
    assert not [line for line in found if line.startswith("ray=")]
    assert not [line for line in found if "pytest" in line]


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key", "PASSWORD"])
def test_secrets_do_not_go_with_a_job(name: str, tmp_path: Path) -> None:
    with pytest.raises(lr.LoramError, match=f"must not contain secrets, got {name}"):
        spec_of(tmp_path, variables={name: "x"})


def test_relative_paths_need_a_folder_on_a_cluster_elsewhere(tmp_path: Path) -> None:
    settings = load_run(write_run(tmp_path))
    with pytest.raises(lr.LoramError, match="--directory must be given for relative paths such as"):
        require_directory("https://ray.example:8265", None, settings)
    assert require_directory("https://ray.example:8265", "/nfs", settings) == "/nfs"
    assert require_directory("http://127.0.0.1:8265", None, settings) == str(Path.cwd())


@pytest.mark.parametrize(
    ("state", "driver", "code", "again"),
    [
        ("SUCCEEDED", 0, 0, False),
        ("FAILED", 2, 2, False),
        ("FAILED", 1, 1, True),
        ("FAILED", -9, 137, True),
        ("FAILED", None, 137, True),
        ("STOPPED", -15, 130, False),
    ],
)
def test_exit_codes(state: str, driver: int | None, code: int, again: bool) -> None:
    details = SimpleNamespace(status=SimpleNamespace(value=state), driver_exit_code=driver)
    assert exit_code(details) == code
    assert is_retryable("train", code) == again
    assert not is_retryable("batch", 1)


def test_pauses_double_until_patience_ends() -> None:
    assert list(backoff(10.0)) == [1, 2, 4, 8]
    assert list(backoff(100.0, first=10.0, longest=30.0)) == [10, 20, 30, 30, 30]


# On a cluster


@pytest.fixture(scope="module")
def local() -> Iterator[local_cluster.Local]:
    with (
        tempfile.TemporaryDirectory(prefix="loram-") as folder,
        local_cluster.cluster(Path(folder), workers=1, head_cpus=2) as found,
    ):
        yield found


def loram(
    local: local_cluster.Local, cwd: Path, *line: str, **variables: str
) -> tuple[int, str, str]:
    environment = {
        **os.environ,
        **local.environment,
        "RAY_API_SERVER_ADDRESS": local.dashboard,
        **variables,
    }
    done = subprocess.run(
        [LORAM, *line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


class Proxy:
    """Between a client and a server: connections can be cut, and refused for a while."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._refused_until = 0.0
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self, seconds: float) -> None:
        self._refused_until = time.monotonic() + seconds
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if time.monotonic() < self._refused_until:
                client.close()
                continue
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._server))
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.cluster
def test_a_cluster_whose_port_was_taken_meanwhile_is_started_with_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_port = local_cluster.free_port
    with socket.socket() as taken, tempfile.TemporaryDirectory(prefix="loram-") as folder:
        taken.bind((local_cluster.HOST, 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(local_cluster, "free_port", lambda: next(ports, None) or free_port())
        with local_cluster.cluster(Path(folder), workers=0) as found:
            assert found.port != taken.getsockname()[1]
            assert local_cluster._alive(found) == 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_jobs_from_the_command_line(local: local_cluster.Local, tmp_path: Path) -> None:
    write_run(tmp_path)
    code, output, said = loram(
        local, tmp_path, "submit", "prune", "--config", "run.yaml", "--metadata", "team=a",
        "--name", "first",
    )  # fmt: skip
    assert code == 0, output + said
    assert "prune: done: out/pruned" in output
    assert (tmp_path / "out" / "pruned" / "manifest.json").exists()
    assert "submitted first" in said

    code, output, said = loram(
        local, tmp_path, "submit", "train", "--config", "run.yaml", "--set", "train.data=none.jsonl"
    )
    assert code == 2  # as loram train says it, and not tried again
    assert "none.jsonl has none" in output and said.count("submitted") == 1
    code, output, said = loram(local, tmp_path, "submit", "train", "--config", "none.yaml")
    assert code == 2 and "none.yaml" in said and not output  # nothing was submitted
    code, _, said = loram(
        local, tmp_path, "submit", "prune", "--config", "run.yaml", "--name", "first"
    )
    assert code == 2 and "--name must be new" in said

    code, output, _ = loram(
        local, tmp_path, "submit", "train", "--config", "run.yaml", "--set", "train.steps=100000",
        "--detach",
    )  # fmt: skip
    name = output.strip()
    assert code == 0 and name.startswith("loram-train-")
    metrics = tmp_path / "out" / ".adapter_pruned.work" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    code, output, _ = loram(local, tmp_path, "jobs", "stop", name)
    assert (code, output) == (0, f"{name}: stopped\n")
    code, output, _ = loram(local, tmp_path, "jobs", "logs", name, "--follow")
    assert code == 130 and "train" in output

    code, output, _ = loram(local, tmp_path, "jobs", "list", "--json")
    rows = json.loads(output)
    assert [row["state"] for row in rows] == ["stopped", "failed", "succeeded"]
    assert rows[-1]["metadata"]["team"] == "a" and rows[-1]["command"] == "prune"
    assert local.environment["RAY_AUTH_TOKEN"] not in output
    code, output, _ = loram(local, tmp_path, "jobs", "list")
    assert code == 0 and name in output
    code, _, said = loram(local, tmp_path, "jobs", "logs", "nothing")
    assert code == 2 and "job nothing does not exist" in said

    for command in (["jobs", "list"], ["submit", "prune", "--config", "run.yaml"]):
        code, _, said = loram(local, tmp_path, *command, RAY_AUTH_TOKEN="wrong")
        assert code == 2 and "rejected the token" in said and said.count("\n") <= 2
    code, _, said = loram(
        local,
        tmp_path,
        "jobs",
        "list",
        "--address",
        f"http://127.0.0.1:{local_cluster.free_port()}",
    )
    assert code == 2 and "does not answer" in said


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_lost_connection_and_a_killed_driver(
    local: local_cluster.Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (local.environment | {"RAY_API_SERVER_ADDRESS": ""}).items():
        monkeypatch.setenv(name, value)
    file = write_run(tmp_path, steps=400, checkpoint_every=50)
    proxy = Proxy(int(local.dashboard.rpartition(":")[2]))
    told: list[str] = []
    jobs = Jobs(f"http://127.0.0.1:{proxy.port}", told.append)
    shown: list[str] = []
    began: list[str] = []
    killed = threading.Event()
    metrics = tmp_path / "out" / ".adapter_pruned.work" / "metrics.jsonl"

    def disturb() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 60:
            time.sleep(0.1)
        proxy.cut(2.0)
        time.sleep(4.0)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "loram_ray.cli" in line and process.cwd() == str(tmp_path):
                    process.kill()
                    killed.set()

    threading.Thread(target=disturb, daemon=True).start()
    code = run_job(
        jobs,
        spec_of(file, retries=2),
        shown.append,
        began.append,
        lambda: backoff(10, first=0.1),
    )
    assert code == 0, "".join(shown)
    assert killed.is_set() and len(began) == 2
    assert any("no answer" in line for line in told) and proxy.connections > 3
    assert "".join(shown) == "".join(jobs.logs(name) for name in began)  # all of it, once
    written = (tmp_path / "out" / "adapter_pruned" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 401))  # it went on where it was


def test_a_cluster_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which opening sets
    port = local_cluster.free_port()
    with pytest.raises(lr.LoramError, match="does not answer"):
        Jobs(f"http://127.0.0.1:{port}")
