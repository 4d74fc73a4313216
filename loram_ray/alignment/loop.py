"""Training loop of one Ray Train worker."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loram_ray.alignment.batches import Inputs, MicroBatch, steps
from loram_ray.alignment.checkpoints import (
    Checkpoints,
    FailedStep,
    Progress,
    last_checkpoint,
    reporting_full_disks,
    staging_prefix,
)
from loram_ray.alignment.deepspeed_config import export_partitioned
from loram_ray.alignment.engine import start_engine
from loram_ray.alignment.held_out import held_out_losses
from loram_ray.alignment.mfu import flops_per_token, linear_weights, peak_tflops
from loram_ray.alignment.objective import PARTS, AlignmentModel
from loram_ray.artifacts.manifest import write_json
from loram_ray.config import AlignConfig
from loram_ray.losses import labelled
from loram_ray.runtime.locks import alone
from loram_ray.runtime.memory import peak_memory_gb
from loram_ray.runtime.progress import HELD_OUT, METRICS_FILE, MetricsLog
from loram_ray.runtime.scratch import scratch

OUTCOME_FILE = "outcome.json"
ROWS_FILE = "rows.jsonl"
"""File with the row ids of each step, if enabled."""


@dataclass(frozen=True)
class Outcome(Progress):
    """Result of a run.

    Attributes:
        hashes: SHA-256 of the written files, by name.
    """

    hashes: dict[str, str]


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a worker.

    Attributes:
        config: Configuration of the stage.
        deepspeed: DeepSpeed configuration supplied by the user.
        inputs: Inputs besides the pruned model.
        work: Directory for metrics, locks and checkpoints, shared by all workers.
        export: Directory for the aligned weights.
    """

    config: AlignConfig
    deepspeed: dict[str, Any]
    inputs: Inputs
    work: Path
    export: Path

    @property
    def storage(self) -> Path:
        """Ray Train's directory of the run, with its checkpoints; Ray displays its name."""
        return self.work / f"align-{self.config.output.name}"


