"""Multiple choice by log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loram_ray.config.evaluate import ChoiceBenchmark
from loram_ray.corpus.read import BadRow
from loram_ray.evaluation.benchmark import Benchmark, Found, Scores
from loram_ray.evaluation.engine import Engine, common_beginning
from loram_ray.evaluation.likelihood import Branches, nlls_of_branches
from loram_ray.evaluation.prompts import (
    PromptBuilder,
    Shot,
    chosen,
    columns_of,
    filled,
    good_rows,
    rows_of,
    split_ids,
)
from loram_ray.evaluation.uncertainty import mean_and_error


@dataclass(frozen=True)
class Choice:
    """A question with choices.

    Attributes:
        place: Location of the question, ``file:line``.
        groups: Contexts with the choices that follow each. There is one context, unless a choice's
            first token merges with the end of the context.
        lengths: Length of each choice in characters.
        right: Index of the right choice.
    """

    place: str
    groups: tuple[Branches, ...]
    lengths: tuple[int, ...]
    right: int


@dataclass
class MultipleChoice(Benchmark):
    """Share of questions whose likeliest choice is the right one.

    Attributes:
        begin: Number of tokens that all contexts begin with.
    """

    begin: int = 0

    @property
    def title(self) -> str:
        """The benchmark's name."""
        return self.name

    def cost(self, item: Choice) -> int:
        """Return the number of tokens of the largest row."""
        return max(group.tokens for group in item.groups)

    def span(self, item: Choice) -> int:
        """Return the number of tokens of a context with its longest choice."""
        return max(group.longest for group in item.groups)

    def score(self, engine: Engine, items: Sequence[Choice], seed: int) -> list[Found]:
        """Return log-likelihoods and whether the likeliest is right, in total and per character."""
        groups = [group for item in items for group in item.groups]
        nlls = iter(nlls_of_branches(engine, groups, self.begin))
        return [
            _judged(item, [nll for _ in item.groups for nll, _ in next(nlls)]) for item in items
        ]

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Return the accuracies by total and by per-character likelihood, with standard errors."""
        scores: Scores = {}
        for key in ("accuracy", "accuracy_normalised"):
            mean, error = mean_and_error([float(one[key]) for one in found])
            scores |= {key: mean, f"{key}_stderr": error}
        return scores | {"items": len(found)}


def _judged(item: Choice, nlls: list[float]) -> Found:
    normalised = [nll / length for nll, length in zip(nlls, item.lengths, strict=True)]
    likeliest, by_length = nlls.index(min(nlls)), normalised.index(min(normalised))
    return {
        "place": item.place,
        "log_likelihoods": [-nll for nll in nlls],
        "right": item.right,
        "accuracy": likeliest == item.right,
        "accuracy_normalised": by_length == item.right,
    }


def multiple_choice(
    name: str, tokenizer: Any, config: ChoiceBenchmark, key: str, max_bad_share: float
) -> MultipleChoice:
    """Read and tokenise a benchmark.

    Raises:
        LoramError: There is no row, too many unusable rows, too few shots or no chat template.
    """
    columns = [*columns_of(config.prompt), config.choices, config.answer]

    def solved(data: str, of: str, limit: int | None) -> list[Any]:
        rows = rows_of(data, columns, of, limit)
        return good_rows([_parsed(row, config) for row in rows], max_bad_share)

    shots = []
    if config.shots_from is not None:
        found = solved(config.shots_from, f"{key}.shots_from", None)
        shots = [Shot(question, choices[right]) for _, question, choices, right in found]
        shots = chosen(shots, config.shots, config.shots_seed, f"{key}.shots_from")
    builder = PromptBuilder(tokenizer, shots, config.delimiter, config.chat, key)
    items = [_tokenised(builder, *row) for row in solved(config.data, f"{key}.data", config.limit)]
    contexts = [group.context for item in items for group in item.groups]
    return MultipleChoice(name, items, common_beginning(contexts))


def _parsed(row: Any, config: ChoiceBenchmark) -> tuple[str, str, list[str], int] | BadRow:
    """Return a row's location, question, choices and the index of the right choice."""
    if isinstance(row, BadRow):
        return row
    place, values = row
    choices: Any = values[config.choices]
    labels = None
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        return BadRow(
            place, f"its {config.choices} must be at least two texts, got {choices!r:.80}"
        )
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return BadRow(place, f"its {config.choices} must be non-empty texts")
    right = _number_of(values[config.answer], choices, labels)
    if right is None:
        return BadRow(
            place,
            f"its {config.answer} {values[config.answer]!r:.80} is not one of its {config.choices}",
        )
    return place, filled(config.prompt, values), choices, right


def _number_of(answer: Any, choices: list[str], labels: list[Any] | None) -> int | None:
    """Return the index of the answer, given as a label, text, index from 0 or letter."""
    if labels is not None and str(answer) in map(str, labels):
        found = list(map(str, labels)).index(str(answer))
    elif isinstance(answer, str) and answer in choices:
        found = choices.index(answer)
    elif isinstance(answer, int) or (isinstance(answer, str) and answer.strip().isdecimal()):
        found = int(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        found = ord(answer.strip().upper()) - ord("A")
    else:
        return None
    return found if 0 <= found < len(choices) else None


def _tokenised(
    builder: PromptBuilder, place: str, question: str, choices: list[str], right: int
) -> Choice:
    text = builder.text(question)
    groups: list[Branches] = []
    for choice in choices:
        context, following = split_ids(builder, text, builder.delimiter + choice)
        if groups and groups[-1].context == context:
            groups[-1] = Branches(context, (*groups[-1].choices, following))
        else:
            groups.append(Branches(context, (following,)))
    return Choice(place, tuple(groups), tuple(map(len, choices)), right)
