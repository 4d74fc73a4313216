import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import loram_ray as lr
from helpers import tiny
from helpers.aligning import BATCH, LENGTH, LR, STEPS, Training, config, plain_training
from loram_ray.alignment.loop import ROWS_FILE
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.config import CorpusConfig
from loram_ray.corpus.prepare import prepare_corpus
from loram_ray.corpus.sources import list_sources
from loram_ray.runtime.progress import METRICS_FILE, read_lines, restarts_in


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny.texts())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(directory) as checkpoint:
        return dict(checkpoint)


def losses(directory: Path) -> list[float]:
    lines = (directory / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def prepared(
    pruned: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory, embedded_ray: None
) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "corpus"
    settings = CorpusConfig.model_validate(
        {"sources": [{"path": str(corpus)}], "sequence_length": LENGTH}
    )
    return prepare_corpus(settings, pruned, folder).output


@pytest.fixture(scope="module")
def plain(pruned: Path, prepared: Path) -> Training:
    return plain_training(pruned, prepared, STEPS)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("zero_stage", "workers"),
    [
        pytest.param(1, 1, marks=[pytest.mark.slow, pytest.mark.thorough]),
        pytest.param(2, 2, marks=[pytest.mark.slow, pytest.mark.thorough]),
        (3, 2),
    ],
)
def test_ray_and_deepspeed_equal_a_plain_pytorch_loop(
    zero_stage: int,
    workers: int,
    pruned: Path,
    corpus: Path,
    tmp_path: Path,
    plain: Training,
) -> None:
    output = tmp_path / "aligned"
    lr.align(config(pruned, corpus, output, zero_stage=zero_stage, workers=workers))
    expected_losses, expected = plain
    assert losses(output) == pytest.approx(expected_losses, rel=1e-4)
    found = weights(output)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        # AdamW turns float rounding in a near-zero gradient into a step of up to lr
        difference = (tensor - expected[name]).abs()
        assert difference.max() < 2 * LR, name
        assert difference.mean() < 1e-5, name
    assert torch.equal(found["lm_head.weight"], weights(pruned)["lm_head.weight"])
    moved = (
        found["model.layers.1.mlp.up_proj.weight"]
        - weights(pruned)["model.layers.1.mlp.up_proj.weight"]
    )
    assert moved.abs().max() > LR


