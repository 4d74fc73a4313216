"""One pydantic model per stage, and the run file that holds them all.

A run file is YAML with one section per stage. Paths that follow from others (the pruned model is
the input of alignment) are filled in, so that ``loram prune --config f.yaml`` and ``loram align
--config f.yaml`` fit together as ``loram run`` does. Every error names the file and the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loram_ray.errors import LoramError, nearest

Precision = Literal["bf16", "fp32"]
MASKING_METHODS = ("wanda", "sparsegpt")


class Section(BaseModel):
    """A configuration section: unknown keys are refused, values are fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RayConfig(Section):
    """Where Ray runs."""

    address: str = Field(
        "local", description="'local' starts an embedded Ray, 'auto' joins this machine's cluster"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of an embedded Ray; default: enough for the stage"
    )


class SourceConfig(Section):
    """One source of a corpus."""

    path: str = Field(description="a file, a directory or a glob of .jsonl, .txt or .parquet")
    text_field: str = Field("text", description="field that holds a document (.jsonl, .parquet)")


class CalibrationConfig(Section):
    """The text that a criterion looks at, and who looks."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the text is")
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


class CorpusConfig(Section):
    """The text that alignment learns from."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the text is")
    sequence_length: int = Field(512, ge=8, description="tokens in a packed sequence")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable rows that is skipped; more is refused"
    )

    def resolved(self) -> CorpusConfig:
        """Return the corpus with absolute paths, for a worker in another directory."""
        sources = tuple(
            source.model_copy(update={"path": str(Path(source.path).resolve())})
            for source in self.sources
        )
        return self.model_copy(update={"sources": sources})


class OptimiserConfig(Section):
    """AdamW with warm-up."""

    learning_rate: float = Field(5e-5, gt=0, allow_inf_nan=False, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")


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


class LoraConfig(Section):
    """The adapter's shape, in PEFT's terms."""

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="scale numerator: alpha / r, or alpha / sqrt(r)")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    targets: tuple[str, ...] | None = Field(
        None, description="short module names; default: every pruned linear of the family"
    )
    lm_head: bool = Field(False, description="adapt lm_head too, as the paper does")
    rank_pattern: dict[str, int] = Field({}, description="rank by module-name pattern")
    alpha_pattern: dict[str, float] = Field({}, description="alpha by module-name pattern")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r)")


class TrainConfig(Section):
    """train: LoRA on a frozen pruned, aligned or base model, in one Ray actor."""

    model: Path = Field(description="directory: pruned, aligned or base")
    output: Path = Field(description="directory to write")
    data: str = Field(description="JSON lines with 'messages' or 'prompt' and 'completion'")
    lora: LoraConfig = LoraConfig()
    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="examples in a step")
    micro_batch_size: int = Field(4, ge=1, description="examples in one forward")
    max_length: int = Field(512, ge=8, description="longer examples are cut on the right")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unusable rows that is skipped; more is refused"
    )
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=1e-4, warmup_steps=10)
    precision: Precision = Field("bf16", description="of frozen weights and activations")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="actor failures survived")
    cpus: int | None = Field(None, ge=1, description="threads; default: those of the machine")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initialisation, order, dropout")

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, "
                f"got {self.batch_size}; change one of the two"
            )
        return self


class RecoverConfig(Section):
    """recover: a pruned adapter becomes an adapter of the base."""

    adapter: Path = Field(description="directory written by train on a pruned model")
    base: str = Field(description="base model that was pruned: a directory or a hub id")
    output: Path = Field(description="directory to write")
    form: Literal["adapter", "delta"] = Field(
        "adapter",
        description="after non-structured pruning: adapter is a truncated SVD, delta is exact and "
        "for merge",
    )
    svd_rank: int | None = Field(
        None,
        ge=1,
        description="rank of the truncated SVD, at most a linear's shorter side; default: the "
        "pruned adapter's own",
    )
    max_svd_error: float = Field(
        0.1, ge=0, description="relative error of the truncated SVD beyond which there is a warning"
    )

    @model_validator(mode="after")
    def _rank_of_an_svd(self) -> RecoverConfig:
        if self.form == "delta" and self.svd_rank is not None:
            raise ValueError(
                f"svd_rank is for form adapter, got {self.svd_rank} with form delta, which is "
                "exact; leave one of them out"
            )
        return self


