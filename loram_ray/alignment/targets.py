"""Cache the base's top-k next-token distributions over a prepared corpus, one file per block.

Ray Data computes them once, on actors that hold the base whole or one layer at a time, so training
never loads it. Rows correspond to the rows of the block:

    row_id     int64
    token_ids  int32    [seq * k]  most likely first
    log_probs  float16  [seq * k]  over the whole vocabulary, at the temperature
    missing    float32  [seq]      total probability of all other tokens
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from loram_ray.alignment.teacher import StreamedTeacher, TeacherSpec, WholeTeacher, teacher_of
from loram_ray.artifacts.manifest import digest_of, write_json
from loram_ray.artifacts.stage_directory import StageDirectory, StageResult, run_stage
from loram_ray.config import AlignConfig
from loram_ray.corpus.columnar import open_parquet
from loram_ray.corpus.order import Block
from loram_ray.corpus.spread import failure_of, raise_failures
from loram_ray.corpus.stream import list_blocks, matrix_of, open_order, read_block
from loram_ray.distillation import TopTokens
from loram_ray.models.tokenizer import Frame
from loram_ray.runtime.cluster import gpus_per_worker, require_resources
from loram_ray.runtime.progress import Reporter

LISTS = ("token_ids", "log_probs", "missing")


def prepare_targets(
    config: AlignConfig,
    base: Path,
    fingerprint: str,
    corpus: StageResult,
    frame: Frame | None,
    output: Path,
) -> StageResult:
    """Cache the base's top-k targets for all blocks that training reads, reusing a complete result.

    Ray must be initialised.

    Args:
        config: Configuration of the stage.
        base: Directory of the base.
        fingerprint: Fingerprint of the base.
        corpus: Result of preparing the corpus.
        frame: Token ids that begin and end a document; None unless documents are isolated.
        output: Directory to write. If several alignments share it, each set of blocks and settings
            gets a sibling directory of its own.

    Raises:
        LoramError: If the cluster cannot place the actors, or the base cannot be read.
    """
    blocks = visited_blocks(config, corpus.output)
    distillation = config.distillation
    settings = {
        "top_k": distillation.top_k,
        "temperature": distillation.temperature,
        "precision": config.precision,
        "closing": frame and frame.end,
        "blocks": digest_of([target_file(block) for block in blocks]),
    }
    if config.cache_dir is not None:
        output = output.with_name(f"{output.name}-{digest_of(settings)[:12]}")

    def write(target: StageDirectory) -> None:
        spec = _teacher_spec(config, base, frame, target.work)
        require_resources(config.target_workers, spec.cpus, spec.gpus, "align.distillation.workers")
        _compute(spec, config.target_workers, _groups(blocks, distillation.stream_rows))
        for block in blocks:
            name = target_file(block)
            os.link(target.work / name, target.path / name)  # an interrupted run reuses its blocks
        target.details.update(_totals(target.work, blocks))

    return run_stage(
        output,
        "targets",
        settings=settings,
        parents={"base": fingerprint, "corpus": corpus.manifest.digest},
        base_fingerprint=fingerprint,
        write=write,
    )


def _teacher_spec(config: AlignConfig, base: Path, frame: Frame | None, work: Path) -> TeacherSpec:
    distillation = config.distillation
    return TeacherSpec(
        base=base.resolve(),
        work=work.resolve(),
        top_k=distillation.top_k,
        temperature=distillation.temperature,
        precision=config.precision,
        batch_size=distillation.batch_size,
        cpus=config.cpus_per_worker,
        streamed=distillation.stream_rows is not None,
        gpus=distillation.gpus_per_worker if gpus_per_worker() else 0,
        frame=frame,
    )


def visited_blocks(config: AlignConfig, corpus: Path) -> list[Block]:
    """Return the blocks of the corpus that training reads, in the order of their row ids."""
    visited = open_order(corpus, config.seed).visited(config.total_steps * config.batch_size)
    return [block for block in list_blocks(corpus) if (block.path, block.group) in visited]


def _groups(blocks: Sequence[Block], rows: int | None) -> Iterator[list[Block]]:
    """Yield groups of blocks with at least ``rows`` rows, or single blocks."""
    group: list[Block] = []
    for block in blocks:
        group.append(block)
        if sum(b.rows for b in group) >= (rows or 1):
            yield group
            group = []
    if group:
        yield group


def _compute(spec: TeacherSpec, workers: int, groups: Iterator[list[Block]]) -> None:
    """Compute the groups that are not complete yet on Ray Data actors."""
    import ray.data

    logging.getLogger("ray.data").setLevel(
        logging.ERROR
    )  # Ray Data reports progress in its log file
    everything = list(groups)
    pending = [
        group
        for group in everything
        if not all((spec.work / _summary_file(block)).exists() for block in group)
    ]
    total = sum(block.rows for group in everything for block in group)
    left = sum(block.rows for group in pending for block in group)
    with Reporter("targets", total=total, unit="sequence") as reporter:
        reporter.update(total - left, {})
        if not pending:
            return
        items = [{"blocks": json.dumps([asdict(b) for b in group])} for group in pending]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            TargetWorker,
            fn_constructor_args=(spec,),
            batch_size=1,
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        )
        done, started = total - left, time.perf_counter()
        for batch in dataset.iter_batches(batch_size=None):
            raise_failures(batch)
            done += int(batch["rows"].sum())
            rate = (done - total + left) / (time.perf_counter() - started)
            reporter.update(done, {"sequences_per_s": rate})


@dataclass(frozen=True)
class _Summary:
    """Statistics of a block."""

    tokens: int
    bytes: int
    missing: float
    seconds: float


def _totals(work: Path, blocks: Sequence[Block]) -> dict[str, float]:
    """Sum the blocks' statistics for the manifest."""
    from loram_ray.utils.parsing.documents import read_as

    summaries = [read_as(work / _summary_file(block), _Summary) for block in blocks]
    tokens = sum(summary.tokens for summary in summaries)
    nbytes = sum(summary.bytes for summary in summaries)
    return {
        "tokens": tokens,
        "bytes": nbytes,
        "bytes_per_token": nbytes / tokens,
        "missing_probability": sum(summary.missing for summary in summaries) / tokens,
        "seconds": sum(summary.seconds for summary in summaries),
    }


