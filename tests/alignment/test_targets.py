"""Cached targets: what Ray Data caches, and what Ray Train and DeepSpeed do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import loram_ray as lr
from helpers import aligning, tiny
from helpers.aligning import BATCH, LENGTH, LR
from loram_ray.alignment.targets import (
    prepare_targets,
    read_targets,
    target_file,
    visited_blocks,
)
from loram_ray.artifacts.manifest import Manifest, write_json
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.config import CorpusConfig
from loram_ray.corpus.prepare import prepare_corpus
from loram_ray.corpus.sources import SourceInfo, write_sources
from loram_ray.corpus.stream import Share, list_blocks, open_order
from loram_ray.models.loading import load_model
from loram_ray.models.tokenizer import frame_of
from loram_ray.runtime.progress import METRICS_FILE

STEPS = 4


@pytest.fixture(scope="module")
def teaching_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose next tokens are far from uniform."""
    directory = tiny.write_base(tmp_path_factory.mktemp("teaching") / "base")
    with Checkpoint(directory) as checkpoint:
        tensors = dict(checkpoint)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 20
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pruned(teaching_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "pruned"
    lr.prune(lr.PruneConfig(base=str(teaching_base), output=output, ratio=0.5, layers=(1, 3)))
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny.texts())


def stage_config(
    base: Path, pruned: Path, text: Path, output: Path, **changes: Any
) -> lr.AlignConfig:
    settings = {
        "base": str(base),
        "objective": "distillation",
        "distillation": {"top_k": tiny.VOCABULARY, "batch_size": 3},
        "steps": STEPS,
        **changes,
    }
    return aligning.config(pruned, text, output, **settings)


@pytest.fixture(scope="module")
def corpus(
    pruned: Path, text: Path, tmp_path_factory: pytest.TempPathFactory, embedded_ray: None
) -> StageResult:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    settings = CorpusConfig.model_validate(
        {"sources": [{"path": str(text)}], "sequence_length": LENGTH}
    )
    return prepare_corpus(settings, pruned, folder)


@pytest.mark.cluster
@pytest.mark.parametrize(
    "stream_rows", [None, pytest.param(100, marks=pytest.mark.slow)], ids=["whole", "streamed"]
)
def test_cached_targets_are_those_of_the_stock_model(
    stream_rows: int | None,
    teaching_base: Path,
    pruned: Path,
    text: Path,
    corpus: StageResult,
    tmp_path: Path,
) -> None:
    k = 5
    distillation = {"top_k": k, "temperature": 1.5, "batch_size": 3, "stream_rows": stream_rows}
    config = stage_config(
        teaching_base, pruned, text, tmp_path, distillation=distillation, steps=1000
    )
    done = prepare_targets(config, teaching_base, "fingerprint", corpus, None, tmp_path / "targets")
    blocks = list_blocks(corpus.output)
    assert blocks == visited_blocks(config, corpus.output)
    model = load_model(teaching_base, "fp32")
    missing = []
    for block in blocks:
        table = pq.ParquetFile(block.path).read_row_group(block.group)
        ids = torch.tensor(table["input_ids"].to_pylist())
        with torch.inference_mode():
            probs = (model(ids).logits / 1.5).softmax(-1).sort(-1, descending=True)
        rows = np.arange(block.rows)[::-2]
        found = read_targets(done.output, block, rows)
        kept = torch.from_numpy(rows.copy())
        assert torch.equal(torch.from_numpy(found["token_ids"]).long(), probs.indices[kept, :, :k])
        torch.testing.assert_close(
            torch.from_numpy(found["log_probs"]).float().exp(),
            probs.values[kept, :, :k],
            rtol=5e-3,
            atol=1e-5,
        )
        torch.testing.assert_close(
            torch.from_numpy(found["missing"]), probs.values[kept, :, k:].sum(-1)
        )
        stored = pq.read_table(done.output / target_file(block))
        assert stored["row_id"].equals(table["row_id"])
        missing.append(probs.values[..., k:].sum(-1).flatten())
    details = done.manifest.details
    assert details["missing_probability"] == pytest.approx(float(torch.cat(missing).mean()))
    assert details["tokens"] == sum(block.rows for block in blocks) * LENGTH
    sizes = sum(path.stat().st_size for path in done.output.glob("unit-*.parquet"))
    assert details["bytes_per_token"] == sizes / details["tokens"]
    again = prepare_targets(
        config, teaching_base, "fingerprint", corpus, None, tmp_path / "targets"
    )
    assert again.skipped


