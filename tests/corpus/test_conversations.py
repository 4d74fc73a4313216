"""Rows of conversations: tools, weights, columns that mean something, and where answers begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny, tokenizers_of
from loram_ray.config import TrainConfig
from loram_ray.corpus.conversations import Conversation, Document, conversations, parse_row
from loram_ray.corpus.examples import Example, tokenise_row, tokenised_rows
from loram_ray.corpus.read import BadRow
from loram_ray.corpus.templates import prompt_ids
from loram_ray.finetuning.preview import preview
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import continuation

USER = {"role": "user", "content": "weather?"}
ANSWER = {"role": "assistant", "content": "Rain."}
SKY = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "sky", "arguments": '{"city": "Oslo"}'}}
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + tiny.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}",
    )
)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def parsed(row: dict[str, Any]) -> Conversation:
    found = parse_row("file:1", row)
    assert isinstance(found, Conversation), found
    return found


def examples_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[Example]:
    found = tokenise_row(tokenizer, parsed(row), 4000)
    assert isinstance(found, list), found
    return found


def learnt(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> str:
    [example] = examples_of(tokenizer, row)
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def reason(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> str:
    found = parse_row("file:1", row)
    if not isinstance(found, BadRow):
        found = tokenise_row(tokenizer, found, 4000)  # type: ignore[assignment]
    assert isinstance(found, BadRow), found
    return found.reason


TOOL_ROW: dict[str, Any] = {
    "messages": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "name": "sky", "content": "rain"},
        ANSWER,
    ],
    "tools": [SKY],
}


@pytest.mark.parametrize("written", ["objects", "text", "table"])
def test_tools_and_calls_reach_the_template(written: str, tmp_path: Path) -> None:
    """In each form they come in, the example is transformers' own rendering."""
    tokenizer = with_template(TOOLS)
    row = {**TOOL_ROW, "tools": json.dumps([SKY])} if written == "text" else TOOL_ROW
    if written == "table":
        other = {"messages": [USER, ANSWER], "tools": None}  # makes nulls of the first's keys
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([row, other]), path)
    else:
        path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    first = next(iter(conversations(str(path), "train.data")))
    assert isinstance(first, Conversation)
    call = {**CALL, "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        TOOL_ROW["messages"][2],
        ANSWER,
    ]
    text = tokenizer.apply_chat_template(messages, tools=[SKY], tokenize=False)
    [example] = tokenise_row(tokenizer, first, 4000)  # type: ignore[misc]
    assert tokenizer.decode(example.input_ids) == text
    assert '"sky"' in text.partition("<|im_end|>")[0]
    assert [label for label in example.labels if label != IGNORED] == tokenizer(
        '<call>sky {"city": "Oslo"}</call><|im_end|>\nRain.<|im_end|>\n'
    )["input_ids"]
    asked = tokenizer.apply_chat_template(
        messages[:-1], tools=[SKY], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt_ids(tokenizer, first) == asked == example.input_ids[: len(asked)]


def test_a_template_that_prints_arguments_as_they_are_is_given_json() -> None:
    tokenizer = with_template(TOOLS.replace(" | tojson }}</call>", " }}</call>"))
    assert '<call>sky {"city": "Oslo"}</call>' in learnt(tokenizer, TOOL_ROW)


def test_a_preview_shows_the_tools(tmp_path: Path) -> None:
    with_template(TOOLS).save_pretrained(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", [TOOL_ROW])
    config = TrainConfig(model=tmp_path / "model", data=str(data), output=tmp_path / "out")
    [shown] = preview(config, 1)
    assert '"sky"' in "".join(shown.pieces[:60])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([None, None], "one<|im_end|>\ntwo<|im_end|>\n"),
        ([{"weight": 0}, {"weight": 1}], "two<|im_end|>\n"),
        ([{"weight": 0.0}, {}], "two<|im_end|>\n"),
        ([{"train": False}, {"train": True}], "two<|im_end|>\n"),
        ([{"weight": 1}, {"weight": 0}], "one<|im_end|>\n"),
    ],
)
def test_weights_of_messages_say_what_is_learnt(weights: list[Any], expected: str) -> None:
    first, second = (weight or {} for weight in weights)
    messages = [
        {**USER, "weight": 0},
        {"role": "assistant", "content": "one", **first},
        USER,
        {"role": "assistant", "content": "two", **second},
    ]
    tokenizer = tiny.tokenizer()
    assert learnt(tokenizer, {"messages": messages}) == expected
    [example] = examples_of(tokenizer, {"messages": messages})
    plain = [{k: m[k] for k in ("role", "content")} for m in messages]
    whole = tokenizer.apply_chat_template(plain, return_dict=True)["input_ids"]
    assert example.input_ids == whole[: len(example.input_ids)]


