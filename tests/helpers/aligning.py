"""Small alignments."""

from __future__ import annotations

from pathlib import Path

import loram_ray as lr

STEPS, BATCH, LENGTH, LR = 6, 8, 32, 1e-3


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
