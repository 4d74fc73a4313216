"""Small alignments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

import loram_ray as lr
from loram_ray.corpus.stream import Share, open_order, read_chunk

STEPS, BATCH, LENGTH, LR = 6, 8, 32, 1e-3
Training = tuple[list[float], dict[str, torch.Tensor]]
"""Loss of each step, and the weights afterwards."""


def config(
    pruned: Path, corpus: Path, output: Path, length: int = LENGTH, **changes: object
) -> lr.AlignConfig:
    settings = {
        "pruned": pruned,
        "output": output,
        "corpus": {"sources": [{"path": str(corpus)}], "sequence_length": length},
        "objective": "causal_lm",
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": 2,
        "optimiser": {"learning_rate": LR, "warmup_steps": 2},
        "precision": "fp32",
        "checkpoint_every": 2,
        **changes,
    }
    return lr.AlignConfig.model_validate(settings)


def next_token_loss(model: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The model's own loss on the tokens in front of the padding."""
    labels = ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100)
    return model(input_ids=ids, labels=labels).loss


def plain_training(
    pruned: Path,
    prepared: Path,
    steps: int,
    loss_of: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] = next_token_loss,
    norms: list[float] | None = None,
) -> Training:
    """The same training as a plain PyTorch loop on whole batches: no Ray Train, no DeepSpeed.

    Args:
        pruned: Directory of the pruned model.
        prepared: Directory of the packed corpus.
        steps: Number of steps.
        loss_of: Loss of the model on the token ids and lengths of a batch.
        norms: List that receives the norm of each step's gradients.
    """
    everything = Share(0, steps * BATCH, BATCH, worker=0, workers=1)
    order = open_order(prepared, 0)
    parts = [read_chunk(order, chunk, everything) for chunk in order.chunks(0, steps * BATCH)]
    ids = torch.cat([torch.from_numpy(p["input_ids"]) for p in parts]).long()
    lengths = torch.cat([torch.from_numpy(p["length"]) for p in parts])
    model = lr.load_pruned(pruned, "fp32").train()
    model.lm_head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, 2, steps)
    losses = []
    for batch, length in zip(ids.split(BATCH), lengths.split(BATCH), strict=True):
        loss = loss_of(model, batch, length)
        optimiser.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        if norms is not None:
            norms.append(norm)
        optimiser.step()
        schedule.step()
        losses.append(float(loss))
    return losses, {name: t.detach() for name, t in model.state_dict().items()}