@pytest.mark.slow
@pytest.mark.cluster
def test_targets_that_were_cut_are_continued(
    teaching_base: Path, pruned: Path, text: Path, corpus: StageResult, tmp_path: Path
) -> None:
    """What is there is not computed again; a block without its summary is."""
    config = stage_config(teaching_base, pruned, text, tmp_path, steps=1000)
    whole = prepare_targets(config, teaching_base, "fingerprint", corpus, None, tmp_path / "whole")
    first, *others = list_blocks(corpus.output)
    cut = StageDirectory(tmp_path / "cut")
    prepared: list[str] = []

    def interrupted(target: StageDirectory) -> None:
        for block in others:
            name = target_file(block)
            (target.work / name).write_bytes((whole.output / name).read_bytes() + b"marked")
            summary = {"tokens": 1, "bytes": 1, "missing": 0.0, "seconds": 0.0}
            write_json(target.work / name.replace(".parquet", ".json"), summary)
            prepared.append(name)
        (target.work / target_file(first)).write_bytes(b"half a file without its summary")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(
            cut.output,
            "targets",
            settings=whole.manifest.settings,
            parents=whole.manifest.parents,
            base_fingerprint="fingerprint",
            write=interrupted,
        )
    done = prepare_targets(config, teaching_base, "fingerprint", corpus, None, cut.output)
    assert len(prepared) == len(others)
    for name in prepared:
        assert (done.output / name).read_bytes().endswith(b"marked")
    name = target_file(first)
    assert (done.output / name).read_bytes() == (whole.output / name).read_bytes()


@pytest.mark.slow
@pytest.mark.cluster
def test_seeds_that_share_a_corpus_have_targets_each(
    teaching_base: Path, pruned: Path, text: Path, tmp_path: Path, embedded_ray: None
) -> None:
    """Alignments with one ``cache_dir`` reuse what is alike, and never meet what is not."""
    corpus = StageResult(tmp_path / "corpus", Manifest("corpus", "id", "base", {}, {}), False)
    write_corpus(corpus.output)

    def prepared(**changes: Any) -> StageResult:
        config = stage_config(
            teaching_base, pruned, text, tmp_path / "a", cache_dir=tmp_path, steps=2, **changes
        )
        output = tmp_path / "targets"
        return prepare_targets(config, teaching_base, "fingerprint", corpus, None, output)

    first, second = prepared(seed=0), prepared(seed=1)
    assert first.output != second.output
    for done, seed in ((first, 0), (second, 1)):
        config = stage_config(teaching_base, pruned, text, tmp_path / "a", steps=2, seed=seed)
        visited = {target_file(block) for block in visited_blocks(config, corpus.output)}
        assert {path.name for path in done.output.glob("*.parquet")} == visited
    assert prepared(seed=0).skipped and prepared(seed=1).skipped


