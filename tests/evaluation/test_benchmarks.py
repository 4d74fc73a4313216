"""Multiple choice, generated answers and programs against loops over one token at a time."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers import families, quizzes, tiny
from helpers.scored import score
from loram_ray.config import EvaluateConfig
from loram_ray.errors import LoramError
from loram_ray.evaluation.answers import last_number, number_of_reference
from loram_ray.evaluation.choice import MultipleChoice
from loram_ray.evaluation.engine import Engine, common_beginning
from loram_ray.evaluation.generation import Sampling, answers, cut_off
from loram_ray.evaluation.likelihood import Branches, nlls_of_branches
from loram_ray.evaluation.scoring import Plan, Scorer
from loram_ray.evaluation.uncertainty import mean_and_error, pass_at_k
from loram_ray.models.loading import load_model


@pytest.fixture
def model(loud: LlamaForCausalLM) -> LlamaForCausalLM:
    return loud


@pytest.fixture
def directory(loud_directory: Path) -> Path:
    return loud_directory


@torch.no_grad()
def naive(model: Any, context: list[int], choice: list[int]) -> tuple[float, bool]:
    """Minus the log-probability of a choice, and whether it is greedy: a forward a token."""
    total, greedy = 0.0, True
    for place in range(len(choice)):
        logits = model(torch.tensor([context + choice[:place]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, dim=-1)[choice[place]])
        greedy &= int(logits.argmax()) == choice[place]
    return total, greedy


def branches(count: int = 7, begin: int = 0) -> list[Branches]:
    """Contexts of many lengths, with one choice or several, of one token or several."""
    draw = random.Random(begin)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, tiny.VOCABULARY) for _ in range(n)]

    common = ids(begin)
    return [
        Branches(
            [*common, *ids(draw.randint(1, 20))],
            tuple(ids(draw.randint(1, 6)) for _ in range(1 + n % 4)),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("begin", [0, 5, 40])
@torch.inference_mode()
def test_branches_are_as_likely_as_in_a_loop_over_tokens(
    model: LlamaForCausalLM, begin: int
) -> None:
    engine = Engine(model, tiny.tokenizer())
    items = branches(begin=begin)
    for computed_once in {0, begin}:
        found = nlls_of_branches(engine, items, computed_once)
        for item, nlls in zip(items, found, strict=True):
            expected = [naive(model, item.context, choice) for choice in item.choices]
            assert [nll for nll, _ in nlls] == pytest.approx([e for e, _ in expected], rel=1e-4)
            assert [greedy for _, greedy in nlls] == [greedy for _, greedy in expected]


@torch.inference_mode()
def test_the_likeliest_continuation_is_said_to_be(model: LlamaForCausalLM) -> None:
    engine, context = Engine(model, tiny.tokenizer()), [5, 6, 7]
    likely = list(context)
    for _ in range(3):
        likely.append(int(model(torch.tensor([likely])).logits[0, -1].argmax()))
    other = [*likely[3:5], likely[5] - 1]
    [[(_, greedy), (_, not_greedy)]] = nlls_of_branches(
        engine, [Branches(context, (likely[3:], other))]
    )
    assert greedy
    assert not not_greedy


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.inference_mode()
def test_branches_of_each_family(family: str) -> None:
    """Among them those whose layers see back eight tokens alone, and those that cap their logits.

    Of experts, each token's output must not depend on what else is in the batch.
    """
    model = families.build(family)
    engine = Engine(model, tiny.tokenizer())
    for items in (branches(4, begin=17), [Branches([5, 6, 7], ([8, 9], [10], [11, 12, 13]))]):
        found = nlls_of_branches(
            engine, items, len(items[0].context) - 2 if len(items) == 1 else 17
        )
        for item, nlls in zip(items, found, strict=True):
            expected = [naive(model, item.context, choice)[0] for choice in item.choices]
            assert [nll for nll, _ in nlls] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_what_items_have_in_common() -> None:
    common = list(range(30))
    assert common_beginning([[*common, 40], [*common, 41, 42], [*common, 43]]) == 30
    assert common_beginning([common, [*common, 41]]) == 29, "one token must be left of each"
    assert common_beginning([common[:5], common]) == 0, "too few to be worth the while"
    assert common_beginning([common]) == 0
    assert common_beginning([[1, *common], [2, *common]]) == 0


def evaluation(directory: Path, benchmark: dict[str, Any], **settings: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "model": str(directory),
            "output": directory.with_name("unwritten"),
            "precision": "fp32",
            "benchmarks": [benchmark],
            **settings,
        }
    )


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 3])
def test_multiple_choice_is_that_of_a_loop(
    model: LlamaForCausalLM, directory: Path, tmp_path: Path, shots: int, chat: bool
) -> None:
    data = tiny.write_jsonl(tmp_path / "quiz.jsonl", quizzes.CHOICES)
    benchmark = {"kind": "choice", "data": str(data), "chat": chat, "shots": shots}
    if shots:
        benchmark["shots_from"] = str(data)
    config = evaluation(directory, benchmark, batch_size=2)
    found = score(config)
    tokenizer, right, normalised = tiny.tokenizer(), 0, 0
    shown = [
        ("Question: Which is a colour?\nAnswer:", "red"),
        ("Question: Which is a number?\nAnswer:", "seven"),
        ("Question: Which is long?\nAnswer:", "an answer of many words"),
    ][:shots]
    for row, expected in zip(quizzes.CHOICES, quizzes.RIGHT, strict=True):
        question = f"Question: {row['question']}\nAnswer:"
        texts = row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"]
        if chat:
            text = "".join(
                f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
                for q, a in shown
            )
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        else:
            text = "".join(f"{q} {a}\n\n" for q, a in shown) + question
        context = tokenizer(text)["input_ids"]
        nlls = [
            naive(model, context, tokenizer(choice if chat else f" {choice}")["input_ids"])[0]
            for choice in texts
        ]
        by_length = [nll / len(choice) for nll, choice in zip(nlls, texts, strict=True)]
        right += nlls.index(min(nlls)) == expected
        normalised += by_length.index(min(by_length)) == expected
    assert found["quiz/accuracy"] == pytest.approx(right / 6)
    assert found["quiz/accuracy_normalised"] == pytest.approx(normalised / 6)
    error = statistics.stdev([1] * right + [0] * (6 - right)) / math.sqrt(6)
    assert found["quiz/accuracy_stderr"] == pytest.approx(error)
    assert found["quiz/items"] == 6
    [measurement] = Plan(config).measurements
    assert isinstance(measurement, MultipleChoice)
    assert (measurement.begin > 0) == (bool(shots) or chat)


def test_random_choices_of_shots_have_a_seed(directory: Path, tmp_path: Path) -> None:
    data = str(tiny.write_jsonl(tmp_path / "quiz.jsonl", quizzes.CHOICES))
    settings = {"kind": "choice", "data": data, "shots_from": data, "shots": 2}

    def context(**more: Any) -> list[int]:
        config = evaluation(directory, {**settings, **more})
        return Plan(config).measurements[0].items[0].groups[0].context  # type: ignore[no-any-return]

    assert context(shots_seed=1) == context(shots_seed=1)
    assert len({tuple(context(shots_seed=seed)) for seed in range(8)}) > 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"choices": ["a", "b"], "answer": "c c"}, "its answer 'c c' is not one of its choices"),
        ({"choices": ["a", "b"], "answer": 2}, "its answer 2 is not one of its choices"),
        ({"choices": ["a", "b"], "answer": -1}, "its answer -1 is not one of its choices"),
        ({"choices": ["a", "b"], "answer": "Z"}, "its answer 'Z' is not one of its choices"),
        ({"choices": ["a"], "answer": 0}, "its choices must be at least two texts"),
        ({"choices": "ab", "answer": 0}, "its choices must be at least two texts"),
        ({"choices": ["a", " "], "answer": 0}, "must be non-empty texts"),
        ({"choices": ["a", "b"]}, "it has no answer"),
        ({"answer": 0}, "it has no choices"),
    ],
)
def test_a_bad_question_is_named(
    directory: Path, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    rows = [quizzes.CHOICES[0], {"question": "?", **row}]
    data = str(tiny.write_jsonl(tmp_path / "quiz.jsonl", rows))
    with pytest.raises(LoramError, match=r"evaluate\.max_bad_share must be at least") as caught:
        Plan(evaluation(directory, {"kind": "choice", "data": data}))
    assert f"{data}:2" in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    config = evaluation(directory, {"kind": "choice", "data": data}, max_bad_share=0.5)
    assert Plan(config).items == 1


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("choice", {}, r"evaluate\.benchmarks\.0\.data must contain items, .* has none"),
        ("generation", {}, r"evaluate\.benchmarks\.0\.data must contain items, .* has none"),
        ("code", {}, r"evaluate\.benchmarks\.0\.data must contain items, .* has none"),
        ("perplexity", {}, r"evaluate\.benchmarks\.0\.data must contain examples"),
    ],
)
def test_an_empty_file_is_refused(
    directory: Path, tmp_path: Path, kind: str, more: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    benchmark = {"kind": kind, "data": str(tmp_path / "empty.jsonl"), **more}
    with pytest.raises(LoramError, match=message):
        Plan(evaluation(directory, benchmark))


def test_what_does_not_fit_together_is_refused(directory: Path, tmp_path: Path) -> None:
    data = str(tiny.write_jsonl(tmp_path / "quiz.jsonl", quizzes.CHOICES))
    choice = {"kind": "choice", "data": data}

    def refused(match: str, *benchmarks: dict[str, Any], at: Path = directory) -> None:
        with pytest.raises(LoramError, match=match) as caught:
            Plan(evaluation(at, {}, benchmarks=list(benchmarks)))
        assert len(str(caught.value).splitlines()) == 1

    refused("shots_from must have at least", {**choice, "shots": 7, "shots_from": data})
    refused(r"benchmarks\.1\.name must be unique, got quiz twice", choice, choice)
    refused("must fit into the model's context of 512", {**choice, "prompt": "x" * 600})
    gym = {"kind": "reasoning_gym", "dataset": "no_such_task"}
    refused("must name a reasoning-gym dataset with valid options", gym)
    gym = {"kind": "reasoning_gym", "dataset": "chain_sum", "options": {"no_such_option": 1}}
    refused("must name a reasoning-gym dataset with valid options", gym)
    bare = tmp_path / "bare"
    load_model(directory, "fp32").save_pretrained(bare)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    for benchmark in ({**choice, "chat": True}, {"kind": "reasoning_gym", "dataset": "chain_sum"}):
        refused(r"benchmarks\.0\.chat needs a chat template", benchmark, at=bare)
    assert Plan(evaluation(bare, choice)).items == len(quizzes.CHOICES)


SUMS = [
    {"question": f"{a}+{b}", "answer": f"{a} and {b} make\n#### {a + b:,}"}
    for a, b in ((1, 2), (700, 800), (3, 3), (5, 0))
]


@torch.no_grad()
def naive_answer(model: Any, prompt: list[int], most: int, stops: tuple[str, ...]) -> str:
    """Greedy decoding of one prompt, without padding, cache or batch."""
    tokenizer, ids = tiny.tokenizer(), list(prompt)
    for _ in range(most):
        following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if following in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
            break
        ids.append(following)
    text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop)[0]
    return str(text)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shots", [0, 2])
def test_generated_answers_are_those_of_one_question_at_a_time(
    model: LlamaForCausalLM, directory: Path, tmp_path: Path, shots: int, batch_size: int
) -> None:
    prompts = ["Q: " + "why? " * n + "A:" for n in (1, 4, 2, 7, 3)]
    solved = "".join(f"{row['question']}? {row['answer']}\n\n" for row in SUMS[:shots])
    tokenizer = tiny.tokenizer()
    whole = [naive_answer(model, tokenizer(solved + p)["input_ids"], 8, ()) for p in prompts]
    stop = whole[3][4:6]  # which the fourth answer has in its middle
    expected = [
        naive_answer(model, tokenizer(solved + p)["input_ids"], 8, (stop,)) for p in prompts
    ]
    assert expected[3] != whole[3]
    assert len(set(expected)) > 1
    rows = [{"question": p, "answer": a} for p, a in zip(prompts, expected, strict=True)]
    data = str(tiny.write_jsonl(tmp_path / "asked.jsonl", rows))
    solved_rows = [{"question": f"{row['question']}?", "answer": row["answer"]} for row in SUMS]
    benchmark: dict[str, Any] = {
        "kind": "generation",
        "data": data,
        "prompt": "{question}",
        "max_new_tokens": 8,
        "stop": [stop],
    }
    if shots:
        path = str(tiny.write_jsonl(tmp_path / "shots.jsonl", solved_rows))
        benchmark |= {"shots": shots, "shots_from": path}
    config = evaluation(directory, benchmark, batch_size=batch_size)
    plan, scorer = Plan(config), Scorer(config)
    assert (plan.measurements[0].begin > 0) == bool(shots)  # type: ignore[attr-defined]
    found = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
    assert [one["answer"] for one in plan.found(found)[0]] == expected
    assert plan.scores(found)["asked/exact_match"] == 1.0


@torch.inference_mode()
def test_rows_of_a_window_are_generated_without_a_common_beginning() -> None:
    model = families.build("mistral")
    engine, prompts = Engine(model, tiny.tokenizer()), [[*range(10, 40), n] for n in (5, 6, 7)]
    found = answers(engine, prompts, Sampling(5), begin=30)
    assert found == [naive_answer(model, prompt, 5, ()) for prompt in prompts]


def test_last_numbers() -> None:
    assert last_number("it is 3, or 4.") == Decimal(4)
    assert last_number("$1,234.50 in all") == Decimal("1234.5")
    assert last_number("from 5 to -7") == Decimal(-7)
    assert last_number("2.0") == Decimal(2)
    assert last_number("none") is None
    assert number_of_reference("2 and 3 make 5.\n#### 1,500") == Decimal(1500)
    assert number_of_reference("six is 6") == Decimal(6)
    assert cut_off("a\n\nb\nQ: c", ("Q:", "\n\n")) == "a"


def test_numbers_are_matched_where_all_references_have_one(directory: Path, tmp_path: Path) -> None:
    def scores(rows: list[dict[str, str]]) -> dict[str, float | int]:
        data = str(tiny.write_jsonl(tmp_path / "sums.jsonl", rows))
        benchmark = {"kind": "generation", "data": data, "max_new_tokens": 2}
        config = evaluation(directory, benchmark)
        [measurement] = Plan(config).measurements
        said = ["It is 3.", "1500", "#### 7", "5 - 5 = 0"]
        return measurement.scores(
            [
                measurement.judged(item, answer)  # type: ignore[attr-defined]
                for item, answer in zip(measurement.items, said, strict=False)
            ]
        )

    found = scores(SUMS)
    assert found["sums/last_number_match"] == 0.5
    assert found["sums/exact_match"] == 0.0
    assert "sums/last_number_match" not in scores([{"question": "a", "answer": "b"}])


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_that_have_one_that_passes(samples: int) -> None:
    for passed in range(samples + 1):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(outcomes, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_an_error_is_that_of_a_mean() -> None:
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == (0.5, pytest.approx(0.5773502 / 2))
    mean, error = mean_and_error([2.0])
    assert mean == 2.0
    assert math.isnan(error)


@pytest.mark.parametrize("samples", [1, 3])
def test_programs_pass_or_not(directory: Path, tmp_path: Path, samples: int) -> None:
    """Two of three problems are solved by their own prompts; a line of noise is a comment."""
    data = str(tiny.write_jsonl(tmp_path / "code.jsonl", quizzes.PROBLEMS))
    benchmark = {
        "kind": "code",
        "data": data,
        "samples": samples,
        "pass_at": [1, samples] if samples > 1 else [1],
        "max_new_tokens": 6,
        "stop": ["\n", "\r", "\x0b", "\x0c", "\0"],
    }
    config = evaluation(directory, benchmark, batch_size=2)
    plan, scorer = Plan(config), Scorer(config)
    found = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
    [programs] = plan.found(found)
    assert len(programs) == 3 * samples
    for number, program in enumerate(programs):
        assert program["passed"] == (number // samples < 2), program
    assert programs[-1]["reason"] == "AssertionError"
    scores = plan.scores(found)
    for k in benchmark["pass_at"]:
        assert scores[f"code/pass@{k}"] == pytest.approx(2 / 3)
    assert scores["code/problems"] == 3
    if samples > 1:
        assert len({program["answer"] for program in programs[:samples]}) > 1
        again = {batch.number: scorer.score(*plan.asked(batch))[0] for batch in plan.batches}
        assert again == found
        other = Scorer(config.model_copy(update={"seed": 5}))
        drawn = {batch.number: other.score(*plan.asked(batch))[0] for batch in plan.batches}
        assert drawn != found


def test_reasoning_gym_scores_its_own_answers(directory: Path) -> None:
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2}
    benchmark = {"kind": "reasoning_gym", "dataset": "chain_sum", "size": 6, "seed": 3}
    benchmark |= {"options": options, "max_new_tokens": 4}
    config = evaluation(directory, benchmark)
    [measurement] = Plan(config).measurements
    entries = list(reasoning_gym.create_dataset("chain_sum", size=6, seed=3, **options))
    scorer = reasoning_gym.create_dataset("chain_sum", size=6, seed=3, **options)
    prompts = [
        f"<|im_start|>user\n{entry['question']}<|im_end|>\n<|im_start|>assistant\n"
        for entry in entries
    ]
    assert [item.prompt for item in measurement.items] == [
        tiny.tokenizer()(prompt)["input_ids"] for prompt in prompts
    ]
    said = [entries[0]["answer"], "wrong", f"I think <answer> {entries[2]['answer']} </answer>"]
    worth = [
        measurement.judged(item, answer)["score"]  # type: ignore[attr-defined]
        for item, answer in zip(measurement.items, said, strict=False)
    ]
    assert worth == [1.0, scorer.score_answer("wrong", entries[1]), 1.0]
    found = score(config)
    assert found["chain_sum/questions"] == 6
    assert 0 <= found["chain_sum/score"] <= 1


def test_perplexities_in_and_out_of_domain(directory: Path, tmp_path: Path) -> None:
    data = str(tiny.write_jsonl(tmp_path / "sums.jsonl", tiny.questions(5)))
    text = {"sources": [{"path": str(tiny.write_jsonl(tmp_path / "t.jsonl", tiny.texts(4)))}]}
    plain = score(evaluation(directory, {}, benchmarks=[], data=data, text=text))
    benchmarks = [
        {"kind": "perplexity", "data": data},
        {"kind": "perplexity", "text": text, "name": "other"},
    ]
    found = score(evaluation(directory, {}, benchmarks=benchmarks))
    assert found["sums/answer_perplexity"] == plain["answer_perplexity"]
    assert found["other/text_perplexity"] == plain["text_perplexity"]
    assert json.dumps(found)
