"""Evaluate the loss on each source's held-out documents during training, on all workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from loram_ray.alignment.batches import to_device, unlabelled_batch
from loram_ray.config import AlignConfig
from loram_ray.corpus.columnar import open_parquet
from loram_ray.corpus.sources import SourceInfo, list_sources
from loram_ray.corpus.stream import columns_of
from loram_ray.losses import summed_loss
from loram_ray.models.tokenizer import Frame


@torch.no_grad()
def held_out_losses(
    model: Any,
    config: AlignConfig,
    corpus: Path,
    frame: Frame,
    isolated: bool,
    worker: int,
    workers: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the mean negative log-likelihood of each source's held-out tokens, in nats.

    All workers must call this, since ZeRO-3 gathers the weights collectively.

    Args:
        model: Causal LM to evaluate.
        config: Configuration of the stage.
        corpus: Directory of the prepared corpus.
        frame: Token ids that begin and end a document.
        isolated: Whether documents are isolated from each other.
        worker: Rank of the worker.
        workers: Number of workers.
        device: Device of the model.
    """
    found: dict[str, float] = {}
    model.eval()
    for source in list_sources(corpus):
        rows = min(source.held_out_sequences, config.evaluate_sequences)
        if not rows:
            continue
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        share = config.micro_batch_size * workers
        for first in range(0, rows, share):
            batch = unlabelled_batch(
                (config.micro_batch_size, config.corpus.sequence_length), device
            )
            start = first + worker * config.micro_batch_size
            if start < rows:
                end = min(start + config.micro_batch_size, rows)
                batch = to_device(_read(source, start, end), device, frame, isolated)
            total, count = summed_loss(
                model, batch.input_ids, None, batch.labels, positions=batch.positions
            )
            sums += torch.stack([total.double(), count.double()])
        torch.distributed.all_reduce(sums)
        found[source.name] = float(sums[0] / sums[1].clamp(min=1))
    model.train()
    return found


def _read(source: SourceInfo, start: int, end: int) -> dict[str, np.ndarray]:
    """Read held-out rows ``[start, end)`` of a source across its files."""
    parts: list[dict[str, np.ndarray]] = []
    before = 0
    for path in source.held_out_files:
        file = open_parquet(path, str(path))
        rows = file.metadata.num_rows
        first, last = max(start - before, 0), min(end - before, rows)
        if first < last:
            parts.append(columns_of(file.read().slice(first, last - first)))
        before += rows
        if before >= end:
            break
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