@pytest.fixture(scope="module")
def plain(teaching_base: Path, pruned: Path, corpus: StageResult) -> aligning.Training:
    """Distillation as a plain PyTorch loop on whole batches and whole logits."""
    teacher = load_model(teaching_base, "fp32")

    def divergence(model: Any, batch: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        wanted = torch.arange(1, LENGTH) < length[:, None]
        with torch.no_grad():
            log_p = teacher(batch).logits[:, :-1][wanted].log_softmax(-1)
        log_q = model(batch).logits[:, :-1][wanted].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return aligning.plain_training(pruned, corpus.output, STEPS, divergence)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("targets", "zero_stage", "workers"),
    [
        pytest.param("cached", 1, 1, marks=pytest.mark.slow),
        pytest.param("live", 2, 1, marks=[pytest.mark.slow, pytest.mark.thorough]),
        pytest.param("live", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_distilled_alignment_equals_a_plain_pytorch_loop(
    targets: str,
    zero_stage: int,
    workers: int,
    teaching_base: Path,
    pruned: Path,
    text: Path,
    plain: tuple[list[float], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """The cached targets here are whole distributions, in float16."""
    config = stage_config(
        teaching_base,
        pruned,
        text,
        tmp_path / "aligned",
        distillation={"targets": targets, "top_k": tiny.VOCABULARY},
        zero_stage=zero_stage,
        workers=workers,
    )
    lr.align(config)
    lines = [json.loads(x) for x in (tmp_path / "aligned" / METRICS_FILE).read_text().splitlines()]
    expected_losses, expected = plain
    assert [line["loss"] for line in lines] == pytest.approx(expected_losses, rel=2e-3)
    assert all(line["divergence"] == pytest.approx(line["loss"]) for line in lines)
    assert all(line["nll"] > line["loss"] for line in lines)
    with Checkpoint(tmp_path / "aligned") as checkpoint:
        found = dict(checkpoint)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        # AdamW turns float rounding in a near-zero gradient into a step of up to lr
        assert (tensor - expected[name]).abs().mean() < 2e-5, name
    moved = found["model.layers.1.mlp.up_proj.weight"]
    with Checkpoint(pruned) as checkpoint:
        before = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert (moved - before).abs().max() > LR / 2


@pytest.mark.slow
@pytest.mark.cluster
def test_targets_of_isolated_documents_are_those_of_the_documents_alone(
    teaching_base: Path, pruned: Path, text: Path, corpus: StageResult, tmp_path: Path
) -> None:
    config = stage_config(
        teaching_base,
        pruned,
        text,
        tmp_path,
        isolate_documents=True,
        steps=1000,
        distillation={"top_k": 3},
    )
    frame = frame_of(tiny.tokenizer())
    output = tmp_path / "targets"
    done = prepare_targets(config, teaching_base, "fingerprint", corpus, frame, output)
    model = load_model(teaching_base, "fp32")
    [block, *_] = list_blocks(corpus.output)
    table = pq.ParquetFile(block.path).read_row_group(block.group)
    rows = np.arange(block.rows)
    found = torch.from_numpy(read_targets(done.output, block, rows)["missing"])
    split = 0
    for row in range(6):
        ids = table["input_ids"][row].as_py()
        ends = [i + 1 for i, token in enumerate(ids) if token == frame.end]
        edges = [0, *ends, len(ids)]
        for begin, end in zip(edges, edges[1:], strict=False):
            if begin == end:
                continue
            with torch.inference_mode():
                probs = model(torch.tensor([ids[begin:end]])).logits.softmax(-1)[0]
            missing = 1 - probs.topk(3).values.sum(-1)
            torch.testing.assert_close(found[row, begin:end], missing, atol=1e-5, rtol=1e-4)
            split += begin > 0
    assert split > 0


def test_another_base_is_refused_before_anything_is_written(
    base: Path, teaching_base: Path, pruned: Path, text: Path, tmp_path: Path
) -> None:
    config = stage_config(base, pruned, text, tmp_path / "aligned")
    with pytest.raises(lr.LoramError, match=r"align.base .* has fingerprint .* is for"):
        lr.align(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"top_k": 260}, r"top_k must be at most the vocabulary's size, 259, got 260"),
        ({"targets": "live", "hidden_layers": [4]}, r"hidden_layers must be from 0 to 3, got 4"),
    ],
)
def test_what_the_base_has_not_is_refused(
    distillation: dict[str, Any],
    message: str,
    teaching_base: Path,
    pruned: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    config = stage_config(teaching_base, pruned, text, tmp_path / "a", distillation=distillation)
    with pytest.raises(lr.LoramError, match=message):
        lr.align(config)


@pytest.mark.parametrize(
    ("workers", "distillation", "most"),
    [
        ({}, {}, 1),
        ({"workers": 8}, {}, 8),
        ({"workers": 8}, {"gpus_per_worker": 4}, 2),
        ({"workers": 2}, {"gpus_per_worker": 4}, 1),
        ({"workers": 8, "min_workers": 2}, {}, 2),
        ({"workers": 8, "min_workers": 2}, {"workers": 3}, 3),
    ],
)
def test_targets_are_computed_on_what_training_will_have(
    workers: dict[str, int], distillation: dict[str, Any], most: int, tmp_path: Path
) -> None:
    config = stage_config(
        tmp_path, tmp_path, tmp_path, tmp_path, distillation=distillation, **workers
    )
    assert (config.target_workers, config.max_workers) == (most, config.workers)


def write_corpus(folder: Path) -> None:
    """A prepared corpus of one source: ten blocks of a batch each."""
    schema = pa.schema({"row_id": pa.int64(), "input_ids": pa.list_(pa.int32(), LENGTH)})
    folder.mkdir(exist_ok=True)
    file = folder / "unit-000000.parquet"
    ids = pa.array(np.arange(BATCH * LENGTH, dtype=np.int32) % tiny.VOCABULARY)
    columns = [pa.array(np.arange(BATCH)), pa.FixedSizeListArray.from_arrays(ids, LENGTH)]
    with pq.ParquetWriter(file, schema) as writer:
        for _ in range(10):
            writer.write_table(pa.table(columns, schema=schema))
    source = SourceInfo(name="text", weight=None, share=1.0, unit_files=(file,), held_out_files=())
    write_sources(folder, [source])


def test_only_blocks_that_training_reads_are_asked_for(
    teaching_base: Path, pruned: Path, text: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path)
    config = stage_config(teaching_base, pruned, text, tmp_path / "aligned", steps=3)
    found = visited_blocks(config, tmp_path)
    groups = [block.group for block in found]
    assert len(groups) == 8 and groups == sorted(groups)  # of ten; a window's, for three batches
    share = Share(0, 3 * BATCH, BATCH, worker=0, workers=1)
    order = open_order(tmp_path, config.seed)
    seen = [
        piece.block.group
        for chunk in order.chunks(0, 3 * BATCH)
        for piece in order.pieces(chunk)
        if share.takes(piece.positions).any()
    ]
    assert sorted(seen) == groups
