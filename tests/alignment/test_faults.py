"""Fault drills of alignment: whatever is killed, no row is skipped or seen twice, weights equal.

Each drill's victim is killed at a step drawn by its seed. The driver is the ``loram`` command in a
process of its own, on a cluster of several nodes on this machine.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from ray.cluster_utils import Cluster

import loram_ray as lr
from helpers import tiny
from loram_ray.alignment.loop import ROWS_FILE
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.runtime.progress import METRICS_FILE, read_lines, restarts_in

STEPS, BATCH, WORKERS, EVERY = 48, 4, 2, 3
RAY = Path(sys.executable).with_name("ray")

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


class Nodes:
    """A cluster: a head without CPUs, and two nodes of which each has room for one worker."""

    def __init__(self) -> None:
        self.workers: list[Any] = []

    def start(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add()
        self.add()

    def add(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=3, wait=True))

    def stop(self) -> None:
        self.cluster.shutdown()
        self.workers.clear()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if ray.is_initialized():  # another test's embedded one; a process has one at a time
        ray.shutdown()
    nodes = Nodes()
    nodes.start()
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    lr.prune(lr.PruneConfig(base=str(base), output=folder / "pruned", ratio=0.5, layers=(1, 3)))
    tiny.write_jsonl(folder / "text.jsonl", tiny.texts(400))
    return folder


def command(folder: Path, output: Path, address: str, *overrides: str) -> list[str]:
    align = {
        "pruned": str(folder / "pruned"),
        "output": str(output),
        "corpus": {"sources": [{"path": str(folder / "text.jsonl")}], "sequence_length": 32},
        "objective": "causal_lm",
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": 1,
        "workers": WORKERS,
        "cpus_per_worker": 2,
        "zero_stage": 2,
        "optimiser": {"learning_rate": 1e-3, "warmup_steps": 2},
        "checkpoint_every": EVERY,
        "log_rows": True,
    }
    file = output.with_suffix(".yaml")
    run = {
        "base": str(folder / "base"),
        "output": str(folder),
        "ray": {"address": address},
        "align": align,
    }
    file.write_text(yaml.safe_dump(run))
    changes = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "loram_ray.cli", "align", "--config", str(file), *changes]


@pytest.fixture(scope="module")
def untouched(folder: Path) -> Path:
    """The same run, left alone, on an embedded Ray."""
    output = folder / "untouched"
    subprocess.run(command(folder, output, "local"), check=True)
    return output


class Run:
    """The command, and what its work directory says."""

    def __init__(self, folder: Path, output: Path, address: str, *overrides: str) -> None:
        self.work = output.with_name(f".{output.name}.work")
        self._log = output.with_suffix(".log")
        with open(self._log, "ab") as log:
            line = command(folder, output, address, *overrides)
            self.process = subprocess.Popen(line, stderr=log)

    def wait_for_step(self, step: int) -> None:
        metrics = self.work / METRICS_FILE
        deadline = time.monotonic() + 240
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert self.process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.005)

    def finish(self) -> None:
        code = self.process.wait(timeout=400)
        assert code == 0, self._log.read_text()[-2000:]


def assert_nothing_lost(output: Path, untouched: Path) -> None:
    rows = [json.loads(line) for line in (output / ROWS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(len(row["row_ids"]) == BATCH for row in rows)
    assert (output / ROWS_FILE).read_bytes() == (untouched / ROWS_FILE).read_bytes()
    ids = [row_id for row in rows for row_id in row["row_ids"]]
    assert len(set(ids)) == len(ids)  # less than an epoch: no row twice
    assert losses(output) == losses(untouched)
    with Checkpoint(output) as ours, Checkpoint(untouched) as theirs:
        expected = dict(theirs)
        for name, tensor in ours:
            assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


def losses(directory: Path) -> list[float]:
    lines = (directory / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def training_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(command_line(child))]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("seed", tiny.first_of(range(3)))
def test_a_killed_worker(folder: Path, untouched: Path, nodes: Nodes, seed: int) -> None:
    chance = random.Random(seed)
    output = folder / f"worker-{seed}"
    run = Run(folder, output, nodes.cluster.address)
    run.wait_for_step(chance.randrange(1, STEPS // 2))
    victims = training_workers()
    assert len(victims) == WORKERS
    victims[chance.randrange(WORKERS)].kill()
    run.finish()
    assert_nothing_lost(output, untouched)
    assert restarts_in(read_lines(output / METRICS_FILE)) == 1
    assert restarts_in(read_lines(untouched / METRICS_FILE)) == 0


@pytest.mark.parametrize("seed", tiny.first_of(range(4, 7)))
def test_a_killed_driver(folder: Path, untouched: Path, nodes: Nodes, seed: int) -> None:
    output = folder / f"driver-{seed}"
    run = Run(folder, output, nodes.cluster.address)
    run.wait_for_step(random.Random(seed).randrange(1, STEPS // 2))
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    assert not output.exists()
    again = Run(folder, output, nodes.cluster.address)
    again.finish()
    assert_nothing_lost(output, untouched)


@pytest.mark.parametrize("seed", tiny.first_of(range(7, 9)))
def test_a_removed_node(folder: Path, untouched: Path, nodes: Nodes, seed: int) -> None:
    chance = random.Random(seed)
    output = folder / f"node-{seed}"
    run = Run(folder, output, nodes.cluster.address)
    run.wait_for_step(chance.randrange(1, STEPS // 2))
    nodes.cluster.remove_node(nodes.workers.pop(chance.randrange(2)), allow_graceful=False)
    nodes.add()
    run.finish()
    assert_nothing_lost(output, untouched)


@pytest.mark.parametrize("seed", [10])
def test_a_preempted_node(
    folder: Path, untouched: Path, nodes: Nodes, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    output = folder / f"preempted-{seed}"
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.1")  # the steps are short
    run = Run(folder, output, nodes.cluster.address, "align.checkpoint_every=1000")
    run.wait_for_step(chance.randrange(1, STEPS // 4))
    victim = nodes.workers.pop(chance.randrange(2))
    give_notice(nodes.cluster, victim, seconds=20)
    nodes.add()
    wait_for_checkpoint(run)
    nodes.cluster.remove_node(victim, allow_graceful=False)
    run.finish()
    assert_nothing_lost(output, untouched)


def test_a_removed_node_that_nothing_replaces(folder: Path, untouched: Path, nodes: Nodes) -> None:
    output = folder / "fewer"
    run = Run(folder, output, nodes.cluster.address, "align.min_workers=1")
    run.wait_for_step(random.Random(13).randrange(EVERY, STEPS // 2))
    nodes.cluster.remove_node(nodes.workers.pop(), allow_graceful=False)
    run.finish()
    nodes.add()
    assert (output / ROWS_FILE).read_bytes() == (untouched / ROWS_FILE).read_bytes()
    assert losses(output) == pytest.approx(losses(untouched), rel=1e-2)  # bf16, other sums


def give_notice(cluster: Cluster, node: Any, seconds: float) -> None:
    """Tell the cluster that a node goes, as the autoscaler does on a cloud's notice."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline = int((time.time() + seconds) * 1000)
    accepted, reason = GcsClient(address=cluster.address).drain_node(
        node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline
    )
    assert accepted, reason


