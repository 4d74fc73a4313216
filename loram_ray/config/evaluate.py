"""Configuration of evaluation: perplexity and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import (
    BadShare,
    Free,
    GeneratedText,
    Identified,
    Precision,
    Section,
    Threads,
)
from loram_ray.config.corpus import TextConfig
from loram_ray.config.marks import Renamed, SetByComparison

_HUMAN_EVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


class _Benchmark(Section):
    """Keys of all benchmarks."""

    name: Identified[str] = Field(
        "",
        pattern=r"^[\w.+=-]*$",
        description="Name of the benchmark in the scores. Default: the name of the data file.",
    )
    limit: Identified[int | None] = Field(
        None, ge=1, description="Maximum number of items to use, from the first. Default: all."
    )


class _Prompted(_Benchmark):
    """Keys of benchmarks that prompt the model with rows of a file."""

    data: Free[str] = Field(
        description="Rows with named columns: a file, a directory or a glob pattern."
    )
    prompt: Identified[str] = Field(
        "Question: {question}\nAnswer:",
        description="Template of the prompt; {NAME} is replaced by the row's column NAME.",
    )
    chat: Identified[bool] = Field(
        False, description="Format the prompt as a user message with the chat template."
    )
    shots: Identified[int] = Field(
        0,
        ge=0,
        description="Number of few-shot examples before each question, taken from shots_from.",
    )
    shots_from: Free[str | None] = Field(
        None, description="Rows for few-shot examples, with the same columns as data."
    )
    shots_seed: Identified[int | None] = Field(
        None,
        ge=0,
        description="Seed for drawing few-shot examples. Default: the first rows are used.",
    )

    @model_validator(mode="after")
    def _shots_come_from_somewhere(self) -> _Prompted:
        if bool(self.shots) != (self.shots_from is not None):
            raise ValueError(
                f"shots and shots_from must be given together, got {self.shots} and "
                f"{self.shots_from}; give both or neither"
            )
        return self


class PerplexityBenchmark(_Benchmark):
    """Perplexity of answers or of plain text, e.g. of another domain."""

    kind: Identified[Literal["perplexity"]]
    data: Free[str | None] = Field(
        None, description="Rows in the formats of train.data, to measure the answers' perplexity."
    )
    text: Free[TextConfig | None] = Field(
        None, description="Plain text, to measure the perplexity of all tokens."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> PerplexityBenchmark:
        if (self.data is None) == (self.text is None):
            raise ValueError("data or text must be given, but not both; keep one of them")
        return self


class ChoiceBenchmark(_Prompted):
    """Multiple choice by log-likelihood: ARC, HellaSwag, PIQA, OpenBookQA, MathQA, MMLU."""

    kind: Identified[Literal["choice"]]
    choices: Identified[str] = Field(
        "choices",
        description="Column with the choices: a list of texts, or {text: [...], label: [...]}.",
    )
    answer: Identified[str] = Field(
        "answer",
        description="Column with the correct choice: its text, its label, or its index from 0.",
    )
    delimiter: Identified[str] = Field(" ", description="Text between the prompt and a choice.")


class GenerationBenchmark(_Prompted):
    """Generated answers, scored by exact match and by their last number (GSM8K)."""

    kind: Identified[Literal["generation"]]
    answer: Identified[str] = Field("answer", description="Column with the reference answer.")
    delimiter: Identified[str] = Field(
        " ", description="Text between the prompt and the answer of a few-shot example."
    )
    max_new_tokens: Identified[int] = Field(
        256, ge=1, description="Maximum length of a generated answer in tokens."
    )
    stop: Identified[Annotated[tuple[str, ...], GeneratedText()]] = Field(
        ("Question:", "\n\n\n"), description="Strings that end an answer; not used with chat."
    )


class CodeBenchmark(_Benchmark):
    """Generated programs, scored by their tests in a sandbox (HumanEval, pass@k)."""

    kind: Identified[Literal["code"]]
    data: Free[str] = Field(
        description="Problems in HumanEval's format, with columns prompt, test and entry_point."
    )
    samples: Identified[int] = Field(
        1, ge=1, description="Number of programs per problem. A single one is decoded greedily."
    )
    pass_at: Identified[tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        (1,), min_length=1, description="Values of k for pass@k, each at most samples."
    )
    temperature: Identified[float] = Field(
        0.8, gt=0, description="Sampling temperature, if there is more than one sample."
    )
    top_p: Identified[float] = Field(
        0.95, gt=0, le=1, description="Cumulative probability of nucleus sampling."
    )
    max_new_tokens: Identified[int] = Field(
        512, ge=1, description="Maximum length of a generated program in tokens."
    )
    stop: Identified[Annotated[tuple[str, ...], GeneratedText()]] = Field(
        _HUMAN_EVAL_STOPS, description="Strings that end a program."
    )
    seconds: Identified[float] = Field(
        10.0, gt=0, description="Time limit of a program in seconds."
    )
    memory_mb: Identified[int] = Field(1024, ge=64, description="Memory limit of a program in MB.")

    @model_validator(mode="after")
    def _enough_samples(self) -> CodeBenchmark:
        if max(self.pass_at) > self.samples:
            raise ValueError(
                f"pass_at must be at most samples = {self.samples}, got {max(self.pass_at)}; raise "
                "samples"
            )
        return self


class GymBenchmark(_Benchmark):
    """A generated reasoning-gym data set, scored by its own scorer."""

    kind: Identified[Literal["reasoning_gym"]]
    dataset: Identified[str] = Field(
        description="Name of the reasoning-gym data set, e.g. chain_sum."
    )
    size: Identified[int] = Field(100, ge=1, description="Number of questions to generate.")
    seed: Identified[int] = Field(0, ge=0, description="Seed of the generated questions.")
    options: Identified[dict[str, Any]] = Field(
        {}, description="Options of the data set, e.g. min_terms."
    )
    chat: Identified[bool] = Field(
        True, description="Send the question as a user message in the chat template."
    )
    max_new_tokens: Identified[int] = Field(
        256, ge=1, description="Maximum length of a generated answer in tokens."
    )


BenchmarkConfig = Annotated[
    PerplexityBenchmark | ChoiceBenchmark | GenerationBenchmark | CodeBenchmark | GymBenchmark,
    Field(discriminator="kind"),
]


class HarnessConfig(Section):
    """Tasks of lm-eval (lm-evaluation-harness), run with this package's forward passes."""

    shorthand: ClassVar[str] = "tasks"

    tasks: Identified[tuple[str, ...]] = Field(
        min_length=1, description="Names of lm-eval tasks, e.g. gsm8k_cot."
    )
    shots: Identified[int | None] = Field(
        None, ge=0, description="Number of few-shot examples. Default: each task's own."
    )
    limit: Identified[int | None] = Field(
        None, ge=1, description="Maximum number of items per task, from the first. Default: all."
    )
    include_path: Free[Path | None] = Field(
        None, description="Directory with the YAML files of your own tasks."
    )


