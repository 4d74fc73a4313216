"""Errors of workers and libraries: one line, the right exit code, and where Ray's logs are."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loram_ray.cli import main as cli
from loram_ray.config import RayConfig
from loram_ray.errors import LoramError, one_line
from loram_ray.runtime.actors import Actors, run_in_actor
from loram_ray.runtime.cluster import ray_session
from loram_ray.runtime.launchers import forget_launchers, launcher_variables
from loram_ray.runtime.schedule import Outcome, Schedule, WorkerDied, run_tasks
from loram_ray.runtime.scratch import keep, remove_abandoned, scratch

LONG = "\n".join(f"line {number}" for number in range(40))


class Unpicklable(Exception):
    """Holds what cannot be sent to the driver."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Raises:
    """An actor whose constructor raises."""

    def __init__(self, error: Exception) -> None:
        raise error

    def call(self) -> None:
        """Never reached."""


def throw(kind: str) -> None:
    """Raise one of several errors, or die."""
    if kind == "dies":
        os._exit(9)
    raise {
        "long": ValueError(LONG),
        "empty": RuntimeError(),
        "unpicklable": Unpicklable(LONG),
        "no text": KeyError(("a", 1)),
        "mistake": LoramError("train.data must hold examples, got none; write some"),
        "mistake of several lines": LoramError(f"x must be y, got {LONG}; do z"),
    }[kind]


