"""Benchmarks of generated answers, scored against references or by reasoning-gym."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from loram_ray.config.evaluate import GenerationBenchmark, GymBenchmark
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.templates import (
    NONE,
    Surroundings,
    ids_of,
    render,
    visible,
    visible_surroundings,
)
from loram_ray.errors import LoramError
from loram_ray.evaluation.benchmark import Benchmark, Found, Scores
from loram_ray.evaluation.engine import Engine, common_beginning
from loram_ray.evaluation.generation import Sampling, answers
from loram_ray.evaluation.prompts import (
    PromptBuilder,
    Shot,
    chosen,
    columns_of,
    filled,
    good_rows,
    rows_of,
)
from loram_ray.evaluation.uncertainty import mean_and_error

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARK = "####"


@dataclass(frozen=True)
class Question:
    """A prompt with its reference.

    Attributes:
        place: Location of the question, ``file:line`` or a number.
        prompt: Token ids of the prompt.
        right: Reference text, or entry of a reasoning-gym data set.
        learnt: Text that a model trained on the reference would generate, if known.
    """

    place: str
    prompt: list[int]
    right: Any
    learnt: str | None = None


@dataclass
class Answers(Benchmark):
    """Share of generated answers that equal the reference or end with its number.

    Attributes:
        sampling: How answers are generated.
        begin: Number of tokens that all prompts begin with.
        template: Text that the chat template adds around an answer, which is cut off.
    """

    sampling: Sampling
    begin: int = 0
    template: Surroundings = NONE

    @property
    def title(self) -> str:
        """The benchmark's name, or ``exact_match`` if it has none."""
        return self.name or "exact_match"

    def cost(self, item: Question) -> int:
        """Return the number of tokens of the prompt."""
        return len(item.prompt)

    def span(self, item: Question) -> int:
        """Return the number of tokens of the prompt and the longest possible answer."""
        return len(item.prompt) + self.sampling.max_new_tokens

    def score(self, engine: Engine, items: Sequence[Question], seed: int) -> list[Found]:
        """Generate and score answers."""
        prompts = [item.prompt for item in items]
        said = answers(engine, prompts, self.sampling, self.begin, seed)
        return [
            {"place": item.place, "answer": answer, **self.judged(item, answer)}
            for item, answer in zip(items, said, strict=True)
        ]

    def judged(self, item: Question, answer: str) -> Found:
        """Score one answer."""
        own, number = self.template.cut_off(answer), number_of_reference(item.right)
        return {
            "right": item.right,
            "exact_match": own.strip() == item.right.strip()
            or (item.learnt is not None and answer.strip() == item.learnt.strip()),
            "last_number_match": None if number is None else last_number(own) == number,
        }

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Return the shares of matches with standard errors; numbers if all references have one."""
        scores: Scores = {}
        for key in ("exact_match", "last_number_match"):
            if all(one[key] is not None for one in found):
                mean, error = mean_and_error([float(one[key]) for one in found])
                scores |= {key: mean, f"{key}_stderr": error}
        return scores | {"questions": len(found)}


@dataclass
class GymAnswers(Answers):
    """Mean score that reasoning-gym gives to generated answers.

    Attributes:
        dataset: Name of the data set.
        options: Options of the data set.
    """

    dataset: str = ""
    options: dict[str, Any] | None = None

    def judged(self, item: Question, answer: str) -> Found:
        """Return the data set's score of an answer, from 0 to 1."""
        tagged = _TAGGED.search(answer)
        said = (tagged.group(1) if tagged else self.template.cut_off(answer)).strip()
        return {"score": float(self._scorer.score_answer(said, item.right))}

    @cached_property
    def _scorer(self) -> Any:
        return gym_dataset(self.dataset, 1, 0, self.options or {}, "evaluate.benchmarks")

    def summed_up(self, found: Sequence[Found]) -> Scores:
        """Return the mean score with its standard error."""
        mean, error = mean_and_error([one["score"] for one in found])
        return {"score": mean, "score_stderr": error, "questions": len(found)}


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, ignoring thousands separators; None if there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def number_of_reference(text: str) -> Decimal | None:
    """Return a reference's number: the one after GSM8K's mark, or else the last one."""
    return last_number(text.rpartition(_MARK)[2])


