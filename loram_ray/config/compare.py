"""Configuration of a comparison: systems, pruning methods, ratios, tasks and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from loram_ray.config.align import AlignConfig
from loram_ray.config.base import Section
from loram_ray.config.evaluate import EvaluateConfig
from loram_ray.config.finetune import RecoverConfig
from loram_ray.config.marks import KeysOf, Renamed, SetByComparison, keys_with
from loram_ray.config.prune import PruneConfig
from loram_ray.config.train import TrainConfig
from loram_ray.utils.names import first_clash, folded, output_name_error

Pattern = Annotated[str, Field(pattern=r"^\d+:\d+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
_SYSTEMS = ("base", "full", "sibling", "pruned", "small", "unaligned", "qloram", "loram")
_SECTIONS: dict[str, type[Section]] = {
    "prune": PruneConfig,
    "align": AlignConfig,
    "train": TrainConfig,
    "recover": RecoverConfig,
    "evaluate": EvaluateConfig,
}
_OWN = {name: keys_with(section, SetByComparison()) for name, section in _SECTIONS.items()}
"""Keys of each section that the comparison sets itself."""
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "causal": {"objective": "causal_lm"},
    "distilled": {"objective": "distillation"},
}
"""Aligned systems of every comparison, with the keys of the align section for each."""


class ComparedTask(Section):
    """Fine-tuning task with training and held-out data."""

    has_identity = False

    data: str = Field(description="Training data in the formats of train.data.")
    held_out: str = Field(description="Held-out data in the same formats, used as evaluate.data.")


class CompareConfig(Section):
    """Compare LoRAM's variants with LoRA on the base model and with the pruned model.

    The run file's sections prune, align, train and evaluate define how each is made and scored.
    """

    has_identity = False

    base: str = Field(
        description="Base model: a directory with safetensors files or a Hugging Face Hub id."
    )
    output: Path = Field(description="Directory to write to, with one subdirectory per stage.")
    tasks: dict[str, ComparedTask] = Field(
        min_length=1, description="Tasks to train and evaluate, by name."
    )
    systems: tuple[str, ...] = Field(
        (),
        description="Systems to compare. base: the untouched base; full: LoRA on the base; "
        "sibling: LoRA on a smaller model; pruned: the pruned model without training; "
        "small: an adapter trained and used on the pruned model. LoRAM variants: "
        "unaligned, causal (the paper's alignment), distilled, qloram (NF4 of the "
        "best aligned model), loram (what loram run makes of the same sections; both "
        "commands share its stages), and the names in alignments. Default: all that the "
        "other sections allow, except loram.",
    )
    methods: tuple[str, ...] | dict[str, tuple[float | Pattern, ...]] = Field(
        (),
        description="Pruning methods: a list, each combined with all ratios, or a dictionary from "
        "method to ratios, which may be n:m patterns, e.g. "
        "{random: [0.35, 0.65], wanda: [0.5, 4:8]}. Default: prune.method.",
    )
    ratios: tuple[float, ...] = Field((), description="Pruning ratios. Default: prune.ratio.")
    seeds: tuple[int, ...] = Field(
        (0,),
        min_length=1,
        description="Seeds. Pruning, alignment and training are repeated with each.",
    )
    correction: bool = Field(
        False,
        description="Also evaluate corrected adapters (recover.correction), where the correction "
        "applies.",
    )
    prune: Annotated[dict[str, Any] | None, KeysOf("prune", _OWN["prune"])] = Field(
        None, description="Keys of the prune section. Default: the run file's section."
    )
    align: Annotated[dict[str, Any] | None, KeysOf("align", _OWN["align"])] = Field(
        None, description="Keys of the align section. Default: the run file's section."
    )
    train: Annotated[dict[str, Any] | None, KeysOf("train", _OWN["train"])] = Field(
        None, description="Keys of the train section. Default: the run file's section."
    )
    recover: Annotated[dict[str, Any] | None, KeysOf("recover", _OWN["recover"])] = Field(
        None,
        description="Keys of the recover section, of which all systems but loram use only "
        "correction_lambda. Default: the run file's section.",
    )
    evaluate: Annotated[dict[str, Any] | None, KeysOf("evaluate", _OWN["evaluate"])] = Field(
        None, description="Keys of the evaluate section. Default: the run file's section."
    )
    run: dict[str, dict[str, Any]] = Field(
        {},
        description="Sections of loram run, whose directories the system loram shares. Default: "
        "the run file's sections.",
    )
    alignments: dict[Name, Annotated[dict[str, Any], KeysOf("align")]] = Field(
        {},
        description="Additional aligned systems: a dictionary from name to keys that override the "
        "align section, e.g. "
        "{live: {objective: distillation, distillation: {targets: live}}, longer: {steps: 90}}. "
        "The names causal and distilled override those systems.",
    )
    sibling: str | None = Field(
        None,
        description="Smaller model for system sibling: a directory or a Hugging Face Hub id.",
    )
    metric: str = Field(
        "answer_perplexity", description="Score of evaluate by which systems are compared."
    )
    max_concurrent: Annotated[int, Renamed("at_a_time")] = Field(
        1, ge=1, description="Maximum number of stages to run concurrently."
    )
    merge_scores: Annotated[tuple[Path, ...], Renamed("others")] = Field(
        (),
        description="Paths of scores.json files of the same comparison with other seeds, e.g. "
        "from other machines, to include in means and claims.",
    )

    @field_validator("methods", "ratios", "seeds", "systems")
    @classmethod
    def _each_once(cls, values: Any) -> Any:
        for value in values:
            if list(values).count(value) > 1:
                raise ValueError(f"must have distinct values, got {value} twice; remove one")
        return values

    @field_validator("methods")
    @classmethod
    def _with_ratios(cls, methods: tuple[str, ...] | dict[str, Any]) -> Any:
        for method, ratios in methods.items() if isinstance(methods, dict) else ():
            if not ratios:
                raise ValueError(f"must have ratios for {method}, got none; add one")
            cls._each_once(ratios)
        return methods

    @field_validator("tasks", "alignments")
    @classmethod
    def _name_folders(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if (fault := output_name_error(name)) is not None:
                raise ValueError(f"must have names that are {fault}, got {name!r:.80}; rename it")
        if (clash := first_clash(named)) is not None:
            raise ValueError(
                f"must have names that differ by more than case, got {clash[0]} and {clash[1]}; "
                "rename one"
            )
        return named

    @field_validator("alignments")
    @classmethod
    def _of_their_own(cls, alignments: dict[str, Any]) -> dict[str, Any]:
        if taken := {name for name in alignments if folded(name) in _SYSTEMS}:
            raise ValueError(
                f"must not use the name of another system, got {min(taken)}; rename it"
            )
        clash = first_clash([*ALIGNMENTS, *(name for name in alignments if name not in ALIGNMENTS)])
        if clash is not None:
            raise ValueError(f"must not use the name of {clash[0]}, got {clash[1]}; rename it")
        return alignments

    @model_validator(mode="after")
    def _paths_are_its_own(self) -> CompareConfig:
        for name, own in _OWN.items():
            keys = getattr(self, name) or {}
            for key in sorted(own & keys.keys()):
                raise ValueError(
                    f"{name} must not set {key}, which the comparison sets, got {keys[key]!r}; "
                    "remove it"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if isinstance(self.methods, dict) and self.ratios:
            raise ValueError(
                f"ratios must not be given if methods have their own, got {list(self.ratios)}; "
                "remove one of them"
            )
        known = (*_SYSTEMS, *self.aligned)
        if unknown := set(self.systems) - set(known):
            raise ValueError(
                f"systems must be among {', '.join(known)}, got {min(unknown)}; change it, or add "
                "it to alignments"
            )
        if "sibling" in self.systems and self.sibling is None:
            raise ValueError("sibling must be given for system sibling; add a smaller model")
        return self

    @property
    def aligned(self) -> dict[str, dict[str, Any]]:
        """Keys of the align section for each aligned system, those of every comparison first."""
        given = {
            name: {**ALIGNMENTS.get(name, {}), **more} for name, more in self.alignments.items()
        }
        return {**ALIGNMENTS, **given}
