"""Clusters: one that grows and shrinks and loses nodes, and the files that make them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import local_cluster
import psutil
import pytest
import yaml
from test_batch import TRAIN, alone, same, write_tasks
from test_finetuning import wait_for_steps

from loram_ray.batching.tasks import tasks_of
from loram_ray.config import load_run
from loram_ray.progress import METRICS_FILE

LORAM = Path(sys.executable).with_name("loram")


def gpus_of(local: local_cluster.Local) -> int:
    """GPUs that the living nodes of a cluster say they have."""
    code = (
        "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False);"
        "print(int(ray.cluster_resources().get('GPU', 0)))"
    )
    environment = {**os.environ, **local.environment, "RAY_ADDRESS": f"127.0.0.1:{local.port}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def workers_of(local: local_cluster.Local) -> list[psutil.Process]:
    """The nodes that the autoscaler has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line and line[0].endswith("raylet") and any(str(local.folder) in p for p in line):
                if "--head" not in line:
                    found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_batch_has_the_cluster_grow_and_shrink_and_survives_a_lost_node(
    pruned: Path, tmp_path: Path
) -> None:
    data = write_tasks(tmp_path / "data", 3)
    settings: dict[str, Any] = {
        "base": "unused",
        "output": str(tmp_path / "out"),
        "ray": {"address": "auto", "autoscaling": "gpu"},
        "batch": {
            "base": None,
            "model": str(pruned),
            "tasks": [{"data": f"{data}/*.jsonl"}],
            "train": {**TRAIN, "steps": 60, "checkpoint_every": 10},
            "actors": 2,
        },
    }
    file = tmp_path / "batch.yaml"
    file.write_text(yaml.safe_dump(settings))
    with (
        tempfile.TemporaryDirectory(prefix="loram-") as folder,
        local_cluster.cluster(
            Path(folder), workers=0, gpus=1, autoscale=2, idle_minutes=0.1
        ) as local,
    ):
        assert gpus_of(local) == 0
        environment = {
            **os.environ, **local.environment, "RAY_ADDRESS": f"127.0.0.1:{local.port}"
        }  # fmt: skip
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(
                [LORAM, "batch", "--config", file], env=environment, stdout=log, stderr=log
            )
        work = tmp_path / "out" / "batch" / "task0" / ".adapter.work"
        wait_for_steps(work / METRICS_FILE, 20)
        grown = gpus_of(local)
        victim = max(workers_of(local), key=lambda process: process.create_time())
        victim.kill()
        assert driver.wait(600) == 0, (tmp_path / "log").read_text()
        deadline = time.monotonic() + 180
        while gpus_of(local):
            assert time.monotonic() < deadline, "no node went"
            time.sleep(2)
    assert grown == 2
    config = load_run(file).batch
    assert config is not None
    for task in tasks_of(config):
        assert same(task.train.output, alone(task, tmp_path / f"alone-{task.name}"))
