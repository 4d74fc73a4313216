"""Where generated answers end, and what of them is text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import loram_ray as lr
from helpers import tiny, tokenizers_of
from helpers.adapters import train_randomly
from loram_ray.config.evaluate import GenerationBenchmark
from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.templates import end_of_answer
from loram_ray.evaluation.answers import exact_answers, generated_answers
from loram_ray.evaluation.chat import Chat
from loram_ray.evaluation.chat import Sampling as ChatSampling
from loram_ray.evaluation.engine import Engine
from loram_ray.evaluation.generation import Sampling, answers, stop_tokens
from loram_ray.models.tokenizer import continuation


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("stop", [(), ("W",)])
def test_an_answer_is_the_same_alone_and_beside_a_longer_one(stop: tuple[str, ...]) -> None:
    tokenizer = tokenizers_of.bytes_first()
    assert tokenizer.pad_token_id is None and ids(tokenizer, "!") == [0]
    end = tokenizer.eos_token_id
    model = tokenizers_of.scripted(
        tokenizer, [*ids(tokenizer, "aX"), end], [*ids(tokenizer, "bYZ12345W67"), end]
    )
    engine = Engine(model, tokenizer)
    sampling = Sampling(12, stop)
    prompts = [ids(tokenizer, "a"), ids(tokenizer, "..b")]
    with torch.inference_mode():
        together = answers(engine, prompts, sampling)
        alone = [answers(engine, [prompt], sampling)[0] for prompt in prompts]
    assert together == alone == ["X", "YZ12345" if stop else "YZ12345W67"]


def test_an_end_token_that_is_no_special_one_ends_an_answer_and_is_not_seen() -> None:
    tokenizer = tokenizers_of.bytes_first()
    stop = ids(tokenizer, "#")[0]
    model = tokenizers_of.scripted(tokenizer, ids(tokenizer, "aX#Y!"))
    model.generation_config = GenerationConfig(eos_token_id=[stop, tokenizer.eos_token_id])
    with torch.inference_mode():
        assert answers(Engine(model, tokenizer), [ids(tokenizer, "a")], Sampling(9)) == ["X"]


def test_a_continuation_keeps_its_indentation_under_sentencepiece() -> None:
    tokenizer = tokenizers_of.llama2()
    program = "    re a\n  re"
    joint = tokenizer("def f():\n" + program)["input_ids"]
    prompt = tokenizer("def f():\n")["input_ids"]
    new = joint[len(prompt) :]
    assert joint[: len(prompt)] == prompt
    assert tokenizer.decode(new) == program[1:], "decoded alone it loses a space"
    for begin in range(len(new) + 1):
        text = continuation(tokenizer, [*prompt, *new[:begin]], new[begin:])
        assert tokenizer.decode([*prompt, *new[:begin]], skip_special_tokens=True) + text == (
            "def f():\n" + program
        )


def test_programs_and_stop_texts_are_decoded_behind_their_prompts() -> None:
    tokenizer = tokenizers_of.llama2()
    indent, space, word, a = tokenizer.convert_tokens_to_ids(["▁▁▁▁", "▁", "re", "▁a"])
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    model = tokenizers_of.scripted(
        tokenizer, [newline, indent, word, a, space, tokenizer.eos_token_id]
    )
    prompt = tokenizer("f:\n")["input_ids"]
    engine = Engine(model, tokenizer)
    with torch.inference_mode():
        assert answers(engine, [prompt], Sampling(9)) == ["    re a "]
        assert answers(engine, [prompt], Sampling(9, (" a",))) == ["    re"]
        assert answers(engine, [prompt], Sampling(9, ("    ",))) == [""]
    shown: list[str] = []
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    answer = Chat(model, tokenizer, ChatSampling(9)).ask("f:", shown.append)
    assert answer == "    re a "
    assert "".join(shown) == answer + "\n" and len(shown) > 2


def test_a_character_whose_bytes_lie_on_both_sides_is_the_answers() -> None:
    tokenizer = tiny.tokenizer()
    prompt, rest = ids(tokenizer, "né")[:-1], ids(tokenizer, "né")[-1:]
    assert continuation(tokenizer, prompt, rest) == "é"


CHATML_END = "<|im_end|>"
CLOSINGS = {
    "text in front": ("[/A]</s>", {}, "</s>"),
    "a space in front": (" </s>", {}, "</s>"),
    "special as an added token alone": ("<end_of_turn>\n", {"special": True}, "<end_of_turn>"),
    "added and not special": ("<end_of_turn>\n", {"special": False}, "<end_of_turn>"),
    "nothing": ("\n\n", {}, None),
}


@pytest.mark.parametrize("kind", CLOSINGS)
def test_the_token_that_closes_an_answer_is_found(kind: str, tmp_path: Path) -> None:
    written, added, closing = CLOSINGS[kind]
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    if added:
        tokenizer.add_tokens(["<end_of_turn>"], special_tokens=added["special"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}" + written + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    if added:
        assert tokenizer.convert_tokens_to_ids("<end_of_turn>") not in loaded.all_special_ids
    found = end_of_answer(loaded)
    assert found == (None if closing is None else loaded.convert_tokens_to_ids(closing))


def test_a_token_that_the_models_configuration_lists_closes_an_answer() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}#{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    mark = ids(tokenizer, "#")[0]
    assert end_of_answer(tokenizer) is None
    assert end_of_answer(tokenizer, [mark]) == mark
    model = tokenizers_of.scripted(tokenizer, ids(tokenizer, "ab"))
    model.generation_config = GenerationConfig(eos_token_id=mark)
    assert stop_tokens(model, tokenizer) == sorted({tokenizer.eos_token_id, mark})


def test_chat_ends_at_a_closing_token_that_only_the_added_tokens_know(tmp_path: Path) -> None:
    """As Gemma 3's and Phi-3's tokenizers are, with the model's own list or without."""
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    closing = tokenizer.convert_tokens_to_ids(CHATML_END)
    assert closing not in tokenizer.all_special_ids
    model = tokenizers_of.scripted(
        tokenizer, [*ids(tokenizer, "\n2"), closing, *ids(tokenizer, "next?")]
    )
    chat = Chat(model, tokenizer, ChatSampling(20))
    assert chat.ask("1+1=", lambda _: None) == "2"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""What Qwen 3's template does with the last answer."""


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<think>\n\n</think>\n\n7", True),
        ("7", True),
        ("<think>\n3 and 4 is 7\n</think>\n\n7", True),
        ("<think>\n7\n</think>\n\n8", False),
        ("<think>\n\n</think>\n\n", False),
    ],
)
def test_what_the_template_writes_before_an_answer_is_no_part_of_it(said: str, right: bool) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = THINKING
    asked = Conversation(
        "a:1", [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "7"}]
    )
    measured = exact_answers("", tokenizer, [asked], 9)
    found = measured.judged(measured.items[0], said)
    assert found["exact_match"] is right
    assert found["last_number_match"] is right