def test_other_forms_of_a_conversation_are_read_as_their_trainers_read_them() -> None:
    tokenizer = tiny.tokenizer()

    def text(row: dict[str, Any]) -> str:
        [example] = examples_of(tokenizer, row)
        return str(tokenizer.decode(example.input_ids))

    pair = {"instruction": "weather?", "output": "Rain."}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "Be brief."}

    def rendered(*messages: dict[str, str]) -> str:
        return str(tokenizer.apply_chat_template([*messages], tokenize=False))

    assert text({**pair, "system": "Be brief."}) == rendered(system, USER, ANSWER)
    assert text({"messages": [USER, ANSWER], "system": "Be brief."}) == rendered(
        system, USER, ANSWER
    )
    history = {**pair, "history": [["a", "b"]], "system": ""}
    assert text(history) == rendered(*turns, USER, ANSWER)
    assert learnt(tokenizer, history) == "b<|im_end|>\nRain.<|im_end|>\n"
    lists = {"prompt": [*turns, USER], "completion": [ANSWER]}  # TRL: the completion is learnt
    assert text(lists) == rendered(*turns, USER, ANSWER)
    assert learnt(tokenizer, lists) == "Rain.<|im_end|>\n"
    parts = [{"type": "text", "text": "weath"}, {"type": "text", "text": "er?"}]
    assert text({"messages": [{"role": "user", "content": parts}, ANSWER]}) == rendered(
        USER, ANSWER
    )


def test_arguments_of_the_template_are_given_to_it() -> None:
    template = (
        "{% for d in documents or [] %}<doc>{{ d.text }}</doc>{% endfor %}"
        "{% if mood is defined %}[{{ mood }}]{% endif %}" + tiny.CHAT_TEMPLATE
    )
    row = {"prompt": "q", "completion": "a", "chat_template_kwargs": '{"mood": "calm"}'}
    [example] = examples_of(with_template(template), {**row, "documents": [{"text": "x"}]})
    assert tiny.tokenizer().decode(example.input_ids).startswith("<doc>x</doc>[calm]<|im_start|>")


