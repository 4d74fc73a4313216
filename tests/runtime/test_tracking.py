"""Metrics in the libraries that users have, read back by those libraries."""

from __future__ import annotations

import json
import math
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import loram_ray as lr
from helpers import tiny
from loram_ray.alignment.mfu import flops_per_token, linear_weights, peak_of
from loram_ray.runtime.progress import (
    METRICS_FILE,
    MetricsLog,
    Reporter,
    follow,
    read_lines,
    restarts_in,
)
from loram_ray.runtime.tracking import Tracking, require_trackers, tracking

SETTINGS = {"steps": 3, "optimiser": {"learning_rate": 1e-3}}
LINES = [{"step": i, "loss": 3.0 - i, "tokens_per_s": 10.0 * i} for i in range(1, 4)]


class Listening:
    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.heard.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def test_every_step_is_handed_on_once_in_order_also_by_a_driver_started_again(
    tmp_path: Path,
) -> None:
    note = tmp_path / "tracked.json"
    first, second = Listening(), Listening()
    tracked = Tracking([first], note)
    before = {"step": 0, "held_out_nll_text": 2.0}
    tracked([before, *LINES[:1]])
    tracked([before, *LINES[:2]])
    tracked([*LINES[:1]])  # a worker went back to its checkpoint
    tracked([])
    Tracking([second], note)([*LINES, {"step": 4, "loss": 0.0, "note": "text"}])
    assert [step for step, _ in first.heard] == [0, 1, 2]
    assert first.heard[2] == (2, {"loss": 1.0, "tokens_per_s": 20.0})
    assert second.heard == [(3, {"loss": 0.0, "tokens_per_s": 30.0}), (4, {"loss": 0.0})]


def test_the_last_lines_are_followed_when_the_work_has_ended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / METRICS_FILE)
    heard: list[dict[str, Any]] = []

    def finished(_seconds: float) -> bool:
        for line in LINES:
            log.write(**line)  # type: ignore[arg-type]
        return True

    with Reporter("test", 3, "step") as reporter:
        follow(reporter, tmp_path / METRICS_FILE, finished, heard.extend)
    assert heard == LINES


def test_restarts_are_counted_and_only_steps_that_are_left_stand(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    for resume_at, steps in ((0, (0,)), (0, (0, 1, 2, 3)), (2, (3, 4)), (2, (3,))):
        log = MetricsLog(path, resume_at)
        for step in steps:
            log.write(step)
    first = [{"step": step, "restarts": 1} for step in (0, 1, 2)]
    assert read_lines(path) == [*first, {"step": 3, "restarts": 3}]
    assert restarts_in(read_lines(path)) == 3
    assert restarts_in(LINES) == restarts_in([]) == 0


def run_twice(names: tuple[str, ...], tmp_path: Path) -> Path:
    """Three steps, the driver started again after two; returns the folder of the logs."""
    output, work = tmp_path / "aligned", tmp_path / "work"
    work.mkdir()
    for lines in (LINES[:2], LINES):
        with tracking(names, "align", output, work, SETTINGS) as tracked:
            tracked(lines)
    return tmp_path / "aligned_logs"


@pytest.mark.usefixtures("embedded_ray")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_twice(("tensorboard",), tmp_path))).Reload()
    assert [(s.step, s.value) for s in found.Scalars("align/loss")] == [(1, 2), (2, 1), (3, 0)]
    assert found.Scalars("align/tokens_per_s")[-1].value == 30


@pytest.mark.usefixtures("embedded_ray")
def test_mlflow_has_one_run_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run_twice(("mlflow",), tmp_path)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("loram")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "aligned"
    assert run.data.params == {"steps": "3", "optimiser.learning_rate": "0.001"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2), (2, 1), (3, 0)]


@pytest.mark.usefixtures("embedded_ray")
def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for key, value in (("MODE", "offline"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{key}", value)
    folder = run_twice(("wandb",), tmp_path)
    stored = b"".join(path.read_bytes() for path in folder.rglob("*.wandb"))
    assert b"tokens_per_s" in stored and b"learning_rate" in stored


@pytest.mark.usefixtures("embedded_ray")
def test_prometheus_can_scrape_the_run_from_ray(tmp_path: Path) -> None:
    import ray

    run_twice((), tmp_path)
    [node] = ray.nodes()
    page = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(page, timeout=10) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_loram_align_step{")]
        if lines and float(lines[0].rpartition(" ")[2]) == 3:
            break
        time.sleep(1)  # Ray exports at intervals, perhaps between two steps
    assert lines and 'run="aligned"' in lines[0] and float(lines[0].rpartition(" ")[2]) == 3


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        lr.LoramError,
        match="align.trackers .* got wandb; run pip install wandb",
    ):
        require_trackers(("wandb",), "align.trackers")


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny.llama_config(layers=2))
    ids = torch.randint(3, tiny.VOCABULARY, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    attention = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "mm" not in str(operation) or "bmm" in str(operation)
    )
    counted = counter.get_total_flops() - attention
    # the first linears' inputs, of embeddings, get a gradient, too
    assert math.isclose(counted, flops_per_token(linear_weights(model)) * ids.numel())


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(device: str, peak: float | None) -> None:
    assert peak_of(device) == peak


@pytest.mark.slow
@pytest.mark.cluster
def test_an_alignment_is_tracked_with_its_utilisation(
    base: Path, tmp_path: Path, embedded_ray: None
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pruned = tmp_path / "pruned"
    lr.prune(lr.PruneConfig(base=str(base), output=pruned, ratio=0.5, layers=(1, 3)))
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts())
    lr.align(
        lr.AlignConfig(
            pruned=pruned,
            output=tmp_path / "aligned",
            corpus={"sources": [{"path": str(text)}], "sequence_length": 32},
            objective="causal_lm",
            steps=3,
            batch_size=4,
            peak_tflops=1.0,
            trackers=("tensorboard",),
        )
    )
    written = [
        json.loads(x) for x in (tmp_path / "aligned" / METRICS_FILE).read_text().splitlines()
    ]
    found = EventAccumulator(str(tmp_path / "aligned_logs")).Reload()
    for name in ("loss", "mfu", "tokens_per_s"):
        points = found.Scalars(f"align/{name}")
        assert [p.step for p in points] == [1, 2, 3]
        assert [p.value for p in points] == pytest.approx([line[name] for line in written])
    weights = linear_weights(lr.load_pruned(pruned))
    assert written[0]["mfu"] == pytest.approx(6 * weights * written[0]["tokens_per_s"] / 1e12)