def test_thoughts_that_the_prompt_opens_are_no_part_of_a_benchmarks_answer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"question": "3+4=", "answer": "7"}])
    config = GenerationBenchmark(
        kind="generation", data=str(data), prompt="{question}", answer="answer", chat=True
    )
    measured = generated_answers("sums", tokenizer, config, "evaluate.benchmarks.0", 0.0)
    for said, right in (("3 and 4\n</think>\n\n7", True), ("7\n</think>\n8", False), ("7", True)):
        assert measured.judged(measured.items[0], said)["exact_match"] is right


def test_what_was_learnt_word_for_word_matches_and_is_generated(tmp_path: Path) -> None:
    """Tokens of a learnt answer, its template's own text and end among them, score 1."""
    from loram_ray.corpus.examples import tokenise_row

    call = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
    calling = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bracketed = tiny.CHAT_TEMPLATE.replace(
        "<|im_end|>", "{% if m is defined %}{% endif %}[end]<|im_end|>"
    )
    cases = [
        (THINKING, {"content": "7"}),
        (THINKING, {"content": "7", "reasoning_content": "3 and 4"}),
        (calling, {"content": "", "tool_calls": [call]}),
        (bracketed, {"content": "7"}),
    ]
    for template, answer in cases:
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", **answer}]
        asked = Conversation("a:1", messages)
        [example] = tokenise_row(tokenizer, asked, 512)  # type: ignore[misc]
        [(begin, end)] = example.learnt
        tokens = example.input_ids[begin:end]
        closing = tokenizer.convert_tokens_to_ids(CHATML_END)
        said = tokenizer.decode(tokens[: tokens.index(closing)], skip_special_tokens=True)
        measured = exact_answers("", tokenizer, [asked], 99)
        assert measured.items[0].prompt == example.input_ids[:begin]
        assert measured.judged(measured.items[0], said)["exact_match"], said


def test_merging_lists_the_learnt_closing_token_where_generation_ends(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    adapter, _ = train_randomly(base, tmp_path / "adapter")
    closing = tiny.tokenizer().convert_tokens_to_ids(CHATML_END)
    path = base / "generation_config.json"
    before = json.loads(path.read_text())
    cases = {"listed": before, "absent": None, "several": {**before, "eos_token_id": [0, 7]}}
    for name, settings in cases.items():
        path.unlink(missing_ok=True)
        if settings is not None:
            path.write_text(json.dumps(settings))
        output = tmp_path / name
        lr.merge(lr.MergeConfig(base=str(base), adapter=adapter, output=output))
        model = AutoModelForCausalLM.from_pretrained(output)
        listed = [0, 7] if name == "several" else [0]
        assert model.generation_config.eos_token_id == [*listed, closing]
    path.write_text(json.dumps({**before, "eos_token_id": [0, closing]}))
    lr.merge(lr.MergeConfig(base=str(base), adapter=adapter, output=tmp_path / "known"))
    assert (tmp_path / "known" / path.name).read_text() == path.read_text()
