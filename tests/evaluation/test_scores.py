"""Likelihoods and exact matches against one-token, one-question loops without batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import adapters, tiny
from helpers.scored import evaluation, naive_nll
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.examples import Example
from loram_ray.corpus.templates import prompt_ids
from loram_ray.errors import LoramError
from loram_ray.evaluation.answers import exact_answers
from loram_ray.evaluation.benchmark import Benchmark, Found
from loram_ray.evaluation.engine import Engine
from loram_ray.evaluation.perplexity import Perplexity, ScoredTokens
from loram_ray.models.loading import load_model


def answered(place: str, asked: list[dict[str, str]], answer: str) -> Conversation:
    return Conversation(place, [*asked, {"role": "assistant", "content": answer}])


@pytest.fixture
def model(loud: LlamaForCausalLM) -> LlamaForCausalLM:
    return loud


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def engine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(model, tokenizer)


@torch.inference_mode()
def scored(engine: Engine, measurement: Benchmark, size: int) -> dict[str, float | int]:
    """Scores of a measurement in batches of a size."""
    found: dict[int, Found] = {}
    for numbers in measurement.batches(size):
        items = [measurement.items[number] for number in numbers]
        found.update(zip(numbers, measurement.score(engine, items, 0), strict=True))
        assert len(numbers) <= size
    assert sorted(found) == list(range(len(measurement.items)))
    return measurement.scores([found[number] for number in sorted(found)])


def perplexity_of(examples: list[Example], of: str = "answer") -> Perplexity:
    return Perplexity("", [ScoredTokens.of(example) for example in examples], of)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    sizes = [(4, 9), (11, 12), (1, 7), (6, 20), (3, 5), (2, 14), (8, 9)]
    return [
        Example(
            f"file:{i}",
            torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist(),
            ((prompt, length),),
        )
        for i, (prompt, length) in enumerate(sizes)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_of_answers_is_that_of_a_loop_over_tokens(
    engine: Engine, model: LlamaForCausalLM, batch_size: int
) -> None:
    nlls = [naive_nll(model, e.input_ids, e.learnt[0][0]) for e in examples()]
    sizes = [len(e.input_ids) - e.learnt[0][0] for e in examples()]
    found = scored(engine, perplexity_of(examples()), batch_size)
    assert found["answer_tokens"] == sum(sizes)
    assert found["examples"] == len(examples())
    assert found["answer_perplexity"] == pytest.approx(math.exp(sum(nlls) / sum(sizes)), rel=1e-5)


def test_the_error_of_a_perplexity_is_that_of_drawing_the_examples_again(engine: Engine) -> None:
    """Against a bootstrap over whole examples, which knows no formula."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        Example(
            "", torch.randint(3, tiny.VOCABULARY, (n,), generator=generator).tolist(), ((1, n),)
        )
        for n in torch.randint(4, 30, (60,), generator=generator).tolist()
    ]
    found = scored(engine, perplexity_of(drawn), 20)
    rows = perplexity_of(drawn).score(engine, perplexity_of(drawn).items, 0)
    nlls = torch.tensor([row["nll"] for row in rows], dtype=torch.float64)
    tokens = torch.tensor([row["tokens"] for row in rows], dtype=torch.float64)
    again = torch.randint(0, 60, (4000, 60), generator=generator)
    error = (nlls[again].sum(dim=1) / tokens[again].sum(dim=1)).exp().std()
    assert found["answer_perplexity_stderr"] == pytest.approx(float(error), rel=0.1)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = LlamaForCausalLM(tiny.llama_config(layers=1)).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = scored(Engine(model, tokenizer), perplexity_of(examples()), 4)
    assert found["answer_perplexity"] == pytest.approx(tiny.VOCABULARY, rel=1e-5)
    assert found["answer_perplexity_stderr"] == pytest.approx(0.0, abs=1e-3)


def test_perplexities_overflow_to_infinity(engine: Engine) -> None:
    measured = perplexity_of(examples())
    assert measured.summed_up([{"nll": 1e6, "tokens": 2}])["answer_perplexity"] == math.inf
    found = measured.summed_up([{"nll": math.log(2) * 4, "tokens": 4}])
    assert found["answer_perplexity"] == pytest.approx(2.0)
    assert math.isnan(found["answer_perplexity_stderr"]), "of one example nothing is known"


@torch.no_grad()
def naive_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: list[int], most: int
) -> str:
    """Greedy decoding of one prompt, without padding, cache or batch."""
    ids = list(prompt)
    for _ in range(most):
        following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if following in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
            break
        ids.append(following)
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


