"""The benchmarks of a configuration, read and tokenised before any model is loaded."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from loram_ray.artifacts.manifest import read_model_config
from loram_ray.config import EvaluateConfig
from loram_ray.config.evaluate import (
    BenchmarkConfig,
    ChoiceBenchmark,
    CodeBenchmark,
    GenerationBenchmark,
    GymBenchmark,
    PerplexityBenchmark,
)
from loram_ray.corpus.conversations import Conversation
from loram_ray.errors import LoramError
from loram_ray.evaluation.answers import exact_answers, generated_answers, gym_answers
from loram_ray.evaluation.benchmark import Benchmark
from loram_ray.evaluation.choice import multiple_choice
from loram_ray.evaluation.perplexity import perplexity_of_answers, perplexity_of_text
from loram_ray.evaluation.programs import programs

_NOT_IN_NAMES = re.compile(r"[^\w.+=-]+")


def measurements_of(config: EvaluateConfig, tokenizer: Any) -> list[Benchmark]:
    """Read and tokenise everything that is to be scored.

    Raises:
        LoramError: A data set has no item or too many unusable rows, a required chat template is
            missing, or two benchmarks have the same name.
    """
    found: list[Benchmark] = []
    if config.data is not None:
        answers, rows = perplexity_of_answers(
            "", tokenizer, config, config.data, "evaluate.data", config.limit
        )
        found.append(answers)
        if config.exact_match:
            asked = [row for row in rows if isinstance(row, Conversation)]
            if len(asked) < len(rows):
                raise LoramError(
                    f"evaluate.exact_match needs questions with answers, but {config.data} "
                    "contains plain text; set it to false or use other data"
                )
            found.append(exact_answers("", tokenizer, asked, config.max_new_tokens))
    if config.text is not None:
        found.append(perplexity_of_text("", tokenizer, config.text, "evaluate.text"))
    names: set[str] = set()
    for number, benchmark in enumerate(config.benchmarks):
        key = f"evaluate.benchmarks.{number}"
        name = name_of(benchmark)
        if name in names:
            raise LoramError(f"{key}.name must be unique, got {name} twice; rename one")
        names.add(name)
        found.append(_measurement_of(name, benchmark, key, config, tokenizer))
        _require_fit(found[-1], config.model, key)
    return found


def _require_fit(measurement: Benchmark, model: str, key: str) -> None:
    """Raise an error for items that are longer than the model's maximum length."""
    most = read_model_config(model).get("max_position_embeddings")
    longest = max(map(measurement.span, measurement.items))
    if most is not None and longest > most:
        raise LoramError(
            f"{key} must fit into the model's context of {most:,} tokens, but its longest item "
            f"needs {longest:,}; lower shots or max_new_tokens, or remove that row"
        )


def name_of(benchmark: BenchmarkConfig) -> str:
    """Return the name that prefixes a benchmark's scores."""
    if benchmark.name:
        return benchmark.name
    match benchmark:
        case GymBenchmark():
            return benchmark.dataset
        case PerplexityBenchmark(data=None, text=text) if text is not None:
            given = text.sources[0].path
        case _:
            given = str(benchmark.data)
    return _NOT_IN_NAMES.sub("_", PurePath(given).name.partition(".")[0]) or benchmark.kind


def _measurement_of(
    name: str, benchmark: BenchmarkConfig, key: str, config: EvaluateConfig, tokenizer: Any
) -> Benchmark:
    share = config.max_bad_share
    match benchmark:
        case PerplexityBenchmark(text=text) if text is not None:
            return perplexity_of_text(name, tokenizer, text, f"{key}.text")
        case PerplexityBenchmark(data=data) if data is not None:
            answers, _ = perplexity_of_answers(
                name, tokenizer, config, data, f"{key}.data", benchmark.limit
            )
            return answers
        case ChoiceBenchmark():
            return multiple_choice(name, tokenizer, benchmark, key, share)
        case GenerationBenchmark():
            return generated_answers(name, tokenizer, benchmark, key, share)
        case CodeBenchmark():
            return programs(name, tokenizer, benchmark, key, share)
        case GymBenchmark():
            return gym_answers(name, tokenizer, benchmark, key)
    raise TypeError(f"no measurement is made of {type(benchmark).__name__}")
