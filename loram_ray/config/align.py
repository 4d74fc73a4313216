"""Settings of alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from loram_ray.config.corpus import CorpusConfig
from loram_ray.config.section import OptimiserConfig, Precision, Section


class AlignConfig(Section):
    """align: continual pre-training of a pruned model on Ray Train and DeepSpeed."""

    pruned: Path = Field(description="directory written by prune")
    output: Path = Field(description="directory to write")
    corpus: CorpusConfig
    steps: int = Field(1600, ge=1, description="optimiser steps")
    batch_size: int = Field(128, ge=1, description="sequences in a step, over all workers")
    micro_batch_size: int = Field(4, ge=1, description="sequences in one forward of one worker")
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=5e-5, warmup_steps=100)
    workers: int = Field(1, ge=1, description="Ray Train workers (one GPU each where there are)")
    cpus_per_worker: int = Field(1, ge=1, description="CPUs of a worker")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Precision = Field("bf16", description="of weights and activations")
    freeze_lm_head: bool = Field(
        True, description="keep lm_head (and what is tied to it) as it is, as the paper does"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="worker failures survived")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data order")

    @model_validator(mode="after")
    def _batches_divide(self) -> AlignConfig:
        share = self.workers * self.micro_batch_size
        if self.batch_size % share:
            raise ValueError(
                "batch_size must be a multiple of workers * micro_batch_size = "
                f"{share}, got {self.batch_size}; change one of the three"
            )
        return self
