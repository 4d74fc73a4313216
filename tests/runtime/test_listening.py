"""What listens where: an embedded Ray and a local cluster on loopback, and nowhere else."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import local_cluster
import psutil
import pytest

from helpers.processes import CommandProcess, lines_in, write_run

EMBEDDED = """
from loram_ray.runtime.cluster import ray_session
from loram_ray.config import RayConfig

class Worker:
    def ready(self):
        return True

with ray_session(RayConfig(num_cpus=2)):
    import ray
    assert ray.get(ray.remote(Worker).remote().ready.remote())
    print("ready", file=__import__("sys").__stdout__, flush=True)
    input()
"""
JOINING = """
import os, sys
from loram_ray.runtime.cluster import ray_session
from loram_ray.config import RayConfig
with ray_session(RayConfig(address=sys.argv[1])):
    import ray
    print(len(ray.nodes()), file=sys.__stdout__, flush=True)
    input()
"""


def elsewhere(processes: list[psutil.Process]) -> list[str]:
    """Addresses that processes listen on and other machines may reach."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status not in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    continue
                if connection.status == psutil.CONN_NONE and not connection.laddr:
                    continue
                address = ipaddress.ip_address(connection.laddr.ip)
                address = getattr(address, "ipv4_mapped", None) or address
                if not address.is_loopback:
                    found.append(f"{process.name()} {connection.laddr}")
    return found


def listeners(processes: list[psutil.Process]) -> int:
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            count += sum(one.status == psutil.CONN_LISTEN for one in connections)
    return count


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and is not yet waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_an_embedded_ray_listens_on_loopback_alone_and_leaves_nothing(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="l") as scratch:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment["TMPDIR"] = scratch
        driver = subprocess.Popen(
            [sys.executable, "-c", EMBEDDED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert driver.stdin is not None and driver.stdout is not None
        try:
            assert driver.stdout.readline() == "ready\n"
            ours = psutil.Process(driver.pid)
            processes = [ours, *ours.children(recursive=True)]
            assert listeners(processes) >= 5
            assert elsewhere(processes) == []
            (folder,) = Path(scratch).iterdir()
            assert folder.stat().st_mode & 0o777 == 0o700
            driver.communicate("\n")
            assert driver.returncode == 0
        finally:
            driver.kill()
        assert not [process for process in processes if is_alive(process)]
        assert not list(Path(scratch).iterdir())


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_workers_of_an_alignment_listen_on_loopback_alone(base: Path, tmp_path: Path) -> None:
    """Theirs are the sockets of torch: its store, and Gloo's."""
    write_run(tmp_path, base, steps=400)
    pruning = CommandProcess(
        tmp_path, "prune", "--config", "run.yaml", "--set", "prune.method=random"
    )
    assert pruning.end() == 0, pruning.err
    two = ["--set", "align.workers=2", "--set", "ray.num_cpus=6"]
    command = CommandProcess(tmp_path, "align", "--config", "run.yaml", *two)
    try:
        work = tmp_path / "out" / ".aligned.work"
        command.when(lambda: lines_in(work / "metrics.jsonl") >= 1)
        processes = [psutil.Process(command.process.pid), *command.processes()]
        workers = [p for p in processes if "RayTrainWorker" in " ".join(p.cmdline())]
        assert len(workers) == 2
        assert listeners(workers) >= 5
        assert elsewhere(processes) == []
    finally:
        command.kill()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_local_cluster_listens_on_loopback_alone_and_is_joined_there() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="loram-") as folder,
        local_cluster.cluster(Path(folder), workers=1) as local,
    ):
        # without what the printed exports say of loopback: `ray_session` finds out
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {k: v for k, v in local.environment.items() if k.startswith("RAY_AUTH")}
        driver = subprocess.Popen(
            [sys.executable, "-c", JOINING, f"127.0.0.1:{local.port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert driver.stdout is not None
        try:
            assert driver.stdout.readline() == "2\n"
            ours = psutil.Process()
            processes = [p for p in ours.children(recursive=True) if p.is_running()]
            assert listeners(processes) >= 8
            assert elsewhere(processes) == []
            driver.communicate("\n")
            assert driver.returncode == 0
        finally:
            driver.kill()
