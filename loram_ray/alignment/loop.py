"""The training loop of one Ray Train worker."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loram_ray.alignment.deepspeed import (
    export_partitioned,
    import_deepspeed,
    load_partitioned,
)
from loram_ray.alignment.objective import PARTS, AlignmentModel
from loram_ray.alignment.reshape import make_universal, note_workers, workers_of
from loram_ray.alignment.targets import LISTS, read_targets
from loram_ray.config import AlignConfig
from loram_ray.corpus.isolation import document_positions
from loram_ray.corpus.stream import Share, open_order, stream
from loram_ray.distillation import TopTokens
from loram_ray.errors import LoramError
from loram_ray.losses import IGNORED, labelled
from loram_ray.manifest import write_json
from loram_ray.memory import peak_memory_gb
from loram_ray.progress import METRICS_FILE, MetricsLog
from loram_ray.waiting import alone

OUTCOME_FILE = "outcome.json"
_TAG = "state"


@dataclass(frozen=True)
class Inputs:
    """What a worker reads besides the pruned model.

    Attributes:
        corpus: prepared corpus.
        targets: directory of the base's likeliest tokens over it, or None.
        teacher: the base, whose distributions are computed live, or None.
        closing: id of the token that ends a document, where documents do not see each other.
    """

    corpus: Path
    targets: Path | None
    teacher: Path | None
    closing: int | None


@dataclass(frozen=True)
class LoopSettings:
    """What a worker is told.

    Attributes:
        config: the stage's configuration.
        deepspeed: DeepSpeed's dictionary.
        inputs: what it reads.
        work: directory shared by all workers for metrics and locks.
        export: directory that the aligned weights are written into.
    """

    config: AlignConfig
    deepspeed: dict[str, Any]
    inputs: Inputs
    work: Path
    export: Path


def train_loop(settings: dict[str, Any]) -> None:
    """Run one worker: load, resume, train, checkpoint, export.

    Raises:
        LoramError: the loss is not finite.
    """
    import ray.train

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    loop: LoopSettings = settings["loop"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(context.get_local_rank())
    with alone(loop.work) if rank == 0 else nullcontext():
        with _last_checkpoint(loop, rank) as (checkpoint, universal):
            engine = _start_engine(loop, universal)
            progress = _resume(engine, checkpoint)
        progress = _train(engine, loop, rank, progress)
        partitioned = loop.config.zero_stage == 3
        hashes = export_partitioned(
            engine.module.model, loop.config.pruned, loop.export, partitioned, writes=rank == 0
        )
        if rank == 0:
            write_json(loop.work / OUTCOME_FILE, {"hashes": hashes, **asdict(progress)})


@contextmanager
def _last_checkpoint(loop: LoopSettings, rank: int) -> Iterator[tuple[Path | None, bool]]:
    """Have the last checkpoint's directory, and whether it was made universal for these workers."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, False
        return
    with checkpoint.as_directory() as directory:
        found = Path(directory)
        if workers_of(found) == loop.config.workers:
            yield found, False
            return
        universal = loop.work / "universal" / Path(checkpoint.path).name
        if rank == 0:
            make_universal(found, _TAG, universal)
        torch.distributed.barrier()
        yield universal, True


def _start_engine(loop: LoopSettings, universal: bool) -> Any:
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    config = loop.config
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)  # on the process group of Ray Train
    torch.manual_seed(config.seed)
    ds_config = dict(loop.deepspeed)
    if universal:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    model = load_partitioned(config.pruned, ds_config, config.precision)
    model.train()
    _freeze(model, config.frozen)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if loop.inputs.teacher is not None:  # under ZeRO-3 the base is partitioned, too
        teacher = load_partitioned(loop.inputs.teacher, ds_config, config.precision)
        teacher.requires_grad_(False)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        warmup = config.optimiser.warmup_steps
        if config.optimiser.schedule == "constant":
            return get_constant_schedule_with_warmup(optimizer, warmup)
        return get_cosine_schedule_with_warmup(optimizer, warmup, config.total_steps)

    engine, *_ = deepspeed.initialize(
        model=AlignmentModel(model, config, teacher),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=ds_config,
        lr_scheduler=schedule,
        dist_init_required=False,
    )
    return engine


