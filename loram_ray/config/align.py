"""Configuration of alignment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from loram_ray.config.base import (
    Free,
    Identified,
    OptimiserConfig,
    Precision,
    Section,
    require_whole_batches,
)
from loram_ray.config.corpus import CorpusConfig
from loram_ray.config.marks import Renamed, SetByComparison
from loram_ray.objectives import OBJECTIVES

Offload = Literal["none", "cpu", "nvme"]
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]


class DistillationConfig(Section):
    """Distillation of the base into the pruned model."""

    targets: Identified[Literal["cached", "live"]] = Field(
        "cached",
        description="Source of the targets. 'cached' computes the base's most likely tokens once "
        "and stores them next to the output; 'live' runs the base during training.",
    )
    top_k: Identified[int] = Field(
        64,
        ge=1,
        description="Number of most likely tokens to store per position, for cached targets.",
    )
    temperature: Identified[float] = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Softmax temperature of the base's and the pruned model's distributions.",
    )
    causal_lm_weight: Identified[float] = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of the causal-LM loss, from 0 to 1; the distillation loss has the "
        "remaining weight.",
    )
    hidden_layers: Identified[tuple[int, ...]] = Field(
        (),
        description="Indices of layers whose outputs are also trained to match the base's, for "
        "live targets.",
    )
    hidden_weight: Identified[float] = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the relative squared error of the hidden_layers' outputs.",
    )
    workers: Free[int | None] = Field(
        None,
        ge=1,
        description="Number of Ray actors that compute cached targets. Default: as many as the "
        "training workers' GPUs can hold.",
    )
    gpus_per_worker: Free[int] = Field(
        1,
        ge=1,
        description="Number of GPUs per actor, over which the base is distributed, for cached "
        "targets.",
    )
    batch_size: Free[int] = Field(
        8, ge=1, description="Sequences per forward pass of the base, for cached targets."
    )
    stream_rows: Free[int | None] = Field(
        None,
        ge=1,
        description="For a base that does not fit in memory: run one layer at a time over this "
        "many sequences, with their hidden states on disk. For cached targets. "
        "Default: load the full base.",
    )

    def copies(self, gpus: int) -> int:
        """Return how many copies of the base fit on ``gpus`` GPUs, one per actor; at least one."""
        return max(gpus // self.gpus_per_worker, 1)

    @model_validator(mode="after")
    def _hidden_states_are_live(self) -> DistillationConfig:
        if self.hidden_layers and self.targets != "live":
            raise ValueError(
                f"hidden_layers must be empty with cached targets, got {list(self.hidden_layers)}: "
                "hidden states are too large to store; set targets to live, or remove hidden_layers"
            )
        return self


class AlignConfig(Section):
    """Align a pruned model by continual pre-training on Ray Train and DeepSpeed."""

    pruned: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory of the pruned model, as written by prune."
    )
    output: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory to write the aligned model to."
    )
    corpus: Free[CorpusConfig]
    cache_dir: Free[Annotated[Path | None, Renamed("prepared")]] = Field(
        None,
        description="Directory for the packed corpus and the base's targets, which can be shared "
        "by alignments on the same corpus. Default: next to the output.",
    )
    isolate_documents: Identified[bool] = Field(
        False, description="Mask attention between documents packed into one sequence."
    )
    objective: Identified[ObjectiveName] = Field(
        "distillation",
        description="Training objective. "
        + "; ".join(f"'{one.name}' {one.help}" for one in OBJECTIVES.values())
        + ".",
    )
    base: Free[Annotated[str | None, SetByComparison()]] = Field(
        None,
        description="Base model that was pruned: a directory or a Hugging Face Hub id. Required "
        "for distillation.",
    )
    distillation: Free[DistillationConfig] = DistillationConfig()
    steps: Free[int | None] = Field(
        None,
        ge=1,
        description="Number of optimiser steps. Default: derived from tokens if given, otherwise "
        "1600.",
    )
    tokens: Free[int | None] = Field(
        None,
        ge=1,
        description="Number of tokens to train on, instead of steps; rounded up to a full step.",
    )
    max_hours: Identified[float | None] = Field(
        None,
        gt=0,
        description="Time limit in hours. Training stops after the step that reaches it, and the "
        "model is written.",
    )
    batch_size: Identified[int] = Field(
        128, ge=1, description="Sequences per optimiser step, over all workers."
    )
    micro_batch_size: Free[int] = Field(
        4, ge=1, description="Sequences per forward pass of one worker; must divide batch_size."
    )
    optimiser: Identified[OptimiserConfig] = OptimiserConfig(learning_rate=5e-5, warmup_steps=100)
    workers: Free[int] = Field(
        1, ge=1, description="Number of Ray Train workers, each with one GPU if there are GPUs."
    )
    min_workers: Free[int | None] = Field(
        None,
        ge=1,
        description="Minimum number of workers to continue with after nodes are lost. Default: "
        "wait for all workers.",
    )
    cpus_per_worker: Free[int] = Field(1, ge=1, description="Number of CPUs per worker.")
    precision: Identified[Precision] = Field(
        "bf16", description="Data type of weights and activations."
    )
    frozen: Identified[tuple[Literal["lm_head", "embeddings", "norms"], ...]] = Field(
        ("lm_head",),
        description="Names of parameters to freeze, with those tied to them. The paper freezes "
        "lm_head.",
    )
    activation_checkpointing: Free[bool] = Field(
        False,
        description="Store only the input of each layer and recompute the rest in the backward "
        "pass, which saves memory for about a third more computation.",
    )
    zero_stage: Identified[Literal[0, 1, 2, 3]] = Field(1, description="DeepSpeed ZeRO stage.")
    offload_optimiser: Free[Offload] = Field(
        "none", description="Device to offload optimiser states to; 'nvme' requires zero_stage 3."
    )
    offload_parameters: Free[Offload] = Field(
        "none", description="Device to offload partitioned weights to; requires zero_stage 3."
    )
    offload_dir: Free[Annotated[Path | None, Renamed("offload_folder")]] = Field(
        None, description="Directory on a fast disk for offloading to 'nvme'."
    )
    deepspeed: Free[Path | None] = Field(
        None,
        description="Path of a DeepSpeed JSON configuration. Its keys take precedence, except "
        "those that other keys of this section determine; these may only be omitted "
        "or repeated.",
    )
    evaluate_every: Free[int | None] = Field(
        None,
        ge=1,
        description="Steps between evaluations on the sources' held-out documents; the first is "
        "before step 1. Default: no evaluation.",
    )
    evaluate_sequences: Free[int] = Field(
        256, ge=1, description="Maximum number of held-out sequences per source."
    )
    trackers: Free[tuple[Literal["tensorboard", "wandb", "mlflow"], ...]] = Field(
        (),
        description="Experiment trackers to log to, in addition to metrics.jsonl and Ray's "
        "metrics.",
    )
    peak_tflops: Free[float | None] = Field(
        None,
        gt=0,
        description="Peak TFLOPS of one worker's device, to compute MFU. Default: looked up for "
        "common GPUs.",
    )
    log_rows: Free[bool] = Field(
        False, description="Write the row ids of each step's sequences to rows.jsonl."
    )
    checkpoint_every: Free[int] = Field(
        100,
        ge=1,
        description="Steps between checkpoints. A preemption notice also triggers a checkpoint.",
    )
    keep_checkpoints: Free[int] = Field(
        2, ge=1, description="Number of checkpoints to keep during training."
    )
    staging_dir: Free[Annotated[Path | None, Renamed("staging_folder")]] = Field(
        None,
        description="Directory on each worker's local disk from which checkpoints are copied to "
        "the output in the background. Default: the system's temporary directory.",
    )
    max_failures: Free[int] = Field(
        3,
        ge=0,
        description="Number of worker failures to tolerate; preempted nodes are not counted.",
    )
    seed: Identified[int] = Field(0, ge=0, lt=2**32, description="Seed of the data order.")

    @property
    def distils(self) -> bool:
        """Whether the objective learns from the base's predictions."""
        return OBJECTIVES[self.objective].distils

    @property
    def total_steps(self) -> int:
        """Number of optimiser steps, unless the time limit ends training."""
        if self.tokens is not None:
            return -(-self.tokens // (self.batch_size * self.corpus.sequence_length))
        return self.steps or 1600

    def accumulation(self, workers: int) -> int:
        """Return the gradient accumulation steps with this number of workers."""
        return -(-self.batch_size // (self.micro_batch_size * workers))

    @property
    def target_workers(self) -> int:
        """Number of actors that compute targets; by default those that min_workers' GPUs hold."""
        workers = self.min_workers or self.workers
        return self.distillation.workers or self.distillation.copies(workers)

    @property
    def max_workers(self) -> int:
        """Maximum number of concurrent workers, of training or of target computation."""
        return max(self.workers, self.target_workers)

    @model_validator(mode="after")
    def _distillation_has_a_base(self) -> AlignConfig:
        if self.distils and self.base is None:
            others = " or ".join(one.name for one in OBJECTIVES.values() if not one.distils)
            raise ValueError(
                f"base must be given with objective {self.objective}; add the base model, or set "
                f"objective to {others}"
            )
        return self

    @model_validator(mode="after")
    def _layers_see_whole_sequences(self) -> AlignConfig:
        if self.isolate_documents and self.distillation.stream_rows is not None:
            raise ValueError(
                "isolate_documents must be false with distillation.stream_rows, which runs the "
                "base on whole sequences; remove one of the two"
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
                f"steps and tokens must not be given together, got {self.steps} and {self.tokens}; "
                "remove one of them"
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
            if self.offload_dir is None:
                raise ValueError("offload_dir must be given to offload to nvme; name one there")
        if self.offload_optimiser == "nvme" and self.min_workers is not None:
            raise ValueError(
                f"min_workers must not be given with offload_optimiser nvme, got "
                f"{self.min_workers}: such a run must resume with all workers; remove it"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> AlignConfig:
        require_whole_batches(self.batch_size, self.micro_batch_size)
        return self

    @model_validator(mode="after")
    def _fewest_workers(self) -> AlignConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers must be at most workers = {self.workers}, got {self.min_workers}; "
                "change one of the two"
            )
        return self