def train_loop(settings: dict[str, Any]) -> None:
    """Run one worker: load, resume, train, save checkpoints and export.

    Raises:
        FailedStep: If the loss is not finite, or the disk is full.
    """
    import ray.train

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    loop: LoopSettings = settings["loop"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(context.get_local_rank())
    with (
        alone(loop.work) if rank == 0 else nullcontext(),
        scratch(staging_prefix(loop.storage), loop.config.staging_dir) as staging,
    ):
        checkpoint, universal = last_checkpoint(loop.work, rank, workers)
        teacher = loop.inputs.teacher
        engine, progress = start_engine(
            loop.config, loop.deepspeed, teacher, workers, checkpoint, universal
        )
        checkpoints = Checkpoints(loop.storage, rank, progress.steps, staging)
        progress = _train(engine, loop, rank, workers, progress, checkpoints)
        partitioned = loop.config.zero_stage == 3
        hashes = export_partitioned(
            engine.module.model, loop.config.pruned, loop.export, partitioned, writes=rank == 0
        )
        if rank == 0:
            outcome = Outcome(hashes=hashes, **asdict(progress))
            write_json(loop.work / OUTCOME_FILE, asdict(outcome))
        checkpoints.finish()


def _train(
    engine: Any,
    loop: LoopSettings,
    rank: int,
    workers: int,
    progress: Progress,
    checkpoints: Checkpoints,
) -> Progress:
    config = loop.config
    step, begun = progress.steps, time.perf_counter() - progress.seconds
    is_last = step >= config.total_steps or _time_is_up(config, progress, engine.device)
    logs = _Logs(loop, step) if rank == 0 else None
    notice, paused = PreemptionNotice(), 0.0
    module: AlignmentModel = engine.module
    mfu_per_rate = _mfu_per_rate(config, module, workers)
    if config.evaluate_every and step == 0:
        before = _evaluate(engine, loop, rank, workers)
        if logs is not None:
            logs.write(step, before)
    batches = steps(config, loop.inputs, rank, workers, step, engine.device)
    while not is_last:
        started = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - started
        means, norm = _take_step(engine, micro_batches, workers)
        step += 1
        rows_of_all = partial(_rows_of_all, micro_batches, config, workers, engine.device)
        loss = _finite_loss(module, means, step, rows_of_all)
        row_ids = rows_of_all() if config.log_rows else None
        seconds = time.perf_counter() - started
        progress = Progress(step, time.perf_counter() - begun)
        is_last = step == config.total_steps or _time_is_up(config, progress, engine.device)
        evaluations: dict[str, float] = {}
        if config.evaluate_every and (step % config.evaluate_every == 0 or is_last):
            evaluations = _evaluate(engine, loop, rank, workers)
        if logs is not None:
            metrics = {
                "loss": loss,
                **module.parts(means),
                "lr": engine.get_lr()[0],
                "grad_norm": norm,
                "memory_gb": peak_memory_gb(),
                "data_s": waited,
                "checkpoint_s": paused,
                "copy_s": checkpoints.pop_copy_seconds(),
                **_speed(config, seconds, mfu_per_rate),
                **evaluations,
            }
            logs.write(step, metrics, row_ids)
        paused = 0.0
        if notice.poll() or step % config.checkpoint_every == 0 or is_last:
            paused = checkpoints.save(engine, progress, loss)
    return progress


class _Logs:
    """Metrics of each step and, if enabled, its row ids, in files that rank 0 writes.

    Args:
        loop: Settings of the worker.
        step: Number of completed steps.
    """

    def __init__(self, loop: LoopSettings, step: int) -> None:
        self._work = loop.work
        self._metrics = MetricsLog(loop.work / METRICS_FILE, resume_at=step)
        self._rows = None
        if loop.config.log_rows:  # with the same content as in an uninterrupted run
            self._rows = MetricsLog(loop.work / ROWS_FILE, step, count_restarts=False)

    def write(self, step: int, metrics: dict[str, float], row_ids: list[int] | None = None) -> None:
        """Append what is known about a step."""
        with reporting_full_disks(step, self._work):
            if self._rows is not None and row_ids is not None:
                self._rows.write(step, row_ids=row_ids)
            self._metrics.write(step, **metrics)


def _finite_loss(
    module: AlignmentModel, means: torch.Tensor, step: int, rows: Callable[[], list[int]]
) -> float:
    """Return a step's loss; raise an error that names the batch's rows if it is not finite."""
    loss = float(module.loss(means))
    if not math.isfinite(loss):
        raise FailedStep(
            f"align: the loss is {loss} at step {step}, rows {rows()}; lower "
            "align.optimiser.learning_rate or inspect these rows",
            good_until=step - 2,  # the previous step's weights produced this loss
        )
    return loss


def _take_step(
    engine: Any, micro_batches: list[MicroBatch], workers: int
) -> tuple[torch.Tensor, float]:
    """Perform one optimizer step.

    Returns:
        Means of the loss components over the batch's tokens on all workers, and the gradient norm
        before clipping.
    """
    predicted = torch.stack([labelled(batch.labels).sum() for batch in micro_batches]).sum()
    tokens = _sum_over_workers(predicted).clamp(min=1)
    sums = torch.zeros(len(PARTS), device=engine.device)
    for batch in micro_batches:
        loss, parts = engine(batch.input_ids, batch.labels, batch.top, batch.positions)
        # DeepSpeed averages over micro-batches and workers; the loss is a mean over tokens.
        share = len(micro_batches) * workers / tokens
        engine.backward(loss * share)
        norm = gradient_norm(engine) if batch is micro_batches[-1] else None
        engine.step()
        sums += parts
    norm = engine.get_global_grad_norm() if norm is None else norm
    return _sum_over_workers(sums) / tokens, float(norm or 0.0)


def gradient_norm(engine: Any) -> float | None:
    """Return the norm of the gradients of the next step; None if DeepSpeed computes it.

    Without ZeRO and in fp32 it does not; every worker then holds the same gradients.
    """
    if engine.zero_optimization() or hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None


class PreemptionNotice:
    """Detect new notices that nodes with workers will be preempted."""

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()

    def poll(self) -> bool:
        """Whether new nodes are announced; every worker must ask, and gets the same answer.

        The run resumes on other nodes from the checkpoint taken at that moment.
        """
        import ray.train

        info = ray.train.get_preemption_info()
        nodes = frozenset(info.preempted_node_ids if info is not None else ())
        is_new = bool(nodes - self._known)
        self._known |= nodes
        return is_new


def _rows_of_all(
    micro_batches: list[MicroBatch], config: AlignConfig, workers: int, device: torch.device
) -> list[int]:
    """Gather the row ids of the step's batch from all workers; a collective call."""
    mine = [row for batch in micro_batches for row in batch.row_ids]
    places = config.accumulation(workers) * config.micro_batch_size
    padded = torch.full((places,), -1, device=device)
    padded[: len(mine)] = torch.tensor(mine, device=device)
    gathered = [torch.empty_like(padded) for _ in range(workers)]
    torch.distributed.all_gather(gathered, padded)
    rows = torch.cat(gathered)
    return [int(row) for row in rows[rows >= 0]]


def _evaluate(engine: Any, loop: LoopSettings, rank: int, workers: int) -> dict[str, float]:
    inputs = loop.inputs
    losses = held_out_losses(
        engine.module.model,
        loop.config,
        inputs.corpus,
        inputs.frame,
        inputs.isolated,
        rank,
        workers,
        engine.device,
    )
    return {f"{HELD_OUT}{name}": loss for name, loss in losses.items()}


def _mfu_per_rate(config: AlignConfig, module: AlignmentModel, workers: int) -> float | None:
    """Return the model FLOPs utilisation at one token per second; None if the peak is unknown."""
    peak = config.peak_tflops or peak_tflops()
    if peak is None:
        return None
    return flops_per_token(linear_weights(module.model)) / (workers * peak * 1e12)


def _speed(config: AlignConfig, seconds: float, mfu_per_rate: float | None) -> dict[str, float]:
    tokens_per_s = config.batch_size * config.corpus.sequence_length / seconds
    if mfu_per_rate is None:
        return {"tokens_per_s": tokens_per_s}
    return {"tokens_per_s": tokens_per_s, "mfu": mfu_per_rate * tokens_per_s}


def _time_is_up(config: AlignConfig, progress: Progress, device: torch.device) -> bool:
    """Whether the time limit is reached on any worker, so that all stop at the same step."""
    if config.max_hours is None:
        return False
    mine = progress.seconds >= 3600 * config.max_hours
    return bool(_sum_over_workers(torch.tensor(float(mine), device=device)))


def _sum_over_workers(value: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(value)
    return value
