"""Generated programs run against their tests, in HumanEval's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from loram_ray.config.evaluate import CodeBenchmark
from loram_ray.evaluation.benchmark import Benchmark, Found, Scores
from loram_ray.evaluation.engine import Engine, common_beginning
from loram_ray.evaluation.generation import Sampling, answers
from loram_ray.evaluation.prompts import good_rows, rows_of
from loram_ray.evaluation.sandbox import Limits, Tests, Verdict, require_sandbox, run_program
from loram_ray.evaluation.uncertainty import mean_and_error, pass_at_k
from loram_ray.models.tokenizer import ids_to_continue

_COLUMNS = ("prompt", "test", "entry_point")


@dataclass(frozen=True)
class Problem:
    """A program to complete; there is one for each sample.

    Attributes:
        place: Location of the problem, ``file:line``.
        text: Beginning of the program.
        prompt: Token ids of the beginning.
        tests: Tests, which run in another process.
    """

    place: str
    text: str
    prompt: list[int]
    tests: Tests


@dataclass
class Programs(Benchmark):
    """Pass@k of generated programs.

    Attributes:
        sampling: How programs are generated.
        limits: Resource limits of a running program.
        samples: Number of samples per problem.
        pass_at: Values of k.
        begin: Number of tokens that all prompts begin with, if there is one sample.
    """

    sampling: Sampling
    limits: Limits
    samples: int
    pass_at: tuple[int, ...]
    begin: int = 0

    def batches(self, size: int) -> Iterator[list[int]]:
        """Yield batches of one problem's samples, or of problems of similar length.

        The samples of one problem share the computation of its prompt.
        """
        if self.samples == 1:
            yield from super().batches(size)
            return
        for first in range(0, len(self.items), self.samples):
            for start in range(first, first + self.samples, size):
                yield list(range(start, min(start + size, first + self.samples)))

    @property
    def title(self) -> str:
        """The benchmark's name."""
        return self.name

    def cost(self, item: Problem) -> int:
        """Return the number of tokens of the prompt."""
        return len(item.prompt)

    def span(self, item: Problem) -> int:
        """Return the number of tokens of the prompt and the longest possible program."""
        return len(item.prompt) + self.sampling.max_new_tokens

    def score(self, engine: Engine, items: Sequence[Problem], seed: int) -> list[Found]:
        """Generate programs and run their tests.

        Raises:
            LoramError: This machine cannot run programs in a sandbox.
        """
        require_sandbox()
        prompts = [item.prompt for item in items]
        begin = self.begin if self.samples == 1 else common_beginning(prompts)
        said = answers(engine, prompts, self.sampling, begin, seed)

        def run(number: int) -> Verdict:
            item = items[number]
            return run_program(f"{item.text}{said[number]}\n", self.limits, item.tests)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            verdicts = list(pool.map(run, range(len(items))))
        return [
            {
                "place": item.place,
                "answer": text,
                "passed": verdict.passed,
                "reason": verdict.reason,
            }
            for item, text, verdict in zip(items, said, verdicts, strict=True)
        ]

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Return each pass@k, the mean over problems, with its standard error."""
        passed = [
            sum(one["passed"] for one in found[start : start + self.samples])
            for start in range(0, len(found), self.samples)
        ]
        scores: Scores = {}
        for k in self.pass_at:
            mean, error = mean_and_error([pass_at_k(self.samples, c, k) for c in passed])
            scores |= {f"pass@{k}": mean, f"pass@{k}_stderr": error}
        return scores | {"problems": len(passed)}


def programs(
    name: str, tokenizer: Any, config: CodeBenchmark, key: str, max_bad_share: float
) -> Programs:
    """Read and tokenise a benchmark.

    Raises:
        LoramError: There is no row, or too many unusable rows.
    """
    rows = good_rows(rows_of(config.data, _COLUMNS, f"{key}.data", config.limit), max_bad_share)
    items = [
        Problem(
            place,
            row["prompt"],
            ids_to_continue(tokenizer, row["prompt"]),
            Tests(
                row["prompt"],
                f"{row['test']}\ncheck({row['entry_point']})\n",
                row["entry_point"],
            ),
        )
        for place, row in rows
        for _ in range(config.samples)
    ]
    several = config.samples > 1
    sampling = Sampling(
        config.max_new_tokens,
        config.stop,
        config.temperature if several else None,
        config.top_p if several else 1.0,
    )
    begin = 0 if several else common_beginning([item.prompt for item in items])
    limits = Limits(config.seconds, config.memory_mb)
    return Programs(name, items, sampling, limits, config.samples, config.pass_at, begin)
