"""Yield a worker's micro-batches, step by step, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from loram_ray.alignment.targets import LISTS, read_targets
from loram_ray.config import AlignConfig
from loram_ray.corpus.isolation import document_positions, openings
from loram_ray.corpus.stream import Share, open_order, stream
from loram_ray.distillation import TopTokens
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import Frame


@dataclass(frozen=True)
class Inputs:
    """Inputs of a worker besides the pruned model.

    Attributes:
        corpus: Directory of the prepared corpus.
        targets: Directory of the base's cached top-k targets, or None.
        teacher: Directory of the base for live distillation, or None.
        frame: Token ids that begin and end a document.
        isolated: Whether documents are isolated from each other.
    """

    corpus: Path
    targets: Path | None
    teacher: Path | None
    frame: Frame
    isolated: bool


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass, on the worker's device.

    Attributes:
        input_ids: Token ids, int64 ``[batch, seq]``.
        labels: Labels, int64 ``[batch, seq]``; `IGNORED` at padding and openings.
        top: The base's cached top-k targets, if any.
        positions: Position ids, int64 ``[batch, seq]``, restarting with each document if isolated.
        row_ids: Row ids in the corpus.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    top: TopTokens | None
    positions: torch.Tensor | None
    row_ids: list[int]


def steps(
    config: AlignConfig,
    inputs: Inputs,
    worker: int,
    workers: int,
    first: int,
    device: torch.device,
) -> Iterator[list[MicroBatch]]:
    """Yield a worker's micro-batches for each step, the same number on every worker.

    If the global batch does not divide evenly, the last workers get micro-batches without labels,
    which do not contribute to the loss.

    Args:
        config: Configuration of the stage.
        inputs: Inputs of the worker.
        worker: Rank of the worker.
        workers: Number of workers.
        first: Number of steps already done.
        device: Device of the batches.
    """
    share = Share(
        start=first * config.batch_size,
        end=config.total_steps * config.batch_size,
        batch_size=config.batch_size,
        worker=worker,
        workers=workers,
        multiple=config.micro_batch_size,
    )
    extra_columns = partial(read_targets, inputs.targets) if inputs.targets is not None else None
    order = open_order(inputs.corpus, config.seed)
    batches: Iterator[dict[str, np.ndarray]] = iter(())
    if share.rows and share.start < share.end:
        batches = stream(order, share, config.micro_batch_size, extra_columns)
    shape = (config.micro_batch_size, config.corpus.sequence_length)
    for _ in range(first, config.total_steps):
        found = [
            to_device(batch, device, inputs.frame, inputs.isolated)
            for batch in islice(batches, share.rows // config.micro_batch_size)
        ]
        empty = config.accumulation(workers) - len(found)
        yield found + [unlabelled_batch(shape, device)] * empty


def to_device(
    batch: dict[str, np.ndarray], device: torch.device, frame: Frame, isolated: bool
) -> MicroBatch:
    """Turn a streamed batch into a micro-batch; padding and openings have no label."""
    input_ids = torch.from_numpy(batch["input_ids"].astype(np.int64))
    places = torch.arange(input_ids.shape[1])
    padding = places >= torch.from_numpy(batch["length"].copy())[:, None]
    labels = input_ids.masked_fill(padding | openings(input_ids, frame), IGNORED)
    positions = None
    if isolated:
        positions = document_positions(input_ids, frame)
        labels = labels.masked_fill(
            positions == 0, IGNORED
        )  # a document's first token has no context
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


def unlabelled_batch(shape: tuple[int, int], device: torch.device) -> MicroBatch:
    """Return a micro-batch ``[batch, seq]`` that does not contribute to the loss."""
    input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
    return MicroBatch(input_ids, torch.full_like(input_ids, IGNORED), None, None, [])