MESSAGES = [USER, ANSWER]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools that the template has no place for": (
        {"messages": MESSAGES, "tools": [SKY]},
        "the chat template does not use 'tools'",
    ),
    "calls that it has no place for": (
        {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]},
        "the chat template does not use 'tool_calls'",
    ),
    "an old call": (
        {"messages": [USER, {**ANSWER, "function_call": {"name": "sky"}}]},
        "the chat template does not use 'function_call'",
    ),
    "thoughts": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
        "the chat template does not use 'reasoning_content'",
    ),
    "other thoughts": (
        {"messages": [USER, {**ANSWER, "thinking": "hm"}]},
        "the chat template does not use 'thinking'",
    ),
    "a name": (
        {"messages": [{**USER, "name": "Ada"}, ANSWER]},
        "the chat template does not use the user's 'name'",
    ),
    "an argument": (
        {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
        "the chat template does not use 'enable_thinking'",
    ),
    "an argument of transformers'": (
        {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}},
        "'chat_template_kwargs' must not contain 'tokenize'",
    ),
    "documents": (
        {"messages": MESSAGES, "documents": [{"text": "x"}]},
        "the chat template does not use 'documents'",
    ),
    "tools that are no JSON": ({"messages": MESSAGES, "tools": "[{"}, "its 'tools'"),
    "tools that are names": (
        {"messages": MESSAGES, "tools": ["sky"]},
        "its 'tools' must be a list of JSON schemas",
    ),
    "half a weight": (
        {"messages": [USER, {**ANSWER, "weight": 0.5}]},
        "a message's weight must be 0 or 1, got 0.5",
    ),
    "no weight": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant message has"),
    "a question that is learnt": (
        {"messages": [{**USER, "train": True}, ANSWER]},
        "only assistant messages can have a loss",
    ),
    "parts of words": ({"messages": [USER, {**ANSWER, "train_detail": [{}]}]}, "'train_detail'"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        "only text is supported, but a message has a part",
    ),
    "arguments that are no object": (
        {
            "messages": [
                USER,
                {**ANSWER, "tool_calls": [{"function": {"name": "a", "arguments": 3}}]},
            ]
        },
        "a call's 'arguments' must be an object, got 3",
    ),
    "a call without a name": (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]},
        "each of 'tool_calls' must have",
    ),
    "an answer of nobody": (
        {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]},
        "roles out of order",
    ),
    "another system message": (
        {"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "b"},
        "its 'system' differs from the system message",
    ),
    "a history of words": (
        {"instruction": "a", "output": "b", "history": ["a"]},
        "its 'history' must be",
    ),
    **{
        name: (
            {"prompt": "a", "completion": "b", name: value},
            f"its '{name}' cannot be trained on",
        )
        for name, value in {
            "rejected": "c",
            "chosen": "b",
            "label": False,
            "kto_tag": True,
            "images": ["a.png"],
            "videos": ["a.mp4"],
            "audios": ["a.wav"],
            "functions": [{"name": "sky"}],
            "enable_thinking": True,
            "reasoning_content": "hm",
            "completion_mask": [0, 1],
            "weight": 0,
            "train": False,
        }.items()
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_left_out_in_silence_is_refused_by_name(kind: str) -> None:
    row, expected = REFUSED[kind]
    found = reason(tiny.tokenizer(), row)
    assert expected in found and "\n" not in found


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_a_message_out_is_refused(role: str) -> None:
    deaf = with_template(
        "{% for m in messages if m.role != '" + role + "' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}!{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = {
        "system": {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        "tool": {"messages": TOOL_ROW["messages"]},
    }
    assert f"does not use the {role}'s content" in reason(deaf, rows[role])


def test_ordinary_columns_and_empty_ones_are_passed_over() -> None:
    tokenizer = tiny.tokenizer()
    plain = {"prompt": "a", "completion": "b"}
    extra = {
        **{"id": 7, "source": "web", "score": 0.5, "label": 1, "split": "train", "difficulty": "x"},
        **{"tools": None, "images": [], "rejected": None, "chosen": "", "history": [], "weight": 1},
        **{"chat_template_kwargs": {}, "documents": ["a", "b"], "system": ""},
    }
    assert examples_of(tokenizer, {**plain, **extra}) == examples_of(tokenizer, plain)
    found = parse_row("file:1", {"text": "a", "image": "a.png", "label": True})
    assert found == Document("file:1", "a")
    of_message = {"id": 3, "timestamp": 5, "weight": None, "name": None, "tool_calls": None}
    row = {"messages": [{**USER, **of_message}, {**ANSWER, **of_message, "tool_calls": []}]}
    [example] = examples_of(tokenizer, row)
    assert example.input_ids == examples_of(tokenizer, {"messages": MESSAGES})[0].input_ids


ANSWERS = ("    return x + 1", "\n\nHello.", " a", "Hello.", "\tx", "\n    a\n b")


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", ["bytes", "joining", "llama2"])
def test_an_answer_is_learnt_behind_the_tokens_that_generation_begins_with(
    kind: str, answer: str
) -> None:
    tokenizer = {
        "bytes": tiny.tokenizer,
        "joining": tokenizers_of.joining,
        "llama2": tokenizers_of.llama2,
    }[kind]()
    if kind == "llama2":
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}Q: {{ m.content }}\nA:"
            "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
    row = {
        "messages": [USER, {"role": "assistant", "content": answer}] * 2,
    }
    conversation = parsed(row)
    found = examples_of(tokenizer, row)
    text = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    written = 0
    for example in found:
        for begin, end in example.learnt:
            count = 2 * written + 1
            asked = tokenizer.apply_chat_template(
                conversation.messages[:count], tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            assert example.input_ids[:begin] == prompt
            tokens = example.input_ids[begin:end]
            said = continuation(tokenizer, prompt, tokens, skip_special_tokens=False)
            assert said.startswith(answer)
            assert text.startswith(asked + said)
            written += 1
    assert written == 2
    if kind == "joining" and answer in ANSWERS[:3]:
        assert len(found) == 2, "each has a prompt of its own"


def test_where_nothing_joins_a_conversation_is_one_example_as_it_is_tokenised_whole() -> None:
    tokenizer = tokenizers_of.joining()
    messages = [USER, ANSWER, USER, ANSWER]
    [example] = examples_of(tokenizer, {"messages": messages})
    assert len(example.learnt) == 2
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert example.input_ids == whole


def test_a_template_that_opens_thoughts_in_the_prompt_is_refused_with_the_remedy() -> None:
    tokenizer = with_template(
        tiny.CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    )
    found = reason(tokenizer, {"messages": MESSAGES})
    assert "renders '<think>\\n' without the answer, but 'Rain." in found
    assert "set chat_template to a template that renders the prompt identically" in found


def test_a_template_that_raises_anything_makes_a_bad_row(tmp_path: Path) -> None:
    for fault in ("{{ 1 // 0 }}", "{{ messages[9].content }}", "{{ messages | sum }}"):
        found = reason(with_template(fault), {"messages": MESSAGES})
        assert found.startswith("the chat template rejects it") and "\n" not in found


def test_a_named_template_for_tools_is_used(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": TOOLS}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [TOOL_ROW, {"messages": MESSAGES}])
    rows = list(tokenised_rows(tokenizer, str(path), 4000, "train.data"))
    assert not any(isinstance(row, BadRow) for row in rows)