class MergeConfig(Section):
    """merge: base and recovered adapter become one model."""

    base: str = Field(description="full-precision base model: a directory or a hub id")
    adapter: Path = Field(description="directory of a PEFT LoRA or a delta for the base")
    output: Path = Field(description="directory to write")
    max_shard_bytes: int = Field(5 * 10**9, ge=1, description="upper bound of a weight shard")


class EvaluateConfig(Section):
    """evaluate: perplexity, and exact match of generated answers."""

    model: str = Field(description="base, pruned, aligned or merged model: a directory or hub id")
    output: Path = Field(description="directory to write")
    adapter: Path | None = Field(None, description="adapter to put on the model")
    data: str | None = Field(
        None, description="JSON lines as train takes: perplexity of the answers"
    )
    text: CorpusConfig | None = Field(None, description="plain text: perplexity of all of it")
    limit: int | None = Field(None, ge=1, description="use the first rows only")
    max_length: int = Field(512, ge=8, description="longer examples are cut on the right")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="as in train")
    batch_size: int = Field(16, ge=1, description="examples in one forward")
    exact_match: bool = Field(False, description="generate and compare with the answer")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer")
    precision: Precision = Field("bf16", description="of weights and activations")
    max_failures: int = Field(3, ge=0, description="actor failures survived")
    cpus: int | None = Field(None, ge=1, description="threads; default: those of the machine")

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluateConfig:
        if self.data is None and self.text is None:
            raise ValueError("data or text must be given; name what to evaluate on")
        if self.exact_match and self.data is None:
            raise ValueError("exact_match needs data; give questions with their answers")
        return self


STAGES: dict[str, type[Section]] = {
    "prune": PruneConfig,
    "align": AlignConfig,
    "train": TrainConfig,
    "recover": RecoverConfig,
    "merge": MergeConfig,
    "evaluate": EvaluateConfig,
}