class EvaluateConfig(Section):
    """Evaluate the perplexity and benchmark scores of a model, with or without an adapter."""

    model: Free[Annotated[str, SetByComparison()]] = Field(
        description="Base, pruned, aligned, quantised or merged model: a directory or a Hugging "
        "Face Hub id."
    )
    output: Free[Annotated[Path, SetByComparison()]] = Field(
        description="Directory to write the scores to."
    )
    adapter: Free[Annotated[Path | None, SetByComparison()]] = Field(
        None, description="Directory of an adapter to load onto the model."
    )
    data: Free[Annotated[str | None, SetByComparison()]] = Field(
        None, description="Rows in the formats of train.data, to measure the answers' perplexity."
    )
    chat_template: Free[Path | None] = Field(
        None,
        description="Jinja file with a chat template. Default: the adapter's, or else the model's.",
    )
    text: Free[TextConfig | None] = Field(
        None, description="Plain text, to measure the perplexity of all tokens."
    )
    exact_match: Identified[bool] = Field(
        False,
        description="Also generate answers to the questions in data and score their exact match.",
    )
    benchmarks: Identified[tuple[BenchmarkConfig, ...]] = Field(
        (),
        description="Benchmarks, each of kind perplexity, choice, generation, code or "
        "reasoning_gym.",
    )
    lm_eval: Identified[HarnessConfig | None] = Field(
        None, description="Tasks of lm-eval; requires the package lm-eval."
    )
    limit: Identified[int | None] = Field(
        None,
        ge=1,
        description="Maximum number of rows of data to use, from the first. Default: all.",
    )
    max_length: Identified[int] = Field(
        512,
        ge=8,
        description="Maximum length of an example of data in tokens; longer ones are truncated on "
        "the right.",
    )
    max_bad_share: Identified[BadShare] = 0.01
    batch_size: Identified[int] = Field(16, ge=1, description="Examples per forward pass.")
    max_new_tokens: Identified[int] = Field(
        64, ge=1, description="Maximum length of an answer generated for data, in tokens."
    )
    seed: Identified[int] = Field(0, ge=0, lt=2**32, description="Seed of sampling.")
    precision: Identified[Precision] = Field(
        "bf16", description="Data type of weights and activations."
    )
    workers: Free[Annotated[int, Renamed("actors")]] = Field(
        1,
        ge=1,
        description="Number of Ray actors, each with a copy of the model. It does not affect the "
        "scores.",
    )
    max_failures: Free[int] = Field(
        3, ge=0, description="Number of worker failures to tolerate per batch of examples."
    )
    cpus_per_worker: Free[Annotated[Threads, Renamed("cpus")]] = None
    gpus_per_worker: Free[Annotated[float, Renamed("gpus")]] = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a GPU per worker, if there is one; the rest stays available to "
        "others.",
    )

    @field_validator("benchmarks")
    @classmethod
    def _named_apart(cls, benchmarks: tuple[Any, ...]) -> tuple[Any, ...]:
        named = [benchmark.name for benchmark in benchmarks if benchmark.name]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"must have unique names, got {name} twice; rename one")
        return benchmarks

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluateConfig:
        if self.data is None and self.text is None and not self.benchmarks and not self.lm_eval:
            raise ValueError("data, text, benchmarks or lm_eval must be given; add one of them")
        if self.exact_match and self.data is None:
            raise ValueError("exact_match needs data; add questions with answers")
        return self