def wait_for_checkpoint(run: Run) -> None:
    deadline = time.monotonic() + 120
    while not list(run.work.glob("align-*/step-*")):
        assert run.process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint after the notice"
        time.sleep(0.01)


def test_a_restarted_head(folder: Path, untouched: Path, nodes: Nodes) -> None:
    output = folder / "head"
    run = Run(folder, output, nodes.cluster.address)
    run.wait_for_step(random.Random(12).randrange(1, STEPS // 2))
    nodes.stop()  # the head with all it knows, and the nodes
    assert run.process.wait(timeout=300) != 0
    assert not output.exists()
    nodes.start()
    again = Run(folder, output, nodes.cluster.address)
    again.finish()
    assert_nothing_lost(output, untouched)


def test_runs_are_seen_in_the_dashboard(folder: Path, untouched: Path, nodes: Nodes) -> None:
    output = folder / "seen"
    Run(folder, output, nodes.cluster.address).finish()
    request = urllib.request.Request(
        f"http://{nodes.cluster.webui_url}/api/train/v2/runs/v1",
        headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs = json.loads(answer.read())["train_runs"]
    seen = {run["name"]: run["status"] for run in runs}
    assert seen["align-seen"] == "FINISHED"
    assert_nothing_lost(output, untouched)


def test_an_output_that_not_all_nodes_see_is_refused(
    folder: Path, nodes: Nodes, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    blind = f"mount -t tmpfs tmpfs {hidden} && exec {RAY} start --address={nodes.cluster.address} "
    started = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{blind} --num-cpus=3"], capture_output=True, text=True
    )
    if re.search("not permitted|ermission denied", started.stderr):
        pytest.skip(f"a node cannot be given another disk here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    done = subprocess.run(
        command(folder, hidden / "aligned", nodes.cluster.address), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.search(
        rf"loram: align.output must be on storage that all nodes share, but {hidden} is not the "
        r"same directory on node .*; use a shared file system such as NFS",
        done.stderr,
    ), done.stderr
    assert [path.name for path in hidden.iterdir()] == ["aligned.yaml"]


def test_a_worker_that_fits_on_no_node_is_refused_at_once(folder: Path, nodes: Nodes) -> None:
    changes = ("align.workers=1", "align.cpus_per_worker=4")
    line = command(folder, folder / "large", nodes.cluster.address, *changes)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "align.workers needs 1 workers with 4 CPUs, each on one node, but the Ray cluster's "
        "nodes can hold 0" in done.stderr
    )