class RunConfig(Section):
    """run: the sections of all stages, and what they share."""

    base: str = Field(description="base model: a directory of safetensors or a hub id")
    output: Path = Field(description="directory of the whole run")
    ray: RayConfig = RayConfig()
    prune: PruneConfig | None = None
    align: AlignConfig | None = None
    train: TrainConfig | None = None
    recover: RecoverConfig | None = None
    merge: MergeConfig | None = None
    evaluate: EvaluateConfig | None = None
    compare: bool = Field(
        False,
        description="also train without alignment and on the full base, and evaluate each",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_paths(cls, data: Any) -> Any:
        return fill_paths(data) if isinstance(data, dict) else data


def fill_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """Give each section the paths that follow from the run's base, output and other sections."""
    filled = dict(data)
    if not isinstance(filled.get("base"), str) or not isinstance(filled.get("output"), str | Path):
        return filled
    base, root = filled["base"], Path(filled["output"])

    def output(stage: str, folder: str) -> Path:
        section = filled.get(stage)
        if isinstance(section, Section):
            section = dict(section)
        given = section.get("output") if isinstance(section, Mapping) else None
        return Path(given) if isinstance(given, str | Path) else root / folder

    pruned, aligned = output("prune", "pruned"), output("align", "aligned")
    pruned_adapter, adapter = output("train", "adapter_pruned"), output("recover", "adapter")
    merged = output("merge", "merged")
    loram: dict[str, Any] = {"model": base, "adapter": adapter}
    if filled.get("merge") is not None and recovers_delta(filled.get("recover")):
        loram = {"model": str(merged)}  # a delta is no adapter
    derived: dict[str, dict[str, Any]] = {
        "prune": {"base": base, "output": pruned},
        "align": {"pruned": pruned, "output": aligned},
        "train": {
            "model": pruned if filled.get("align") is None else aligned,
            "output": pruned_adapter,
        },
        "recover": {"adapter": pruned_adapter, "base": base, "output": adapter},
        "merge": {"base": base, "adapter": adapter, "output": merged},
        "evaluate": {**loram, "output": root / "evaluation" / "loram"},
    }
    for name, paths in derived.items():
        section = filled.get(name)
        if isinstance(section, Mapping):
            filled[name] = {**paths, **section}
    return filled


def recovers_delta(recover: Any) -> bool:
    """Whether a ``recover`` section, validated or not, writes a delta."""
    section = dict(recover) if isinstance(recover, Section | Mapping) else {}
    return section.get("form") == "delta"


def load_run(config: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply overrides.

    Args:
        config: a YAML file, or None to start from nothing.
        overrides: ``dotted.key=value`` with a YAML value.

    Raises:
        LoramError: the file or an override cannot be read, or a value breaks a rule.
    """
    data = _read_yaml(Path(config)) if config is not None else {}
    for override in overrides:
        _apply(data, override)
    for stage in STAGES:
        if stage in data and data[stage] is None:  # "recover:" alone asks for its defaults
            data[stage] = {}
    return validate(RunConfig, data, source=str(config) if config is not None else "--set")


def section_of(run: RunConfig, stage: str) -> Any:
    """Return one stage's section.

    Raises:
        LoramError: the run file has none.
    """
    section = getattr(run, stage)
    if section is None:
        raise LoramError(f"{stage} must be a section of the config; add '{stage}:' to it")
    return section


def validate(model: type[Section], data: Mapping[str, Any], source: str) -> Any:
    """Validate a dictionary, turning each broken rule into one clear line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(model, entry) for entry in _causes(error.errors())]
        raise LoramError("\n".join(f"{source}: {line}" for line in lines)) from error


def _causes(errors: Sequence[Any]) -> list[Any]:
    """Leave out errors that only follow from others.

    Sections lack paths where ``base`` or ``output`` is wrong, and a list is said to be too short
    where one of its items is wrong.
    """
    shared = [error for error in errors if error["loc"] in (("base",), ("output",))]
    if shared:
        return shared
    locations = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if not any(
            len(other) > len(error["loc"]) and other[: len(error["loc"])] == error["loc"]
            for other in locations
        )
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise LoramError(f"--config {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoramError(f"--config {path} cannot be read ({error}); check the file") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise LoramError(f"--config {path} is not valid YAML: {reason}; mend the line") from error
    if not isinstance(data, dict):
        raise LoramError(f"--config {path} must hold keys and values; see jobs/configs/demo.yaml")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LoramError(f"--set must be key=value, got '{override}'; e.g. --set train.lora.r=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LoramError(f"--set {key} has a value that is not YAML: {text}; quote it") from error
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        place = _place_in(node, parent, key)
        if isinstance(node, dict) and not isinstance(node.get(parent), dict | list):
            node[parent] = {}
        node = node[place]
    node[_place_in(node, last, key)] = value


def _place_in(node: Any, part: str, key: str) -> str | int:
    """One part of a dotted key as it indexes a dictionary, or a list by number."""
    if not isinstance(node, list):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise LoramError(
            f"--set {key} must count the items of a list from 0 to {len(node) - 1}, got '{part}'; "
            "change the number or set the whole list"
        )
    return int(part)


def _describe(model: type[BaseModel], error: Any) -> str:
    location = error["loc"]
    key = ".".join(str(part) for part in location) or "the config"
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            known = _fields_at(model, location[:-1])
            return f"{key} is not a known key{nearest(str(location[-1]), known)}"
        case "missing":
            return f"{key} must be given; add it to the config or pass --set {key}=…"
        case "value_error":
            text = str(error["ctx"]["error"])  # of a section it begins with the key, of a key not
            return (f"{key} " if text.startswith("must ") else f"{key}." if location else "") + text
        case "path_type":
            return f"{key} must be a path, got {value!r}; change the value"
    rule = re.sub(r"^\w+ should", "must", error["msg"])  # "Input should be", "Tuple should have"
    return f"{key} {rule}, got {value!r}; change the value"


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at a location, for suggestions."""
    current: type[BaseModel] = model
    for part in location:
        if not isinstance(part, str) or part not in current.model_fields:
            continue
        inner = section_type(current.model_fields[part].annotation)
        if inner is not None:
            current = inner
    return list(current.model_fields)


def section_type(annotation: Any) -> type[Section] | None:
    """Return the section class in an annotation such as ``AlignConfig | None``, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = section_type(argument)
        if found is not None:
            return found
    return None
