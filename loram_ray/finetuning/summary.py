"""Summary of a training. Reading it does not import transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a training.

    Attributes:
        examples: Number of training examples.
        tokens: Number of tokens trained on, prompts included.
        trained_parameters: Number of the adapter's parameters.
        model_parameters: Number of the frozen model's parameters.
        model_bytes: Size of the frozen model's weights in bytes.
        seconds: Duration of this attempt in seconds.
        steps: Number of optimiser steps, up to the end or to early stopping.
        held_out: Number of held-out examples.
        best_step: Step whose adapter was kept; None without held-out examples.
        eval_loss: Held-out loss of the kept adapter, in nats per label.
    """

    examples: int
    tokens: int
    trained_parameters: int
    model_parameters: int
    model_bytes: int
    seconds: float
    steps: int
    held_out: int = 0
    best_step: int | None = None
    eval_loss: float | None = None
