"""Settings of a comparison: which systems, over which methods, ratios, tasks and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import KeysOf, Section
from loram_ray.utils.names import fault_of_output, first_clash, folded

Pattern = Annotated[str, Field(pattern=r"^\d+:\d+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
_UNALIGNED = ("base", "full", "sibling", "pruned", "small", "unaligned", "qloram")
_OF_THE_RUN = frozenset({"model", "adapter", "output", "data", "base", "pruned"})
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "causal": {"objective": "causal_lm"},
    "distilled": {"objective": "distillation"},
}
"""Systems that are aligned, and what the align section is for each."""


class ComparedTask(Section):
    """A fine-tuning task: what is learnt from, and what is scored."""

    has_identity = False

    data: str = Field(description="rows as train takes them")
    held_out: str = Field(description="rows that are not learnt from, for evaluate.data")


class CompareConfig(Section):
    """compare: LoRAM's variants against the base, LoRA on it, and the pruned model as it is.

    The sections prune, align, train and evaluate of the run file say how each is made and scored.
    """

    has_identity = False

    base: str = Field(description="base model: a directory of safetensors or a hub id")
    output: Path = Field(description="directory to write, with one for each stage")
    tasks: dict[str, ComparedTask] = Field(min_length=1, description="what is learnt, by names")
    systems: tuple[str, ...] = Field(
        (),
        description="base: untouched; full: LoRA on it; sibling: LoRA on a smaller model; pruned: "
        "as it is; small: trained and used on the pruned model; LoRAM: unaligned, causal (the "
        "paper's alignment), distilled, qloram (in NF4, of the best aligned), and the names of "
        "alignments; default: all that the other sections allow",
    )
    methods: tuple[str, ...] | dict[str, tuple[float | Pattern, ...]] = Field(
        (),
        description="of pruning: a list, each with all ratios, or each with its own, among them "
        "n:m for masks, as in {random: [0.35, 0.65], wanda: [0.5, 4:8]}; default: prune.method",
    )
    ratios: tuple[float, ...] = Field((), description="of pruning; default: prune.ratio")
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="each prunes, aligns and trains everything anew"
    )
    correction: bool = Field(
        False, description="also with the correction of recover, where there is one"
    )
    prune: Annotated[dict[str, Any] | None, KeysOf("prune", _OF_THE_RUN)] = Field(
        None, description="keys of the prune section; default: the file's section"
    )
    align: Annotated[dict[str, Any] | None, KeysOf("align", _OF_THE_RUN)] = Field(
        None, description="keys of the align section; default: the file's section"
    )
    train: Annotated[dict[str, Any] | None, KeysOf("train", _OF_THE_RUN)] = Field(
        None, description="keys of the train section; default: the file's section"
    )
    recover: Annotated[dict[str, Any] | None, KeysOf("recover", _OF_THE_RUN)] = Field(
        None, description="of the recover section only correction_lambda is read"
    )
    evaluate: Annotated[dict[str, Any] | None, KeysOf("evaluate", _OF_THE_RUN)] = Field(
        None, description="keys of the evaluate section; default: the file's section"
    )
    alignments: dict[Name, Annotated[dict[str, Any], KeysOf("align")]] = Field(
        {},
        description="further systems, by name: keys of the align section, over align, as in "
        "{live: {objective: distillation, distillation: {targets: live}}, longer: {steps: 90}}; "
        "causal and distilled can be changed so, too",
    )
    sibling: str | None = Field(None, description="a smaller model: a directory or a hub id")
    metric: str = Field(
        "answer_perplexity", description="score of evaluate by which systems are compared"
    )
    at_a_time: int = Field(1, ge=1, description="stages that run beside each other")
    others: tuple[Path, ...] = Field(
        (),
        description="scores.json of this comparison with other seeds, of other machines perhaps; "
        "means and claims are over all",
    )

    @field_validator("methods", "ratios", "seeds", "systems")
    @classmethod
    def _each_once(cls, values: Any) -> Any:
        for value in values:
            if list(values).count(value) > 1:
                raise ValueError(f"must have each value once, got {value} twice; remove one")
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
            if (fault := fault_of_output(name)) is not None:
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
        if taken := {name for name in alignments if folded(name) in _UNALIGNED}:
            raise ValueError(f"must not be named as other systems are, got {min(taken)}; rename it")
        clash = first_clash([*ALIGNMENTS, *(name for name in alignments if name not in ALIGNMENTS)])
        if clash is not None:
            raise ValueError(f"must not be named as {clash[0]} is, got {clash[1]}; rename it")
        return alignments

    @model_validator(mode="after")
    def _paths_are_its_own(self) -> CompareConfig:
        for name in ("prune", "align", "train", "recover", "evaluate"):
            keys = getattr(self, name) or {}
            for key in _OF_THE_RUN & keys.keys():
                raise ValueError(
                    f"{name} must leave {key} to the comparison, got {keys[key]!r}; remove it"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if isinstance(self.methods, dict) and self.ratios:
            raise ValueError(
                f"ratios must be left out where methods have their own, got {list(self.ratios)}; "
                "remove one of them"
            )
        known = (*_UNALIGNED, *self.aligned)
        if unknown := set(self.systems) - set(known):
            raise ValueError(
                f"systems must be of {', '.join(known)}, got {min(unknown)}; change it, or add it "
                "to alignments"
            )
        if "sibling" in self.systems and self.sibling is None:
            raise ValueError("sibling must name a smaller model for system sibling; add it")
        return self

    @property
    def aligned(self) -> dict[str, dict[str, Any]]:
        """Keys of the align section for each aligned system, those of every comparison first."""
        given = {
            name: {**ALIGNMENTS.get(name, {}), **more} for name, more in self.alignments.items()
        }
        return {**ALIGNMENTS, **given}