@pytest.mark.slow
@pytest.mark.cluster
def test_the_norm_of_the_gradients_is_told_without_zero_too(
    pruned: Path, corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    output, expected = tmp_path / "aligned", list[float]()
    plain_training(pruned, prepared, STEPS, norms=expected)
    lr.align(config(pruned, corpus, output, zero_stage=0, workers=2))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_killed_mid_run_continue_from_the_last_checkpoint_bit_equal(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    settings = {"workers": 2, "zero_stage": 2, "precision": "bf16", "steps": 24}
    untouched = tmp_path / "untouched"
    lr.align(config(pruned, corpus, untouched, **settings))
    output = tmp_path / "aligned"
    killed: list[int] = []
    killer = threading.Thread(target=kill_workers_at_step, args=(output, 5, killed))
    killer.start()
    lr.align(config(pruned, corpus, output, **settings))
    killer.join()
    assert len(killed) == 2
    assert losses(output) == losses(untouched)
    expected = weights(untouched)
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(("zero_stage", "before", "after"), tiny.first_of([(2, 2, 1), (3, 1, 3)]))
def test_a_run_that_was_cut_goes_on_with_another_number_of_workers(
    zero_stage: int,
    before: int,
    after: int,
    pruned: Path,
    corpus: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    steps = 60
    output = tmp_path / "aligned"
    settings = {"zero_stage": zero_stage, "max_failures": 0, "steps": steps}
    killed: list[int] = []
    killer = threading.Thread(target=kill_workers_at_step, args=(output, 3, killed, True))
    killer.start()
    with pytest.raises(Exception, match="died"):
        lr.align(config(pruned, corpus, output, workers=before, **settings))
    killer.join()
    work = output.with_name(f".{output.name}.work")
    lines = (work / METRICS_FILE).read_text().splitlines()
    assert len(lines) < steps
    lr.align(config(pruned, corpus, output, workers=after, **settings))
    assert (output / METRICS_FILE).read_text().splitlines()[:2] == lines[:2]  # not begun again
    expected_losses, expected = plain_training(pruned, prepared, steps)
    assert losses(output) == pytest.approx(expected_losses, rel=2e-4)
    for name, tensor in weights(output).items():
        assert (tensor - expected[name]).abs().mean() < 5e-5, name


def kill_workers_at_step(
    output: Path, step: int, killed: list[int], after_checkpoint: bool = False
) -> None:
    """Kill them at a step, or later, when Ray Train has taken note of a checkpoint."""
    work = output.with_name(f".{output.name}.work")
    metrics = work / METRICS_FILE
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        noted = not after_checkpoint or list(work.glob("align-*/*snapshot*.json"))
        if noted and metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            break
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)


@pytest.mark.slow
@pytest.mark.thorough
def test_same_seed_gives_the_same_weights_and_another_seed_others(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        lr.align(config(pruned, corpus, tmp_path / name, seed=seed, steps=2))
    first, second, other = (weights(tmp_path / n) for n in ("first", "second", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_the_cluster_can_never_place_is_refused_at_once(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    with pytest.raises(lr.LoramError, match=r"align.workers needs 9 CPUs, .* has 4"):
        lr.align(config(pruned, corpus, tmp_path / "aligned", workers=4, cpus_per_worker=2))


def test_a_sequence_longer_than_the_models_positions_is_refused(
    pruned: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(lr.LoramError, match="sequence_length must be at most 512"):
        lr.align(config(pruned, corpus, tmp_path / "aligned", length=1024))


@pytest.mark.slow
@pytest.mark.cluster
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    exploding = {"learning_rate": 1e30, "warmup_steps": 4}  # the second step is the first to move
    settings = {"optimiser": exploding, "checkpoint_every": 1, "log_rows": True}
    output = tmp_path / "aligned"
    with pytest.raises(lr.LoramError, match=r"loss is (nan|inf) at step 3, rows \[") as error:
        lr.align(config(pruned, corpus, output, workers=2, **settings))
    work = output.with_name(f".{output.name}.work")
    lines = [json.loads(line) for line in (work / ROWS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    seen = {row for line in lines for row in line["row_ids"]}
    assert len(seen) == 2 * BATCH
    named = json.loads(re.search(r"rows (\[.*?\])", str(error.value))[1])
    assert len(set(named) - seen) == BATCH  # of both workers
    good = Path(re.search(r"the last good checkpoint is (\S+)", str(error.value))[1])
    assert good.is_dir() and good.name.startswith("step-00000001-")
    assert restarts_in(read_lines(work / METRICS_FILE)) == 0  # not tried again


def test_a_deepspeed_file_that_is_none_is_refused(
    pruned: Path, corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    for content, message in (("{", "is not valid JSON"), ("[]", "must contain a JSON object")):
        file.write_text(content)
        with pytest.raises(lr.LoramError, match=f"align.deepspeed .*ds.json {message}"):
            lr.align(config(pruned, corpus, tmp_path / "aligned", deepspeed=file))


@pytest.mark.slow
@pytest.mark.cluster
def test_offloading_and_checkpointed_activations_change_nothing_and_what_is_frozen_stays(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    settings = {"zero_stage": 3, "frozen": ["lm_head", "embeddings", "norms"]}
    lr.align(config(pruned, corpus, tmp_path / "plain", **settings))
    offloaded = {"offload_optimiser": "cpu", "offload_parameters": "cpu"}
    saving = {**offloaded, "activation_checkpointing": True}
    lr.align(config(pruned, corpus, tmp_path / "saving", **settings, **saving))
    before, plain, saved = (weights(d) for d in (pruned, tmp_path / "plain", tmp_path / "saving"))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for name, tensor in before.items():
        frozen = any(part in name for part in ("lm_head", "embed_tokens", "norm"))
        assert torch.equal(plain[name], tensor) == frozen, name
        assert (plain[name] - saved[name]).abs().mean() < 1e-6, name


@pytest.mark.slow
@pytest.mark.thorough
def test_offloading_to_nvme_changes_nothing_though_a_worker_was_killed(
    corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    """DeepSpeed's extension compiles for minutes; partitions of a megabyte and more are swapped."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    base = tiny.write_base(tmp_path / "base", hidden=512, intermediate=2048)
    pruned, swapped = tmp_path / "pruned", tmp_path / "swapped"
    lr.prune(lr.PruneConfig(base=str(base), output=pruned, ratio=0.5, layers=(1, 3)))
    settings = {"zero_stage": 3, "steps": 20}
    lr.align(config(pruned, corpus, tmp_path / "plain", **settings))
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            files = [path for path in (tmp_path / "fast").rglob("*") if path.is_file()]
            seen.update(str(path.relative_to(tmp_path / "fast").parent) for path in files)

    (tmp_path / "fast").mkdir()
    killed: list[int] = []
    killer = threading.Thread(target=kill_workers_at_step, args=(swapped, 3, killed, True))
    watcher = threading.Thread(target=watch)
    watcher.start()
    killer.start()
    nvme = {"offload_optimiser": "nvme", "offload_parameters": "nvme"}
    lr.align(config(pruned, corpus, swapped, offload_dir=tmp_path / "fast", **settings, **nvme))
    ended.set()
    watcher.join()
    killer.join()
    assert killed
    assert {path.split("/")[1] for path in seen} == {"float32params", "optimizer"}
    assert losses(swapped) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    plain = weights(tmp_path / "plain")
    for name, tensor in weights(swapped).items():
        assert (tensor - plain[name]).abs().mean() < 1e-6, name


@pytest.mark.slow
@pytest.mark.cluster
def test_held_out_documents_of_each_source_are_evaluated(
    pruned: Path, tmp_path: Path, embedded_ray: None
) -> None:
    """Against the stock loss on the files that hold them; 3 workers cannot share them evenly."""
    texts = tiny.texts(240)
    sources = [
        {
            "path": str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", part)),
            "held_out": 0.3,
            "weight": weight,
        }
        for name, part, weight in (("web", texts[:120], 0.75), ("code", texts[120:], 0.25))
    ]
    changes = {
        "evaluate_every": 2,
        "evaluate_sequences": 7,
        "workers": 3,
        "zero_stage": 3,
        "steps": 3,
    }
    output = tmp_path / "aligned"
    text = {"corpus": {"sources": sources, "sequence_length": LENGTH}}
    settings = config(pruned, tmp_path, output).model_dump() | changes | text
    lr.align(lr.AlignConfig.model_validate(settings))
    lines = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    keys = {"held_out_nll_web", "held_out_nll_code"}
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [keys <= line.keys() for line in lines] == [True, False, True, True]
    assert_card(output, lines[0], lines[-1])
    assert_held_out_losses(output, pruned, lines[0])
    assert_held_out_losses(output, output, lines[-1])


def assert_held_out_losses(output: Path, directory: Path, line: dict[str, Any]) -> None:
    """A line's losses are those of a model on the first seven rows that each source holds out."""
    model = lr.load_pruned(directory, "fp32")
    for source in list_sources(output.with_name("aligned_corpus")):
        rows = [row for path in source.held_out_files for row in pq.read_table(path).to_pylist()]
        assert len(rows) > 7
        total, count = 0.0, 0
        for row in rows[:7]:
            ids = torch.tensor([row["input_ids"][: row["length"]]])
            total += model(input_ids=ids, labels=ids).loss.item() * (row["length"] - 1)
            count += row["length"] - 1
        assert line[f"held_out_nll_{source.name}"] == pytest.approx(total / count, rel=1e-4)


def assert_card(output: Path, first: dict[str, Any], last: dict[str, Any]) -> None:
    """The README of an aligned model has YAML that hubs read, and the numbers."""
    _, head, text = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["loram", "pruned", "random"]
    for name in ("web", "code"):
        before, after = (math.exp(line[f"held_out_nll_{name}"]) for line in (first, last))
        assert f"| {before:,.2f} | {after:,.2f} |" in text
    manifest = json.loads((output / "manifest.json").read_text())
    for value in (manifest["details"]["tokens"], last["loss"]):
        assert f"{value:,}" in text or f"{value:.4g}" in text
    assert str(output.parent) not in text  # no path of this machine


@pytest.mark.slow
@pytest.mark.cluster
def test_when_the_time_is_up_what_was_learnt_is_kept(
    pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    changes = {"max_hours": 1e-9, "workers": 2, "optimiser": {"learning_rate": LR}}
    done = lr.align(config(pruned, corpus, tmp_path / "aligned", **changes))
    assert done.manifest.details["steps"] == len(losses(tmp_path / "aligned")) == 1
    assert done.manifest.details["tokens"] == BATCH * LENGTH
    assert any(not torch.equal(t, weights(pruned)[n]) for n, t in weights(done.output).items())


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("where", tiny.first_of(["output", "staging"]))
def test_a_disk_that_fills_during_a_checkpoint_leaves_the_one_before(
    where: str, pruned: Path, corpus: Path, tmp_path: Path, embedded_ray: None
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    settings = {
        "workers": 2,
        "zero_stage": 2,
        "checkpoint_every": 1,
        "steps": 16,
        "staging_dir": small if where == "staging" else tmp_path / "staging",
    }
    output = (small if where == "output" else tmp_path) / "aligned"
    with tiny.disk(small, "40m"):
        with filled_after_a_checkpoint(output, small), pytest.raises(lr.LoramError) as error:
            lr.align(config(pruned, corpus, output, **settings))
        said = re.search(
            rf"the disk of {small}\S* is full at step (\d+); .*; the last good checkpoint is "
            r"\S+/step-(\d+)-\d+$",
            str(error.value),
        )
        assert said is not None, str(error.value)
        assert 0 < int(said[2]) < int(said[1])
        work = output.with_name(f".{output.name}.work")
        (small / "filler").unlink()
        lr.align(config(pruned, corpus, output, **settings))
        untouched = tmp_path / "untouched"
        lr.align(config(pruned, corpus, untouched, **{**settings, "staging_dir": None}))
        assert losses(output) == losses(untouched)
        expected = weights(untouched)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())
        assert not work.exists()


@contextlib.contextmanager
def filled_after_a_checkpoint(output: Path, disk: Path) -> Iterator[None]:
    """Have a disk full once Ray Train has listed a checkpoint, whatever is removed from it."""
    work = output.with_name(f".{output.name}.work")
    ended = threading.Event()

    def fill() -> None:
        while not list(work.glob("align-*/checkpoint_manager_snapshot.json")):
            if ended.wait(0.01):
                return
        with open(disk / "filler", "wb", buffering=0) as file:
            while not ended.wait(0.001):
                with contextlib.suppress(OSError):
                    while file.write(bytes(1 << 16)):
                        pass

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield
    finally:
        ended.set()
        filler.join()