def _freeze(model: Any, frozen: Collection[str]) -> None:
    if "lm_head" in frozen:
        model.get_output_embeddings().requires_grad_(False)
    if "embeddings" in frozen:
        model.get_input_embeddings().requires_grad_(False)
    if "norms" in frozen:
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(False)


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        steps: optimiser steps done.
        seconds: spent on them, over all attempts; what was lost with a worker is not counted.
    """

    steps: int
    seconds: float


def _resume(engine: Any, checkpoint: Path | None) -> Progress:
    if checkpoint is None:
        return Progress(0, 0.0)
    _, state = engine.load_checkpoint(str(checkpoint), tag=_TAG, load_module_strict=False)
    return Progress(int(state["steps"]), float(state["seconds"]))


def _train(engine: Any, loop: LoopSettings, rank: int, progress: Progress) -> Progress:
    config = loop.config
    step, begun = progress.steps, time.perf_counter() - progress.seconds
    is_last = step >= config.total_steps or _time_is_up(config, progress, engine.device)
    log = MetricsLog(loop.work / METRICS_FILE, resume_at=step) if rank == 0 else None
    batches = _micro_batches(loop, rank, step)
    module: AlignmentModel = engine.module
    while not is_last:
        started = time.perf_counter()
        micro_batches = [
            _to_device(batch, engine.device, loop.inputs.closing)
            for batch in islice(batches, engine.gradient_accumulation_steps())
        ]
        predicted = torch.stack([labelled(batch.labels).sum() for batch in micro_batches]).sum()
        tokens = _sum_over_workers(predicted).clamp(min=1)
        sums = torch.zeros(len(PARTS), device=engine.device)
        for batch in micro_batches:
            found = engine(batch.input_ids, batch.labels, batch.top, batch.positions)
            # DeepSpeed takes the mean over micro-batches and workers; the loss is one over tokens.
            share = len(micro_batches) * config.workers / tokens
            engine.backward(module.loss(found) * share)
            engine.step()
            sums += found.detach()
        step += 1
        means = _sum_over_workers(sums) / tokens
        loss = float(module.loss(means))
        if not math.isfinite(loss):
            row_ids = [row for batch in micro_batches for row in batch.row_ids]
            raise LoramError(
                f"align: the loss is {loss} at step {step} (worker {rank}, rows {row_ids}); lower "
                "align.optimiser.learning_rate or look at those rows; the last checkpoint is kept"
            )
        seconds = time.perf_counter() - started
        if log is not None:
            log.write(
                step,
                loss=loss,
                **module.parts(means),
                lr=engine.get_lr()[0],
                grad_norm=float(engine.get_global_grad_norm() or 0.0),
                memory_gb=peak_memory_gb(),
                tokens_per_s=config.batch_size * micro_batches[0].input_ids.shape[1] / seconds,
            )
        progress = Progress(step, time.perf_counter() - begun)
        is_last = step == config.total_steps or _time_is_up(config, progress, engine.device)
        if step % config.checkpoint_every == 0 or is_last:
            _checkpoint(engine, progress, loss)
    return progress


def _time_is_up(config: AlignConfig, progress: Progress, device: torch.device) -> bool:
    """Whether any worker's clock says so: they must all stop at the same step."""
    if config.max_hours is None:
        return False
    mine = progress.seconds >= 3600 * config.max_hours
    return bool(_sum_over_workers(torch.tensor(float(mine), device=device)))


def _micro_batches(loop: LoopSettings, rank: int, step: int) -> Iterator[dict[str, np.ndarray]]:
    config = loop.config
    share = Share(
        start=step * config.batch_size,
        end=config.total_steps * config.batch_size,
        batch_size=config.batch_size,
        worker=rank,
        workers=config.workers,
    )
    if share.start < share.end:
        beside = (
            partial(read_targets, loop.inputs.targets) if loop.inputs.targets is not None else None
        )
        order = open_order(loop.inputs.corpus, config.seed)
        yield from stream(order, share, config.micro_batch_size, beside)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes, on the worker's device.

    Attributes:
        input_ids: int64 ``[batch, seq]``.
        labels: int64 ``[batch, seq]``; padding carries none.
        top: the base's likeliest tokens, where they were computed before.
        positions: int64 ``[batch, seq]``, beginning anew where documents do not see each other.
        row_ids: of the corpus.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    top: TopTokens | None
    positions: torch.Tensor | None
    row_ids: list[int]


def _to_device(
    batch: dict[str, np.ndarray], device: torch.device, closing: int | None
) -> MicroBatch:
    input_ids = torch.from_numpy(batch["input_ids"].astype(np.int64))
    places = torch.arange(input_ids.shape[1])
    padding = places >= torch.from_numpy(batch["length"].copy())[:, None]
    labels = input_ids.masked_fill(padding, IGNORED)
    positions = None
    if closing is not None:
        positions = document_positions(input_ids, closing)
        labels = labels.masked_fill(positions == 0, IGNORED)  # nothing before it says what it is
    top = None
    if "missing" in batch:
        parts = (torch.from_numpy(batch[name].copy()) for name in LISTS)
        top = TopTokens.rounded(*parts).to(device)
    return MicroBatch(
        input_ids=input_ids.to(device),
        labels=labels.to(device),
        top=top,
        positions=positions.to(device) if positions is not None else None,
        row_ids=batch["row_id"].tolist(),
    )


def _sum_over_workers(value: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(value)
    return value


def _checkpoint(engine: Any, progress: Progress, loss: float) -> None:
    """Save this worker's part and hand it to Ray Train, which joins the parts."""
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        engine.save_checkpoint(
            directory, tag=_TAG, client_state=asdict(progress), exclude_frozen_parameters=True
        )
        if engine.global_rank == 0:
            note_workers(Path(directory), engine.world_size)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": progress.steps, "loss": loss}, checkpoint=checkpoint)
