"""Configuration of pruning and its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loram_ray.config.base import Free, Identified, Precision, Section, Threads
from loram_ray.config.corpus import TextSource
from loram_ray.config.marks import SetByComparison
from loram_ray.criteria import CRITERIA, STRUCTURED, Criterion

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(CRITERIA)]


def _names(last: str, **having: bool) -> str:
    """List the criteria with these properties in words, with ``last`` before the last one."""
    *names, end = [
        name
        for name, criterion in CRITERIA.items()
        if all(getattr(criterion, key) == value for key, value in having.items())
    ]
    return f"{', '.join(names)} {last} {end}" if names else end


class CalibrationConfig(Section):
    """Calibration data of a pruning criterion, and the workers that process it."""

    sources: Free[tuple[TextSource, ...]] = Field(
        min_length=1, description="Text sources for calibration."
    )
    samples: Identified[int] = Field(128, ge=1, description="Number of calibration sequences.")
    sequence_length: Identified[int] = Field(
        2048, ge=8, description="Length of a sequence in tokens."
    )
    batch_size: Identified[int] = Field(
        1, ge=1, description="Sequences per forward pass of one worker."
    )
    shares: Identified[int] = Field(
        8,
        ge=1,
        description="Number of parts that the sequences are split into. Workers process whole "
        "parts, and statistics are summed in the parts' order.",
    )
    workers: Free[int] = Field(
        1, ge=1, description="Number of Ray actors, each with one GPU if there are GPUs."
    )
    cpus_per_worker: Free[Threads] = None
    precision: Identified[Precision] = Field(
        "fp32", description="Data type of weights and activations during calibration."
    )
    max_failures: Free[int] = Field(3, ge=0, description="Number of worker failures to tolerate.")


class PruneConfig(Section):
    """Prune a base model; write the pruned model and its pruning plan."""

    base: Free[Annotated[str, SetByComparison()]] = Field(
        description="Base model: a directory with safetensors files or a Hugging Face Hub id."
    )
    output: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory to write the pruned model to."
    )
    method: Identified[Method] = Field(
        "random",
        description="Pruning criterion. random is LoRAM-Rand of the paper, taylor is LoRAM-Stru.",
    )
    pattern: Identified[str] = Field(
        "",
        validate_default=True,
        description="Sparsity pattern: 'structured', 'unstructured', or 'n:m' for n zeros in each "
        f"group of m weights. Default: unstructured for {_names('and', units=False)}, otherwise "
        "structured.",
    )
    ratio: Identified[float] = Field(
        0.65,
        ge=0,
        lt=1,
        description="Share of each pruned layer to remove, from 0 to less than 1.",
    )
    ratios: Identified[tuple[float, ...] | None] = Field(
        None, description="Pruning ratio of each pruned layer, in order, instead of ratio."
    )
    allocation: Identified[Literal["uniform", "global"]] = Field(
        "uniform",
        description="Distribution of the ratio over layers. 'uniform' prunes each layer by ratio; "
        "'global' ranks the units of all layers by standardised scores.",
    )
    round_neurons_to: Identified[int] = Field(
        1,
        ge=1,
        description="Round the number of kept neurons to a multiple of this value (64 or 128 suits "
        "tensor cores).",
    )
    taylor: Identified[Literal["first", "second", "mixed"]] = Field(
        "first", description="Order of the terms in the Taylor criterion."
    )
    damping: Identified[float] = Field(
        0.01,
        gt=0,
        description="Dampening of SparseGPT: this share of the Hessian's mean diagonal is added "
        "to its diagonal.",
    )
    layers: Identified[tuple[int, int] | None] = Field(
        None,
        description="Range [first, end) of the layers to prune. Default: all but the first 4 and "
        "the last 2.",
    )
    calibration: Identified[CalibrationConfig | None] = Field(
        None,
        description=f"Calibration data, required by {_names('and', calibrates=True)}.",
    )
    scores: Free[Path | None] = Field(
        None,
        description="Directory of a pruned model whose scores are reused, instead of calibrating "
        "again.",
    )
    seed: Identified[int] = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of random pruning and of calibration sampling.",
    )
    max_shard_bytes: Identified[int] = Field(
        5 * 10**9, ge=1, description="Maximum size of a weight shard in bytes."
    )

    @property
    def criterion(self) -> Criterion:
        """Description of the configured method."""
        return CRITERIA[self.method]

    @property
    def calibrates(self) -> bool:
        """Whether the criterion needs calibration text."""
        return self.criterion.calibrates and self.scores is None

    @property
    def scored_by(self) -> str:
        """The criterion with its form, as scores are labelled."""
        form = self.criterion.form
        return self.method if form is None else f"{self.method} {getattr(self, form)}"

    @field_validator("pattern")
    @classmethod
    def _pattern_of_method(cls, pattern: str, info: ValidationInfo) -> str:
        criterion = CRITERIA[info.data.get("method", "random")]
        pattern = pattern or criterion.default_pattern
        if pattern != STRUCTURED and not criterion.weights:
            raise ValueError(
                f"must be structured for method {criterion.name}, got {pattern}; "
                f"choose {_names('or', weights=True)} for masks"
            )
        if pattern == STRUCTURED and not criterion.units:
            raise ValueError(
                f"must be unstructured or n:m for method {criterion.name}, got structured; choose "
                f"{_names('or', units=True)} for structured pruning"
            )
        return pattern

    @model_validator(mode="after")
    def _fits_together(self) -> PruneConfig:
        if self.pattern == STRUCTURED:
            for number, ratio in enumerate(self.ratios or ()):
                if not 0 <= ratio < 1:
                    raise ValueError(f"ratios.{number} must be at least 0 and below 1, got {ratio}")
        elif self.allocation != "uniform" or self.round_neurons_to != 1:
            raise ValueError(
                f"allocation and round_neurons_to must not be given with pattern {self.pattern}: "
                "they apply to structured pruning; remove them"
            )
        elif ":" in self.pattern and {"ratio", "ratios"} & self.model_fields_set:
            raise ValueError(
                f"ratio and ratios must not be given with pattern {self.pattern}, which sets the "
                "ratio; remove them"
            )
        if self.calibrates and self.calibration is None:
            raise ValueError(
                f"calibration must be given for method {self.method}; add text, e.g. --set "
                "'prune.calibration.sources=[{path: text.jsonl}]', or set prune.scores"
            )
        return self