def questions() -> list[list[dict[str, str]]]:
    """Prompts of very different lengths, so that batches are padded."""
    return [[{"role": "user", "content": "why? " * (1 + 3 * i)}] for i in range(6)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_exact_matches_are_those_of_one_question_at_a_time(
    engine: Engine, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    answers = [
        naive_answer(model, tokenizer, prompt_ids(tokenizer, answered("", asked, "")), 6)
        for asked in questions()
    ]
    assert len(set(answers)) > 1, "the answers must tell the questions apart"
    # every second reference is right; space around it must not matter
    conversations = [
        answered(f"file:{i}", asked, f" {answer}\n" if i % 2 else f"{answer} and more")
        for i, (asked, answer) in enumerate(zip(questions(), answers, strict=True))
    ]
    found = scored(engine, exact_answers("", tokenizer, conversations, 6), batch_size)
    assert found["exact_match"] == 0.5
    assert found["exact_match_stderr"] == pytest.approx(0.5 / math.sqrt(5))
    assert found["questions"] == 6


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_an_answer_ends_where_the_model_or_the_chat_template_ends_it(
    tokenizer: PreTrainedTokenizerFast, end: str
) -> None:
    """A model that says 7, ends, and says 7 again must not be judged by what follows the end."""
    model = LlamaForCausalLM(tiny.llama_config(layers=1)).eval()
    letter = tokenizer("7")["input_ids"][0]
    start = tokenizer("\n")["input_ids"][0]  # the last token of the generation prompt
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # hidden states are those of the embedding alone
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[start, 0] = 1.0
        model.model.embed_tokens.weight[letter, 1] = 1.0
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(end), 2] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[letter, 0] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(end), 1] = 1.0
        model.lm_head.weight[letter, 2] = 1.0
    right = answered("a:1", [{"role": "user", "content": "3+4="}], "7")
    wrong = answered("a:2", [{"role": "user", "content": "3+5="}], "8")
    measured = exact_answers("", tokenizer, [right, wrong, right], 9)
    assert scored(Engine(model, tokenizer), measured, 2)["exact_match"] == pytest.approx(2 / 3)


def test_scoring_leaves_the_model_as_it_was(
    engine: Engine, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scored(engine, perplexity_of(examples()), 4)
    asked = [answered("a:1", questions()[0], "x")]
    scored(engine, exact_answers("", tokenizer, asked, 3), 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_of_a_directory_are_those_of_its_model(base: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(5))
    text = {"sources": [{"path": str(tiny.write_jsonl(tmp_path / "t.jsonl", tiny.texts(4)))}]}
    found = evaluation(
        base, tmp_path, data=str(data), text={**text, "sequence_length": 32}, exact_match=True
    )
    model, tokenizer = load_model(base, "fp32").eval(), tiny.tokenizer()
    nll, tokens = 0.0, 0
    for row in tiny.questions(5):
        asked = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked)["input_ids"]
        answer = tokenizer(row["completion"] + "<|im_end|>\n")["input_ids"]
        nll += naive_nll(model, prompt + answer, len(prompt))
        tokens += len(answer)
    assert found["answer_tokens"] == tokens
    assert found["answer_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)

    joined = [
        token
        for row in tiny.texts(4)
        for token in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    pieces = [joined[start : start + 32] for start in range(0, len(joined), 32)]
    nll, tokens = sum(naive_nll(model, piece, 1) for piece in pieces), len(joined) - len(pieces)
    assert found["text_tokens"] == tokens
    assert found["text_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)

    assert found["examples"] == 5
    assert found["exact_match"] == 0.0  # random weights do not add up
    assert found["model_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["model_bytes"] == 4 * found["model_parameters"]


def test_an_adapter_changes_the_scores_and_a_foreign_one_is_refused(
    base: Path, tmp_path: Path
) -> None:
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions(5)))
    adapter, adapted = adapters.train_randomly(base, tmp_path / "adapter")
    plain = evaluation(base, tmp_path, data=data)
    found = evaluation(base, tmp_path, data=data, adapter=adapter)
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    tiny.tokenizer().save_pretrained(merged)
    expected = evaluation(merged, tmp_path, data=data)
    assert found["answer_perplexity"] == pytest.approx(expected["answer_perplexity"], rel=1e-4)
    assert found["answer_perplexity"] != pytest.approx(plain["answer_perplexity"], rel=1e-3)

    wider = tiny.write_base(tmp_path / "wider", intermediate=128)
    with pytest.raises(LoramError, match=r"evaluate.adapter .* does not match the model") as caught:
        evaluation(wider, tmp_path, data=data, adapter=adapter)
    assert len(str(caught.value).splitlines()) == 1


def test_answers_of_plain_text_cannot_be_matched(base: Path, tmp_path: Path) -> None:
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", [*tiny.questions(2), {"text": "a b"}]))
    assert evaluation(base, tmp_path, data=data)["examples"] == 3
    with pytest.raises(LoramError, match=r"evaluate.exact_match needs questions with answers"):
        evaluation(base, tmp_path, data=data, exact_match=True)


def test_nothing_to_score_is_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(LoramError, match=r"evaluate\.data must contain examples"):
        evaluation(base, tmp_path, data=str(path))
    with pytest.raises(LoramError, match=r"evaluate\.text\.sources must contain text"):
        evaluation(base, tmp_path, text={"sources": [{"path": str(path)}]})
