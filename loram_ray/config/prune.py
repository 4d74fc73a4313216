"""Settings of pruning and of its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loram_ray.config.base import Precision, Section
from loram_ray.config.corpus import TextSource

MASKING_METHODS = ("wanda", "sparsegpt")


class CalibrationConfig(Section):
    """The text that a criterion looks at, and who looks."""

    sources: tuple[TextSource, ...] = Field(min_length=1, description="where the text is")
    samples: int = Field(128, ge=1, description="sequences")
    sequence_length: int = Field(2048, ge=8, description="tokens in a sequence")
    batch_size: int = Field(1, ge=1, description="sequences in one forward of one worker")
    shares: int = Field(
        8, ge=1, description="parts that workers take; sums are formed part by part, in order"
    )
    workers: int = Field(1, ge=1, description="Ray actors (one GPU each where there are)")
    cpus_per_worker: int | None = Field(
        None, ge=1, description="threads of a worker; default: the machine's, shared out"
    )
    precision: Precision = Field("fp32", description="of the weights and activations in a layer")
    max_failures: int = Field(3, ge=0, description="worker failures survived")


class PruneConfig(Section):
    """prune: a base model becomes a pruned model and its plan."""

    base: str = Field(description="base model: a directory of safetensors or a hub id")
    output: Path = Field(description="directory to write")
    method: Literal["random", "magnitude", "taylor", "flap", "activation", "wanda", "sparsegpt"] = (
        Field("random", description="criterion; random is LoRAM-Rand, taylor LoRAM-Stru")
    )
    pattern: str = Field(
        "",
        validate_default=True,
        description="structured, unstructured, or n:m for n zeros of each m weights; default: "
        "unstructured for wanda and sparsegpt, else structured",
    )
    ratio: float = Field(0.65, ge=0, lt=1, description="share pruned of each pruned layer")
    ratios: tuple[float, ...] | None = Field(
        None, description="share pruned of each pruned layer, one by one, instead of ratio"
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="global: layers share out what ratio prunes, by standardised scores"
    )
    round_neurons_to: int = Field(
        1, ge=1, description="kept neurons are a multiple of it (64 or 128 suits tensor cores)"
    )
    taylor: Literal["first", "second", "mixed"] = Field(
        "first", description="terms of the Taylor criterion"
    )
    damping: float = Field(
        0.01, gt=0, description="SparseGPT: share of the Hessian's mean diagonal added to it"
    )
    layers: tuple[int, int] | None = Field(
        None, description="[first, end) of the pruned layers; default: all but 4 first, 2 last"
    )
    calibration: CalibrationConfig | None = Field(
        None, description="text for taylor, flap, activation, wanda and sparsegpt"
    )
    scores: Path | None = Field(
        None, description="directory pruned earlier: use its scores, no calibration"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the choice, and of calibration text")
    max_shard_bytes: int = Field(5 * 10**9, ge=1, description="upper bound of a weight shard")

    @property
    def calibrates(self) -> bool:
        """Whether the criterion looks at calibration text."""
        return self.method not in ("random", "magnitude") and self.scores is None

    @field_validator("pattern")
    @classmethod
    def _pattern_of_method(cls, pattern: str, info: ValidationInfo) -> str:
        method = info.data.get("method", "random")
        pattern = pattern or ("unstructured" if method in MASKING_METHODS else "structured")
        if pattern != "structured" and method not in (*MASKING_METHODS, "magnitude"):
            raise ValueError(
                f"must be structured for method {method}, got {pattern}; "
                "choose sparsegpt, wanda or magnitude for masks"
            )
        if pattern == "structured" and method in MASKING_METHODS:
            raise ValueError(
                f"must be unstructured or n:m for method {method}, got structured; choose "
                "taylor, flap, activation, magnitude or random for structured pruning"
            )
        return pattern

    @model_validator(mode="after")
    def _fits_together(self) -> PruneConfig:
        if self.pattern == "structured":
            for number, ratio in enumerate(self.ratios or ()):
                if not 0 <= ratio < 1:
                    raise ValueError(f"ratios.{number} must be at least 0 and below 1, got {ratio}")
        elif self.allocation != "uniform" or self.round_neurons_to != 1:
            raise ValueError(
                f"allocation and round_neurons_to are for structured pruning, pattern is "
                f"{self.pattern}; leave them out"
            )
        elif ":" in self.pattern and {"ratio", "ratios"} & self.model_fields_set:
            raise ValueError(
                f"ratio follows from pattern {self.pattern}; leave ratio and ratios out"
            )
        if self.calibrates and self.calibration is None:
            raise ValueError(
                f"calibration must be given for method {self.method}; name text, e.g. "
                "--set 'prune.calibration.sources=[{path: text.jsonl}]', or earlier scores"
            )
        return self