def exact_answers(
    name: str, tokenizer: Any, asked: Sequence[Conversation], max_new_tokens: int
) -> Answers:
    """Create the benchmark that generates the last answer of each conversation."""
    items = [_question_of(tokenizer, conversation) for conversation in asked]
    begin = common_beginning([item.prompt for item in items])
    template = visible_surroundings(tokenizer)
    return Answers(name, items, Sampling(max_new_tokens), begin, template)


def _question_of(tokenizer: Any, conversation: Conversation) -> Question:
    """Return a conversation's last question, with the reference and the text learnt from it."""
    count = len(conversation.messages)
    prompt = render(tokenizer, conversation, count - 1, prompt=True)
    whole = render(tokenizer, conversation, count, prompt=False)
    learnt = visible(tokenizer, whole[len(prompt) :])
    right = conversation.answer if conversation.answer.strip() else learnt
    return Question(conversation.place, ids_of(tokenizer, prompt), right, learnt)


def generated_answers(
    name: str, tokenizer: Any, config: GenerationBenchmark, key: str, max_bad_share: float
) -> Answers:
    """Read and tokenise a benchmark.

    Raises:
        LoramError: There is no row, too many unusable rows, too few shots or no chat template.
    """
    columns = [*columns_of(config.prompt), config.answer]

    def solved(data: str, of: str, limit: int | None) -> list[tuple[str, str, str]]:
        rows = good_rows(rows_of(data, columns, of, limit), max_bad_share)
        return [(place, filled(config.prompt, row), str(row[config.answer])) for place, row in rows]

    shots = []
    if config.shots_from is not None:
        found = solved(config.shots_from, f"{key}.shots_from", None)
        shots = [Shot(question, answer) for _, question, answer in found]
        shots = chosen(shots, config.shots, config.shots_seed, f"{key}.shots_from")
    builder = PromptBuilder(tokenizer, shots, config.delimiter, config.chat, key)
    items = [
        Question(place, builder.ids(builder.text(question)), answer)
        for place, question, answer in solved(config.data, f"{key}.data", config.limit)
    ]
    sampling = Sampling(config.max_new_tokens, () if config.chat else config.stop)
    template = visible_surroundings(tokenizer) if config.chat else NONE
    return Answers(
        name, items, sampling, common_beginning([item.prompt for item in items]), template
    )


def gym_answers(name: str, tokenizer: Any, config: GymBenchmark, key: str) -> GymAnswers:
    """Create a reasoning-gym task and tokenise it.

    Raises:
        LoramError: reasoning-gym is not installed, has no such data set or rejects its options, or
            there is no chat template.
    """
    size = min(config.size, config.limit or config.size)
    entries = gym_dataset(config.dataset, size, config.seed, config.options, key)
    builder = PromptBuilder(tokenizer, (), "", config.chat, key)
    items = [
        Question(str(number), builder.ids(builder.text(entry["question"])), dict(entry))
        for number, entry in enumerate(entries)
    ]
    begin = common_beginning([item.prompt for item in items])
    sampling = Sampling(config.max_new_tokens)
    template = visible_surroundings(tokenizer) if config.chat else NONE
    return GymAnswers(name, items, sampling, begin, template, config.dataset, config.options)


def gym_dataset(name: str, size: int, seed: int, options: dict[str, Any], key: str) -> Any:
    """Create a data set of reasoning-gym.

    Raises:
        LoramError: reasoning-gym is not installed, or has no such data set or option.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise LoramError(
            f"{key}.kind = reasoning_gym needs the package reasoning-gym; run pip install "
            "reasoning-gym"
        ) from error
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise LoramError(
            f"{key} must name a reasoning-gym dataset with valid options, got {name} with "
            f"{options} ({' '.join(str(error).split()):.200}); fix them"
        ) from error