class TargetWorker:
    """Ray Data actor that writes the targets of blocks."""

    def __init__(self, spec: TeacherSpec) -> None:
        torch.set_num_threads(spec.cpus)
        self._spec = spec

    @cached_property
    def _teacher(self) -> WholeTeacher | StreamedTeacher:
        return teacher_of(self._spec)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Process one group of blocks, given as JSON in ``blocks``."""
        blocks = [Block(**entry) for entry in json.loads(str(batch["blocks"][0]))]
        failure = failure_of(lambda: self._do(blocks))
        return {"rows": np.array([sum(block.rows for block in blocks)]), **failure}

    def _do(self, blocks: Sequence[Block]) -> None:
        started = time.perf_counter()
        tables = [read_block(block) for block in blocks]
        batches = [
            torch.from_numpy(matrix_of(table["input_ids"]).astype(np.int64)).split(
                self._spec.batch_size
            )
            for table in tables
        ]
        answers = self._teacher.answer([batch for of_block in batches for batch in of_block])
        for block, table, of_block in zip(blocks, tables, batches, strict=True):
            targets = [next(answers) for _ in of_block]
            path = self._spec.work / target_file(block)
            write_targets(path, table["row_id"], targets)
            summary = _Summary(
                tokens=sum(batch.numel() for batch in of_block),
                bytes=path.stat().st_size,
                missing=sum(float(top.missing.sum()) for top in targets),
                seconds=time.perf_counter() - started,
            )
            write_json(self._spec.work / _summary_file(block), asdict(summary))
            started = time.perf_counter()
        next(answers, None)  # lets a streamed teacher clean up


def write_targets(path: Path, row_ids: pa.ChunkedArray, parts: Sequence[TopTokens]) -> None:
    """Write a block's targets atomically.

    Args:
        path: File to write.
        row_ids: Row ids of the block.
        parts: Top-k tokens ``[rows, seq, k]`` of the block's rows, in order.
    """

    def column(values: list[np.ndarray]) -> pa.Array:
        joined = np.concatenate(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(joined.reshape(-1)), joined[0].size)

    table = pa.table(
        {
            "row_id": row_ids,
            "token_ids": column([top.token_ids.int().numpy() for top in parts]),
            "log_probs": column([top.log_probs.half().numpy() for top in parts]),
            "missing": column([top.missing.numpy() for top in parts]),
        }
    )
    # Split by byte: the ids' upper bytes are nearly always zero and compress away.
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in LISTS}
    partial = path.with_suffix(".tmp")
    pq.write_table(table, partial, compression="zstd", use_dictionary=False, column_encoding=split)
    partial.replace(path)


def read_targets(folder: Path, block: Block, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Read some rows of a block's targets.

    Args:
        folder: Directory written by `prepare_targets`.
        block: Block to read.
        rows: Row indices in the block, ``[n]``.

    Returns:
        ``token_ids`` int32 and ``log_probs`` float16 ``[n, seq, k]``, ``missing`` float32 ``[n,
        seq]``.
    """
    path = folder / target_file(block)
    table = open_parquet(path, str(path)).read(list(LISTS))
    missing = matrix_of(table["missing"])[rows]
    wide = {
        name: matrix_of(table[name])[rows].reshape(*missing.shape, -1)
        for name in ("token_ids", "log_probs")
    }
    return {**wide, "missing": missing}


def target_file(block: Block) -> str:
    """Return the file name of a block's targets."""
    return f"{Path(block.path).stem}-{block.group:06d}.parquet"


def _summary_file(block: Block) -> str:
    return target_file(block).replace(".parquet", ".json")
