"""Settings of alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from loram_ray.config.base import OptimiserConfig, Precision, Section
from loram_ray.config.corpus import CorpusConfig

Offload = Literal["none", "cpu", "nvme"]


class DistillationConfig(Section):
    """What the pruned model learns of its base."""

    targets: Literal["cached", "live"] = Field(
        "cached",
        description="cached: the base's likeliest tokens, computed once beside the output; live: "
        "the base runs beside the pruned model in training",
    )
    top_k: int = Field(64, ge=1, description="cached: tokens kept of each distribution")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of both distributions")
    causal_lm_weight: float = Field(
        0.0, ge=0, le=1, description="share of the causal-LM loss; distillation has the rest"
    )
    hidden_layers: tuple[int, ...] = Field(
        (), description="live: layers whose outputs are to be the base's, too"
    )
    hidden_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the relative squared error of those outputs"
    )
    workers: int | None = Field(
        None, ge=1, description="cached: actors; default: as many as the workers' GPUs will hold"
    )
    gpus_per_worker: int = Field(
        1, ge=1, description="cached: GPUs that an actor shares the base out over, where there are"
    )
    batch_size: int = Field(8, ge=1, description="cached: sequences in one forward of the base")
    stream_rows: int | None = Field(
        None,
        ge=1,
        description="cached: run the base layer by layer over so many sequences at a time, their "
        "hidden states on disk; for a base that does not fit. default: load it whole",
    )

    def copies(self, gpus: int) -> int:
        """Copies of the base that so many GPUs hold, an actor each; one at least."""
        return max(gpus // self.gpus_per_worker, 1)

    @model_validator(mode="after")
    def _hidden_states_are_live(self) -> DistillationConfig:
        if self.hidden_layers and self.targets != "live":
            raise ValueError(
                f"hidden_layers must be empty where targets are cached, got "
                f"{list(self.hidden_layers)}: hidden states are too large to keep; "
                "set targets to live or leave them out"
            )
        return self


class AlignConfig(Section):
    """align: continual pre-training of a pruned model on Ray Train and DeepSpeed."""

    pruned: Path = Field(description="directory written by prune")
    output: Path = Field(description="directory to write")
    corpus: CorpusConfig
    prepared: Path | None = Field(
        None,
        description="directory of the packed corpus and of the base's targets, which alignments "
        "over one corpus can share; default: beside the output",
    )
    isolate_documents: bool = Field(
        False, description="documents packed into one sequence do not see each other"
    )
    objective: Literal["causal_lm", "distillation"] = Field(
        "distillation",
        description="distillation: predict what the base predicts on the corpus; causal_lm: "
        "predict the corpus, as the paper does",
    )
    base: str | None = Field(None, description="base that was pruned; for distillation")
    distillation: DistillationConfig = DistillationConfig()
    steps: int | None = Field(
        None, ge=1, description="optimiser steps; default: what tokens asks for, else 1600"
    )
    tokens: int | None = Field(
        None, ge=1, description="tokens to train on, instead of steps; the last step is a whole one"
    )
    max_hours: float | None = Field(
        None, gt=0, description="end after the step at which this time is up, with what is learnt"
    )
    batch_size: int = Field(128, ge=1, description="sequences in a step, over all workers")
    micro_batch_size: int = Field(4, ge=1, description="sequences in one forward of one worker")
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=5e-5, warmup_steps=100)
    workers: int = Field(1, ge=1, description="Ray Train workers (one GPU each where there are)")
    min_workers: int | None = Field(
        None, ge=1, description="go on with fewer workers, down to so many, while nodes are gone"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPUs of a worker")
    precision: Precision = Field("bf16", description="of weights and activations")
    frozen: tuple[Literal["lm_head", "embeddings", "norms"], ...] = Field(
        ("lm_head",),
        description="what stays as it is; lm_head, as in the paper, with what is tied to it",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input for the backward pass, a third more work"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    offload_optimiser: Offload = Field(
        "none", description="where the optimiser's state is; nvme needs zero_stage 3"
    )
    offload_parameters: Offload = Field(
        "none", description="where partitions of weights wait; needs zero_stage 3"
    )
    offload_folder: Path | None = Field(None, description="folder on a fast disk, for nvme")
    deepspeed: Path | None = Field(
        None,
        description="DeepSpeed JSON of your own; its keys win, but for those that other settings "
        "here decide, which it may leave to them or say the same",
    )
    evaluate_every: int | None = Field(
        None,
        ge=1,
        description="steps between evaluations of what the sources hold out; there is one before "
        "the first step, too",
    )
    evaluate_sequences: int = Field(
        256, ge=1, description="held-out sequences of each source that are evaluated, at most"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (),
        description="where the driver sends metrics, besides metrics.jsonl and Ray's own",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="of one worker's device, for MFU; default: known for common GPUs"
    )
    log_rows: bool = Field(
        False, description="write the row ids of every step's sequences to rows.jsonl"
    )
    checkpoint_every: int = Field(
        100, ge=1, description="steps between checkpoints; a notice of preemption makes one, too"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept while training")
    staging_folder: Path | None = Field(
        None,
        description="folder on each worker's own disk where a checkpoint waits to be copied to the "
        "output's disk beside the next steps; default: the system's temporary one",
    )
    max_failures: int = Field(
        3, ge=0, description="worker failures survived; preempted nodes are not counted"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data order")

    @property
    def total_steps(self) -> int:
        """Optimiser steps, where time does not end them."""
        if self.tokens is not None:
            return -(-self.tokens // (self.batch_size * self.corpus.sequence_length))
        return self.steps or 1600

    def accumulation(self, workers: int) -> int:
        """Micro-batches of each of so many workers in a step."""
        return -(-self.batch_size // (self.micro_batch_size * workers))

    @property
    def target_workers(self) -> int:
        """Actors that compute targets; by default as many as there are GPUs for in any case."""
        workers = self.min_workers or self.workers
        return self.distillation.workers or self.distillation.copies(workers)

    @property
    def actors(self) -> int:
        """Workers at a time, of training or of the computation of targets."""
        return max(self.workers, self.target_workers)

    @model_validator(mode="after")
    def _distillation_has_a_base(self) -> AlignConfig:
        if self.objective == "distillation" and self.base is None:
            raise ValueError(
                "base must be given for objective distillation; name the base model, or set "
                "objective to causal_lm"
            )
        return self

    @model_validator(mode="after")
    def _layers_see_whole_sequences(self) -> AlignConfig:
        if self.isolate_documents and self.distillation.stream_rows is not None:
            raise ValueError(
                "isolate_documents must be false where distillation.stream_rows is given, the "
                "base then sees whole sequences; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_held_out(self) -> AlignConfig:
        if self.evaluate_every is not None and not any(s.held_out for s in self.corpus.sources):
            raise ValueError(
                "evaluate_every needs a source with held_out above 0; set it for a source"
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> AlignConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps must be left out where tokens is given, got {self.steps} and {self.tokens}"
            )
        return self

    @model_validator(mode="after")
    def _stage_offloads(self) -> AlignConfig:
        stage = self.zero_stage
        if self.offload_parameters != "none" and stage < 3:
            raise ValueError(f"zero_stage must be 3 to offload parameters, got {stage}; raise it")
        if self.offload_optimiser != "none" and stage < 1:
            raise ValueError("zero_stage must be at least 1 to offload the optimiser; raise it")
        if "nvme" in (self.offload_optimiser, self.offload_parameters):
            if stage < 3:
                raise ValueError(f"zero_stage must be 3 to offload to nvme, got {stage}; raise it")
            if self.offload_folder is None:
                raise ValueError("offload_folder must be given for nvme; name a folder there")
        if self.offload_optimiser == "nvme" and self.min_workers is not None:
            raise ValueError(
                f"min_workers must be left out where offload_optimiser is nvme, got "
                f"{self.min_workers}: such a run goes on with as many workers; remove it"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> AlignConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, "
                f"got {self.batch_size}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _fewest_workers(self) -> AlignConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers must be at most workers = {self.workers}, got {self.min_workers}; "
                "change one of the two"
            )
        return self
