"""Fine-tuning examples: where the loss is, which rows are bad, and how they are reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers import tiny
from loram_ray.corpus.batches import padded
from loram_ray.corpus.conversations import Conversation, Document, conversations
from loram_ray.corpus.examples import (
    Example,
    ExampleTable,
    load_examples,
    tokenise_row,
)
from loram_ray.corpus.read import BadRow
from loram_ray.errors import LoramError
from loram_ray.losses import IGNORED

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Peru, ¿cómo?"},
        {"role": "assistant", "content": "Lima — naturally."},
    ]
}
PAIR = {"prompt": "2+3=", "completion": "5"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def read(
    path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int = 512, share: float = 0.0
) -> list[tuple[Conversation | Document, Example]]:
    return list(load_examples(tokenizer, str(path), max_length, share, "train.data"))


def labelled(tokenizer: PreTrainedTokenizerFast, example: Example, tmp_path: Path) -> str:
    """Text of the tokens that carry a label in what a trainer sees."""
    table = ExampleTable.write(iter([example]), tmp_path / "one.arrow")
    row = table[0]
    return str(tokenizer.decode([token for token in row["labels"] if token != IGNORED]))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (
            PAIR,
            "<|im_start|>user\n2+3=<|im_end|>\n<|im_start|>assistant\n",
            "5<|im_end|>\n",
        ),
        (
            CHAT,
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nCapital of France?<|im_end|>\n"
            "<|im_start|>assistant\nParis.<|im_end|>\n"
            "<|im_start|>user\nAnd of Peru, ¿cómo?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Paris.<|im_end|>\nLima — naturally.<|im_end|>\n",
        ),
    ],
    ids=["prompt and completion", "system and several turns"],
)
def test_the_loss_is_on_the_answers_and_their_ends_alone(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    row: dict[str, object],
    prompt: str,
    answer: str,
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [row])
    [(_, example)] = read(path, tokenizer)
    assert tokenizer.decode(example.input_ids) == prompt + answer.removeprefix("Paris.<|im_end|>\n")
    assert labelled(tokenizer, example, tmp_path) == answer
    # the end token must be learnt, or the model never stops
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in example.input_ids[-2:]


def test_special_tokens_are_single_ids_and_none_is_added(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR])
    [(_, example)] = read(path, tokenizer)
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert example.input_ids[0] == start
    assert (example.input_ids.count(start), example.input_ids.count(end)) == (2, 2)


def test_messages_and_prompt_with_completion_are_the_same_example(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR, {"messages": messages}])
    (_, first), (_, second) = read(path, tokenizer)
    assert first.input_ids == second.input_ids
    assert first.learnt == second.learnt


def test_a_long_example_is_cut_on_the_right(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = {"prompt": "count", "completion": "one two three four five"}
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [row])
    [(_, whole)] = read(path, tokenizer)
    [(_, cut)] = read(path, tokenizer, max_length=whole.learnt[0][0] + 7)
    assert cut.input_ids == whole.input_ids[: whole.learnt[0][0] + 7]
    assert cut.learnt[0][0] == whole.learnt[0][0]
    assert labelled(tokenizer, cut, tmp_path) == "one two"


def test_an_example_whose_answer_is_cut_away_is_bad(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR])
    [(_, whole)] = read(path, tokenizer)
    [(_, one)] = read(path, tokenizer, max_length=whole.learnt[0][0] + 1)
    assert labelled(tokenizer, one, tmp_path) == "5"
    with pytest.raises(LoramError, match=r"data.jsonl:1: no answer token fits into max_length"):
        read(path, tokenizer, max_length=whole.learnt[0][0])


GOOD = json.dumps(PAIR)
BAD_LINES = {
    "cut in the middle": (GOOD[:20], "not JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "no known field": ('{"words": "x"}', "it must have text in 'messages'"),
    "completion missing": ('{"prompt": "x"}', "it must have text in 'messages'"),
    "completion no text": ('{"prompt": "x", "completion": 5}', "it must have text in 'messages'"),
    "empty completion": ('{"prompt": "x", "completion": " "}', "no answer"),
    "messages no list": ('{"messages": "hello"}', "'messages' must be a list"),
    "one message": (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "'messages' must be a list",
    ),
    "unknown role": (
        '{"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        "a message's role must be one of system, user, assistant",
    ),
    "no role": (
        '{"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}',
        "a message's role must be one of",
    ),
    "content no text": (
        '{"messages": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "y"}]}',
        "a message's content must be text",
    ),
    "question last": (
        '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
        "no answer: the last message must be the assistant's",
    ),
    "empty answer": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}',
        "no answer",
    ),
    "half a surrogate pair": ('{"prompt": "\\ud83d", "completion": "y"}', "not JSON"),
    "nested too deeply": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_row_is_refused_with_its_line_and_reason(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    line, reason = BAD_LINES[kind]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(LoramError) as caught:
        read(path, tokenizer)
    message = str(caught.value)
    assert message.startswith("train.max_bad_share must be at least the share of bad rows, got 0.0")
    assert f"1 bad of 4: {path}:3: {reason}" in message
    assert len(message.splitlines()) == 1


def test_invalid_utf8_is_a_bad_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff", "completion": "y"}\n')
    with pytest.raises(LoramError, match=r"data.jsonl:2: not JSON"):
        read(path, tokenizer)


def test_bad_rows_up_to_the_share_are_skipped_and_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{{\n{GOOD}\n{GOOD}\n")
    rows = read(path, tokenizer, share=0.25)
    assert [conversation.place for conversation, _ in rows] == [f"{path}:{i}" for i in (1, 3, 4)]
    told = capsys.readouterr().err
    assert "skipped 1 bad rows of 4" in told
    assert f"{path}:2: not JSON" in told
    with pytest.raises(LoramError, match="got 0.24 with 1 bad of 4"):
        read(path, tokenizer, share=0.24)


def test_only_the_first_of_many_bad_rows_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 9 + f"{GOOD}\n")
    with pytest.raises(LoramError, match=r"9 bad of 10: .*data.jsonl:5: .*; and 4 more; fix"):
        read(path, tokenizer, share=0.5)


def test_blank_lines_hold_no_row_but_count_as_lines(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n  \n\n")
    rows = read(path, tokenizer)
    assert [conversation.place for conversation, _ in rows] == [f"{path}:1", f"{path}:3"]


def test_the_last_line_needs_no_newline(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}")
    assert len(read(path, tokenizer)) == 2


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_data_without_examples_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(
        LoramError, match=r"train.data must contain examples, .* has no usable ones"
    ):
        read(path, tokenizer)


def test_data_of_bad_rows_alone_are_refused_whatever_the_share(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n")
    with pytest.raises(LoramError, match=r"train.data must contain examples"):
        read(path, tokenizer, share=1.0)


def test_missing_data_and_other_kinds_of_files_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(LoramError, match=r"train.data must name files .*absent.jsonl has none"):
        read(tmp_path / "absent.jsonl", tokenizer)
    for name in ("data.doc", "data.xlsx"):
        (tmp_path / name).write_text("x")
        with pytest.raises(LoramError, match=f"train.data must name .*{name}; convert it"):
            read(tmp_path / name, tokenizer)


def test_a_directory_s_files_are_read_in_order(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name in ("b", "a"):
        rows = [{"prompt": name, "completion": str(i)} for i in range(2)]
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    places = [conversation.place for conversation, _ in read(tmp_path, tokenizer)]
    assert [Path(place).name for place in places] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.jsonl:1",
        "b.jsonl:2",
    ]


def test_a_limit_takes_the_first_rows_and_looks_at_no_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n" + "{\n" * 5)
    rows = list(load_examples(tokenizer, str(path), 512, 0.0, "evaluate.data", limit=2))
    assert [conversation.place for conversation, _ in rows] == [f"{path}:1", f"{path}:3"]
    assert len(list(conversations(str(path), "evaluate.data", limit=3))) == 3


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR])
    tokenizer.chat_template = None
    with pytest.raises(LoramError, match=r"train needs a chat template .* set train.chat_template"):
        read(path, tokenizer)


def test_what_the_chat_template_refuses_is_a_bad_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR, CHAT])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    with pytest.raises(LoramError, match=r"data.jsonl:2: .*template rejects it \(no system role"):
        read(path, tokenizer)


def test_a_template_that_does_not_begin_the_answer_with_its_prompt_is_told(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    conversation = Conversation(
        "file:8", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    )
    bad = tokenise_row(tokenizer, conversation, 512)
    assert isinstance(bad, BadRow)
    assert str(bad) == (
        "file:8: the chat template's prompt is not a prefix of prompt and answer: it renders "
        "'<answer>' without the answer, but '[assistant]y' with it; set chat_template to a "
        "template that renders the prompt identically"
    )


def test_a_table_gives_back_the_examples_and_labels_nothing_else(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(
            f"f:{i}",
            torch.randint(3, 300, (4 + i % 9,), generator=generator).tolist(),
            ((i % 4, 4 + i % 9),),
        )
        for i in range(2500)  # more than two batches of the file
    ]

    def once() -> Iterator[Example]:
        yield from examples

    table = ExampleTable.write(once(), tmp_path / "examples.arrow")
    assert len(table) == len(examples)
    for opened in (table, ExampleTable(tmp_path / "examples.arrow")):
        for index in (0, 1, 1023, 1024, 2047, 2499):
            example, row = examples[index], opened[index]
            assert row["input_ids"] == example.input_ids
            [(begin, end)] = example.learnt
            assert row["labels"] == [
                token if begin <= place < end else IGNORED
                for place, token in enumerate(example.input_ids)
            ]


def test_a_table_is_read_from_disk_and_not_held_in_memory(tmp_path: Path) -> None:
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    examples = (Example("f", [7] * 1000, ((1, 1000),)) for _ in range(2000))
    table = ExampleTable.write(examples, tmp_path / "examples.arrow")
    assert (tmp_path / "examples.arrow").stat().st_size > 8_000_000
    assert table[1999]["input_ids"] == [7] * 1000
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_padding_is_on_the_right_and_under_the_mask() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [9, 10], "labels": [IGNORED, 10]},
    ]
    batch = padded(rows, padding=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99], [9, 10, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, 6, 7],
        [IGNORED, IGNORED, IGNORED],  # nothing predicts a first token
        [IGNORED, 10, IGNORED],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_equal_to_a_real_token_hides_no_label() -> None:
    batch = padded([{"input_ids": [4, 99], "labels": [IGNORED, 99]}], padding=99)
    assert batch["labels"].tolist() == [[IGNORED, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1]]


ALPACA = {"instruction": "Add.", "input": "2+3", "output": "5"}


def test_alpaca_s_input_follows_the_instruction(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pair = {"prompt": "Add.\n\n2+3", "completion": "5"}
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [ALPACA, pair])
    (_, first), (_, second) = read(path, tokenizer)
    assert (first.input_ids, first.learnt) == (second.input_ids, second.learnt)


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_examples(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [ALPACA, {"instruction": 'Say "é,\nso".', "input": "", "output": "é,\tso"}] * 300
    expected = read(tiny.write_jsonl(tmp_path / "data.jsonl", rows), tokenizer)
    path = tmp_path / f"other.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with path.open("w", newline="") as file:
            delimiter = "," if kind == "csv" else "\t"
            writer_of_rows = csv.DictWriter(file, list(ALPACA), delimiter=delimiter)
            writer_of_rows.writeheader()
            writer_of_rows.writerows(rows)
    found = read(path, tokenizer)
    assert [e.input_ids for _, e in found] == [e.input_ids for _, e in expected]
    assert [e.learnt for _, e in found] == [e.learnt for _, e in expected]


def test_messages_in_parquet_are_those_of_json_lines(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    [(_, expected)] = read(tiny.write_jsonl(tmp_path / "data.jsonl", [CHAT]), tokenizer)
    pq.write_table(pa.Table.from_pylist([CHAT]), tmp_path / "data.parquet")
    [(_, found)] = read(tmp_path / "data.parquet", tokenizer)
    assert found.input_ids == expected.input_ids and found.learnt == expected.learnt


def test_a_text_is_cut_into_pieces_that_hold_all_of_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "one two three four five six seven eight nine"
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [{"text": text}])
    tokenizer.chat_template = None  # which a text needs not
    examples = [example for _, example in read(path, tokenizer, max_length=8)]
    ids = [token for example in examples for token in example.input_ids]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [*expected, tokenizer.eos_token_id]
    assert len(examples) == -(-len(ids) // 8)
    assert all(e.learnt == ((1, len(e.input_ids)),) for e in examples)


def test_a_template_that_renders_the_last_answer_otherwise_ends_the_others_at_their_mark(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    thought = "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + thought + "{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    [example] = tokenise_row(tokenizer, Conversation("f:1", CHAT["messages"]), 512)  # type: ignore
    learnt = [tokenizer.decode(example.input_ids[a:b]) for a, b in example.learnt]
    assert learnt == ["Paris.<|im_end|>", "<think></think>Lima — naturally.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("roles", "wrong"),
    [("uua", "message 2 has the role user"), ("aua", "message 1 has"), ("susa", "message 3 has")],
)
def test_roles_out_of_order_are_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, roles: str, wrong: str
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}])
    with pytest.raises(LoramError, match=rf"data.jsonl:1: roles out of order: .*{wrong}"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"prompt,completion\na,b\nc\n", ":3: it has 1 columns, the header has 2"),
        (b"prompt,completion\na,b,c\n", ":2: it has 3 columns, the header has 2"),
        (b'prompt,completion\n"a\n\nb",c\nd,\xff\n', ":5: not UTF-8"),
        (b"question,answer\na,b\n", ":2: it must have text in 'messages'"),
    ],
    ids=["too few", "too many", "not text, after lines in quotes", "other columns"],
)
def test_a_bad_row_of_a_csv_file_is_told_with_its_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    with pytest.raises(LoramError) as caught:
        read(path, tokenizer)
    assert f"{path}{reason}" in str(caught.value)


def test_parquet_without_a_known_column_is_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["x"] * 9}), tmp_path / "data.parquet")
    with pytest.raises(
        LoramError, match=r"data.parquet: it has none of the columns messages, prompt, "
    ):
        read(tmp_path / "data.parquet", tokenizer)


def test_a_folder_s_json_is_no_data_and_a_json_file_is(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny.write_jsonl(tmp_path / "data.jsonl", [PAIR])
    (tmp_path / "config.json").write_text(json.dumps([PAIR, PAIR]))
    assert len(read(tmp_path, tokenizer)) == 1
    assert len(read(tmp_path / "config.json", tokenizer)) == 2
