"""Scoring a model on the batches of all benchmarks, in one process or in actors."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loram_ray.artifacts.adapter import own_template
from loram_ray.config import EvaluateConfig
from loram_ray.errors import LoramError
from loram_ray.evaluation.benchmark import Benchmark, Found, Scores
from loram_ray.evaluation.benchmarks import measurements_of
from loram_ray.evaluation.engine import Engine
from loram_ray.models.tokenizer import load_tokenizer
from loram_ray.runtime.locks import alone
from loram_ray.runtime.progress import METRICS_FILE, MetricsLog


@dataclass(frozen=True)
class Batch:
    """Items of a benchmark that are scored together.

    Attributes:
        number: Number of the batch.
        measurement: Index of the benchmark.
        items: Indices of the benchmark's items.
    """

    number: int
    measurement: int
    items: list[int]


class Plan:
    """All items to score and their batches, independent of the number of actors.

    Args:
        config: Configuration of the evaluation.

    Attributes:
        measurements: Benchmarks with their items.
        batches: Batches by number.

    Raises:
        LoramError: As for `measurements_of`.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        tokenizer = tokenizer_of(config)
        self.measurements = measurements_of(config, tokenizer)
        parts = [
            (measurement, items)
            for measurement, of_it in enumerate(self.measurements)
            for items in of_it.batches(config.batch_size)
        ]
        self.batches = [Batch(number, *part) for number, part in enumerate(parts)]

    @property
    def items(self) -> int:
        """Number of items of all benchmarks."""
        return sum(len(batch.items) for batch in self.batches)

    def asked(self, batch: Batch) -> tuple[int, Benchmark, list[Any]]:
        """Return the arguments of `Scorer.score` for a batch."""
        measurement = self.measurements[batch.measurement]
        items = [measurement.items[number] for number in batch.items]
        return batch.number, measurement.without_items(), items

    def found(self, by_batch: dict[int, list[Found]]) -> list[list[Found]]:
        """Return the results of each benchmark's items, in the order of the items.

        Args:
            by_batch: Results of the items of each batch by number, for all or some batches.
        """
        of_items: list[dict[int, Found]] = [{} for _ in self.measurements]
        for number, found in by_batch.items():
            batch = self.batches[number]
            of_items[batch.measurement].update(zip(batch.items, found, strict=True))
        return [[found[number] for number in sorted(found)] for found in of_items]

    def scores(self, by_batch: dict[int, list[Found]]) -> Scores:
        """Return the scores of all benchmarks."""
        scores: Scores = {}
        for measurement, found in zip(self.measurements, self.found(by_batch), strict=True):
            scores |= measurement.scores(found)
        return scores


def tokenizer_of(config: EvaluateConfig) -> Any:
    """Load the model's tokenizer, with the configured chat template or else the adapter's."""
    template = config.chat_template or own_template(config.adapter)
    return load_tokenizer(config.model, template, "evaluate.chat_template")


class Scorer:
    """Loads a model at the first use and scores batches with it.

    Args:
        config: Configuration of the evaluation. In an actor, its paths must be absolute.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._size = 0, 0

    @functools.cached_property
    def engine(self) -> Engine:
        """The model with its adapter."""
        from loram_ray.models.loading import load_model, parameters_and_bytes

        config = self._config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = load_model(config.model, config.precision, device)
        self._size = parameters_and_bytes(model.parameters())
        if config.adapter is not None:
            model = with_adapter(model, config.model, config.adapter, "evaluate.adapter")
        return Engine(model.eval(), tokenizer_of(config))

    def size(self) -> Scores:
        """Return the model's number of parameters without an adapter, and their size in bytes."""
        assert self.engine
        return dict(zip(("model_parameters", "model_bytes"), self._size, strict=True))

    def harness(self, work: Path) -> tuple[Scores, dict[str, list[Any]]]:
        """Run the tasks of lm-eval; see `lm_eval_model.run_harness`.

        Args:
            work: Directory for answers and progress.

        Raises:
            LoramError: lm-eval is not installed, or does not have a task.
        """
        try:
            from loram_ray.evaluation.lm_eval_model import run_harness
        except ImportError as error:
            raise LoramError(
                f"evaluate.lm_eval needs the package lm-eval ({error}); run pip install "
                "'loram-ray[lm-eval]'"
            ) from error
        config = self._config
        assert config.lm_eval is not None
        log = MetricsLog(work / METRICS_FILE)
        answered = 0

        def advance(requests: int) -> None:
            nonlocal answered
            answered += requests
            log.write(answered)

        with alone(work), torch.inference_mode():
            return run_harness(
                self.engine, config.lm_eval, work, config.batch_size, config.seed, advance
            )

    def score(
        self, number: int, measurement: Benchmark, items: Sequence[Any]
    ) -> tuple[list[Found], float]:
        """Score a batch.

        Args:
            number: Number of the batch, which is added to the seed of sampling.
            measurement: Benchmark without its items.
            items: Items of the batch.

        Returns:
            The result of each item, and the duration in seconds without loading.
        """
        engine, seed = self.engine, (self._config.seed + number) % 2**32
        started = time.perf_counter()
        with torch.inference_mode():
            found = measurement.score(engine, items, seed)
        return found, time.perf_counter() - started


def with_adapter(model: Any, directory: str, adapter: Path, key: str) -> Any:
    """Put an adapter on a model, and return the causal LM of transformers.

    Args:
        model: Model as it was loaded.
        directory: Directory that the model was loaded from.
        adapter: Directory of the adapter.
        key: Configuration key or option to name in messages.

    Raises:
        LoramError: The adapter is for another model.
    """
    from loram_ray.finetuning.masked import put_adapter_on

    try:
        return put_adapter_on(model, directory, adapter).get_base_model()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LoramError(
            f"{key} {adapter} does not match the model ({reason:.300}); use the model that it was "
            "trained for"
        ) from error
