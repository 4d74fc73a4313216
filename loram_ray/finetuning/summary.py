"""What a training says of itself; who only reads it needs no transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSummary:
    """What a training was.

    Attributes:
        examples: examples learnt from.
        tokens: tokens trained on, prompts included.
        trained_parameters: of the adapter.
        model_parameters: of the frozen model.
        model_bytes: of the frozen model's weights.
        seconds: of this attempt.
        steps: optimiser steps until the end, or until patience ended it.
        held_out: examples that were judged by.
        best_step: whose adapter was kept; None without held-out examples.
        eval_loss: of that adapter, in nats a label.
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
