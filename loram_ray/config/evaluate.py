"""Settings of evaluation: perplexities, and benchmarks of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from loram_ray.config.base import GeneratedText, Precision, Section
from loram_ray.config.corpus import TextConfig

_HUMAN_EVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


class _Benchmark(Section):
    """What all benchmarks have."""

    name: str = Field(
        "", pattern=r"^[\w.+=-]*$", description="of its scores; default: the data's file name"
    )
    limit: int | None = Field(None, ge=1, description="use the first items only")


class _Prompted(_Benchmark):
    """What benchmarks have that ask about rows of a file."""

    data: str = Field(description="rows with named columns: a file, a directory or a glob")
    prompt: str = Field(
        "Question: {question}\nAnswer:", description="of a row; {NAME} is its column NAME"
    )
    chat: bool = Field(False, description="ask in the chat template, as a user does")
    shots: int = Field(0, ge=0, description="solved rows of shots_from in front of each question")
    shots_from: str | None = Field(None, description="rows that are not asked about")
    shots_seed: int | None = Field(
        None, ge=0, description="choose them at random; default: the first"
    )

    @model_validator(mode="after")
    def _shots_come_from_somewhere(self) -> _Prompted:
        if bool(self.shots) != (self.shots_from is not None):
            raise ValueError(
                f"shots and shots_from go together, got {self.shots} and {self.shots_from}; "
                "give both or neither"
            )
        return self


class PerplexityBenchmark(_Benchmark):
    """Perplexity of answers or of plain text, as of another domain."""

    kind: Literal["perplexity"]
    data: str | None = Field(None, description="rows as train takes: perplexity of the answers")
    text: TextConfig | None = Field(None, description="plain text: perplexity of all of it")

    @model_validator(mode="after")
    def _one_of_both(self) -> PerplexityBenchmark:
        if (self.data is None) == (self.text is None):
            raise ValueError("either data or text must be given; name one")
        return self


class ChoiceBenchmark(_Prompted):
    """Multiple choice by log-likelihood: ARC, HellaSwag, PIQA, OpenBookQA, MathQA, MMLU."""

    kind: Literal["choice"]
    choices: str = Field(
        "choices", description="column of the choices: texts, or {text: [...], label: [...]}"
    )
    answer: str = Field(
        "answer", description="column of the right one: its text, its label, or its number from 0"
    )
    delimiter: str = Field(" ", description="between the prompt and a choice")


class GenerationBenchmark(_Prompted):
    """Generated answers against references: exactly, and by their last number (GSM8K)."""

    kind: Literal["generation"]
    answer: str = Field("answer", description="column of the reference")
    delimiter: str = Field(" ", description="between the prompt and a shot's answer")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer")
    stop: Annotated[tuple[str, ...], GeneratedText()] = Field(
        ("Question:", "\n\n\n"), description="texts that end an answer, where there is no chat"
    )


class CodeBenchmark(_Benchmark):
    """Programs that pass their tests, as HumanEval has them; each runs in a sandbox."""

    kind: Literal["code"]
    data: str = Field(description="rows in HumanEval's form: prompt, test, entry_point")
    samples: int = Field(1, ge=1, description="programs for a problem; 1 is the likeliest one")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="k of pass@k, each at most samples"
    )
    temperature: float = Field(0.8, gt=0, description="of sampling, with more than one sample")
    top_p: float = Field(0.95, gt=0, le=1, description="share of probability that is sampled from")
    max_new_tokens: int = Field(512, ge=1, description="longest generated program")
    stop: Annotated[tuple[str, ...], GeneratedText()] = Field(
        _HUMAN_EVAL_STOPS, description="texts that end a program"
    )
    seconds: float = Field(10.0, gt=0, description="time a program has")
    memory_mb: int = Field(1024, ge=64, description="memory a program has")

    @model_validator(mode="after")
    def _enough_samples(self) -> CodeBenchmark:
        if max(self.pass_at) > self.samples:
            raise ValueError(
                f"pass_at must be at most samples = {self.samples}, got {max(self.pass_at)}; "
                "draw more samples"
            )
        return self


class GymBenchmark(_Benchmark):
    """A task of reasoning-gym, made anew and scored by its own scorer."""

    kind: Literal["reasoning_gym"]
    dataset: str = Field(description="one of reasoning-gym's, such as chain_sum")
    size: int = Field(100, ge=1, description="questions")
    seed: int = Field(0, ge=0, description="of the questions")
    options: dict[str, Any] = Field({}, description="of the data set, such as min_terms")
    chat: bool = Field(True, description="ask in the chat template, as a user does")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer")


Benchmark = Annotated[
    PerplexityBenchmark | ChoiceBenchmark | GenerationBenchmark | CodeBenchmark | GymBenchmark,
    Field(discriminator="kind"),
]


class HarnessConfig(Section):
    """Tasks of lm-eval, the evaluation harness, with this project's forward passes."""

    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval's names, as gsm8k_cot")
    shots: int | None = Field(None, ge=0, description="default: what each task has")
    limit: int | None = Field(None, ge=1, description="use the first items of a task only")
    include_path: Path | None = Field(None, description="directory of your own tasks' YAML files")


class EvaluateConfig(Section):
    """evaluate: perplexities and benchmark scores of a model, with or without an adapter."""

    model: str = Field(
        description="base, pruned, aligned, quantised or merged model: a directory or a hub id"
    )
    output: Path = Field(description="directory to write")
    adapter: Path | None = Field(None, description="adapter to put on the model")
    data: str | None = Field(None, description="rows as train takes: perplexity of the answers")
    chat_template: Path | None = Field(
        None, description="Jinja file; default: what the adapter was trained with, or the model's"
    )
    text: TextConfig | None = Field(None, description="plain text: perplexity of all of it")
    exact_match: bool = Field(False, description="generate data's answers and compare")
    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="of kind perplexity, choice, generation, code or reasoning_gym"
    )
    lm_eval: HarnessConfig | None = Field(None, description="tasks of lm-eval, where it is there")
    limit: int | None = Field(None, ge=1, description="use the first rows of data only")
    max_length: int = Field(512, ge=8, description="longer examples of data are cut on the right")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="as in train")
    batch_size: int = Field(16, ge=1, description="examples in one forward")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer to data")
    seed: int = Field(0, ge=0, lt=2**32, description="of what is sampled")
    precision: Precision = Field("bf16", description="of weights and activations")
    actors: int = Field(
        1, ge=1, description="processes that each load the model; scores do not depend on it"
    )
    max_failures: int = Field(3, ge=0, description="deaths of an actor that a batch survives")
    cpus: int | None = Field(
        None, ge=1, description="threads of an actor; default: the machine's, shared out"
    )
    gpus: float = Field(
        1.0, gt=0, le=1, description="share of a GPU, where there is one; others may use the rest"
    )

    @field_validator("benchmarks")
    @classmethod
    def _named_apart(cls, benchmarks: tuple[Any, ...]) -> tuple[Any, ...]:
        named = [benchmark.name for benchmark in benchmarks if benchmark.name]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"each must have a name of its own, got {name} twice; rename one")
        return benchmarks

    @model_validator(mode="after")
    def _something_to_measure(self) -> EvaluateConfig:
        if self.data is None and self.text is None and not self.benchmarks and not self.lm_eval:
            raise ValueError(
                "data, text, benchmarks or lm_eval must be given; name what to evaluate on"
            )
        if self.exact_match and self.data is None:
            raise ValueError("exact_match needs data; give questions with their answers")
        return self