@pytest.fixture(autouse=True, scope="module")
def known_to_workers() -> Iterator[None]:
    """Workers do not see the tests' folder: what is sent to them takes its code with it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wait(finished: Callable[[float], bool]) -> None:
    while not finished(0.2):
        pass


def said(
    action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """Exit code and lines of the command, if an action is what it does."""
    monkeypatch.setattr(sys, "argv", ["loram", "train"])
    with pytest.raises(SystemExit) as ended:
        cli.main(action)
    return int(ended.value.code or 0), capsys.readouterr().err.splitlines()


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_an_error_in_an_actor_is_one_line(
    embedded_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = " (use --debug for the traceback)"
    expected: dict[str, tuple[int, str]] = {
        "long": (1, f"loram: failed: ValueError: line 0 line 39{more}"),
        "empty": (1, f"loram: failed: RuntimeError{more}"),
        "no text": (1, f"loram: failed: KeyError: ('a', 1){more}"),
        "mistake": (2, "loram: train.data must hold examples, got none; write some"),
        "mistake of several lines": (2, "loram: x must be y, got line 0 line 1 "),
        "unpicklable": (1, "loram: failed: RayError: "),
        "dies": (2, "loram: a worker died more than max_failures = 0 times (ActorDiedError: "),
    }
    found = {}
    for kind in expected:
        code, lines = said(
            lambda kind=kind: run_in_actor(throw, (kind,), 1, 0, wait), monkeypatch, capsys
        )
        assert len(lines) == 1, lines
        assert len(lines[0]) < 800
        found[kind] = code, lines[0][: len(expected[kind][1])]
    assert found == expected


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_an_error_in_an_actor_s_constructor_is_not_tried_again_and_one_line(
    embedded_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, expected in (
        (ValueError(f"bad weights\n{LONG}"), (1, "loram: failed: ")),
        (LoramError("x must be y, got z; do w"), (2, "loram: x must be y, got z; do w")),
    ):
        actors = Actors(Raises, (error,), 1, 0)

        def evaluation(actors: Actors = actors) -> None:
            def work(worker: int, name: str) -> Outcome:
                actors.call(worker, "call")
                return Outcome(name, "done")

            def ended(outcome: Outcome) -> None:
                assert outcome.error is not None
                raise outcome.error

            run_tasks(Schedule(["a", "b"], 3), 1, work, ended, stop=actors.stop)

        code, lines = said(evaluation, monkeypatch, capsys)
        assert (code, lines[0][: len(expected[1])]) == expected
        assert len(lines) == 1


def test_stopped_actors_make_no_new_one(embedded_ray: None) -> None:
    actors = Actors(Raises, (ValueError("x"),), 1, 0)
    actors.stop()
    with pytest.raises(WorkerDied, match="stopped"):
        actors.call(0, "call")


def test_several_mistakes_of_a_config_are_one_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistakes() -> None:
        raise LoramError("a must be b", "c must be d")

    assert said(mistakes, monkeypatch, capsys) == (2, ["loram: a must be b", "loram: c must be d"])


def test_a_trainer_s_failure_is_told_by_its_worker_s() -> None:
    from ray.train import ControllerError, WorkerGroupError

    worker = ValueError(LONG)
    assert one_line(WorkerGroupError(LONG, {1: worker})) == "ValueError: line 0 line 39"
    assert one_line(ControllerError(OSError(5, "lost"))) == "OSError: [Errno 5] lost"
    traceback = "Traceback (most recent call last):\n  File x\n    y\nKeyError: 'z'"
    assert one_line(RuntimeError(f"\x1b[36mTask failed\x1b[39m\n{traceback}")).endswith(
        "KeyError: 'z'"
    )


# Launchers


LAUNCHED = {
    "torchrun": ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"],
    "elastic": ["MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_WORLD_SIZE"],
    "kubeflow": ["PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_RDZV_ENDPOINT"],
    "mpi": ["OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_RANK", "PMIX_RANK"],
    "slurm": ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID"],
    "accelerate": ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "FSDP_VERSION"],
}
KEPT = ["SLURM_JOB_ID", "DS_ACCELERATOR", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "HF_HOME"]


def test_variables_of_launchers_are_forgotten_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for group in LAUNCHED.values() for name in group]
    for name in (*names, *KEPT):
        monkeypatch.setenv(name, "2")
    assert sorted(launcher_variables()) == sorted(names)
    forget_launchers()
    assert launcher_variables() == []
    assert all(os.environ[name] == "2" for name in KEPT)


# Addresses


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where somebody listens who never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.timeout(120)
def test_an_address_of_nobody_is_refused_within_seconds(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    if ray.is_initialized():
        ray.shutdown()
    port = free_port()
    for address in (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"ray://127.0.0.1:{port}",
        f"127.0.0.1:{silent}",
        "nobody.invalid:6379",
        "foo",
        "",
        "127.0.0.1:99999",
        "127.0.0.1:x",
        f"http://127.0.0.1:{port}",
    ):
        started = time.monotonic()
        with (
            pytest.raises(LoramError, match="ray.address must be 'local' or a running cluster"),
            ray_session(RayConfig(address=address)),
        ):
            pass
        assert time.monotonic() - started < 20, address
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(LoramError, match="no answer from"), ray_session(RayConfig(address="auto")):
        pass


# Scratch folders


def test_a_scratch_folder_is_private_and_its_name_no_secret_of_the_run(tmp_path: Path) -> None:
    with scratch("x-", tmp_path) as first, scratch("x-", tmp_path) as second:
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o700
        (first / "inside").write_text("data")
        assert set(remove_abandoned("x-", tmp_path)) == {first, second}
    assert list(tmp_path.iterdir()) == []


def test_folders_of_dead_processes_are_removed_and_nobody_else_s(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with scratch("x-", tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    (abandoned,) = tmp_path.iterdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "lock").touch()
    (tmp_path / "x-link").symlink_to(target)  # somebody's trap
    (tmp_path / "x-other").mkdir()
    (tmp_path / "x-linked").mkdir()
    (tmp_path / "x-linked" / "lock").symlink_to(target / "lock")
    with scratch("x-", tmp_path) as folder:
        assert folder.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"target", "x-link", "x-other", "x-linked"}
    assert (target / "lock").exists()
    assert not abandoned.exists()


def test_what_is_kept_stays(tmp_path: Path) -> None:
    with scratch("x-", tmp_path) as folder:
        (folder / "logs").touch()
        keep(folder)
    with scratch("x-", tmp_path):
        pass
    assert [path.name for path in folder.iterdir()] == ["logs"]
