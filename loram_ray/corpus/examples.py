"""Fine-tuning examples: chat or prompt and completion, with loss on the answer alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jinja2 import TemplateError

from loram_ray.corpus.files import list_files, read_lines
from loram_ray.corpus.read import BadRow, parse_object, refuse_bad_rows
from loram_ray.errors import LoramError
from loram_ray.losses import IGNORED

_ROLES = ("system", "user", "assistant")
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Conversation:
    """A prompt and the answer to learn.

    Attributes:
        place: ``file:line``.
        prompt: messages before the answer, in OpenAI's form.
        answer: text of the last assistant message.
    """

    place: str
    prompt: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Example:
    """A tokenised conversation.

    Attributes:
        place: ``file:line``.
        input_ids: prompt and answer.
        prompt_length: tokens of the prompt, which carry no loss.
    """

    place: str
    input_ids: list[int]
    prompt_length: int


def conversations(data: str, key: str, limit: int | None = None) -> Iterator[Conversation | BadRow]:
    """Yield the conversations of JSON-lines files, and the rows that hold none.

    Args:
        data: a file, a directory or a glob.
        key: configuration key, for messages.
        limit: rows read at most.
    """
    read = 0
    for file in list_files(data, key):
        if file.form.kind != ".jsonl":
            raise LoramError(f"{key} must name JSON lines (.jsonl), got {file.path}; convert it")
        for line, raw in enumerate(read_lines(file.path), start=1):
            if not raw.strip():
                continue
            if limit is not None and read >= limit:
                return
            read += 1
            yield parse_conversation(raw, f"{file.path}:{line}")


def parse_conversation(raw: bytes, place: str) -> Conversation | BadRow:
    """Read ``messages`` or ``prompt`` and ``completion`` from one JSON line."""
    row = parse_object(raw, place)
    if isinstance(row, BadRow):
        return row
    messages = row.get("messages")
    if messages is None:
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return BadRow(place, "neither 'messages' nor 'prompt' and 'completion'")
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    problem = _problem_with(messages)
    if problem:
        return BadRow(place, problem)
    assert isinstance(messages, list)
    return Conversation(place, messages[:-1], messages[-1]["content"])


def _problem_with(messages: object) -> str | None:
    if not isinstance(messages, list) or len(messages) < 2:
        return "'messages' must be a list of at least a user's and an assistant's message"
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"a message's role must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return "a message's content must be text"
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "no answer: the last message must be the assistant's, with text"
    return None


def tokenise_conversation(
    tokenizer: Any, conversation: Conversation, max_length: int
) -> Example | BadRow:
    """Apply the chat template; the answer's tokens are those after the generation prompt.

    Examples longer than ``max_length`` are cut on the right; one whose whole answer is cut away is
    a bad row.
    """
    answer = {"role": "assistant", "content": conversation.answer}
    try:
        prompt = prompt_ids(tokenizer, conversation)
        whole = _template(tokenizer, [*conversation.prompt, answer], add_generation_prompt=False)
    except TemplateError as error:
        return BadRow(conversation.place, f"the chat template refuses it ({error})")
    if whole[: len(prompt)] != prompt:
        return BadRow(
            conversation.place,
            "the chat template's prompt is not a prefix of prompt and answer",
        )
    if len(prompt) >= min(len(whole), max_length):
        return BadRow(
            conversation.place,
            f"no answer token is left in max_length = {max_length} (the prompt has {len(prompt)})",
        )
    return Example(conversation.place, whole[:max_length], len(prompt))


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the prompt up to where the answer begins."""
    return _template(tokenizer, conversation.prompt, add_generation_prompt=True)


def end_of_answer(tokenizer: Any) -> int | None:
    """Special token with which the chat template closes an answer, or None where it has none.

    It is often another than the tokenizer's end-of-text token, at which generation stops.
    """
    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    text = tokenizer.apply_chat_template([question, answer], tokenize=False)
    ids = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


def _template(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool
) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def load_examples(
    tokenizer: Any,
    data: str,
    max_length: int,
    max_bad_share: float,
    stage: str,
    limit: int | None = None,
) -> Iterator[tuple[Conversation, Example]]:
    """Yield usable examples; when all are read, refuse if too many were not.

    Raises:
        LoramError: no chat template, no usable example, or too many bad rows.
    """
    if tokenizer.chat_template is None:
        raise LoramError(
            f"{stage} needs a chat template and the model's tokenizer has none; add "
            "chat_template.jinja to the model's directory"
        )
    bad: list[BadRow] = []
    good = 0
    for conversation in conversations(data, f"{stage}.data", limit):
        if isinstance(conversation, BadRow):
            bad.append(conversation)
            continue
        example = tokenise_conversation(tokenizer, conversation, max_length)
        if isinstance(example, BadRow):
            bad.append(example)
            continue
        good += 1
        yield conversation, example
    refuse_bad_rows(bad, good + len(bad), max_bad_share, f"{stage}.max_bad_share")
    if good == 0:
        raise LoramError(f"{stage}.data must hold examples, {data} has none that can be used")


class ExampleTable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised examples in a memory-mapped Arrow file: memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    @classmethod
    def write(cls, examples: Iterator[Example], path: Path) -> ExampleTable:
        """Write examples batch by batch and open them."""
        schema = pa.schema({"input_ids": pa.list_(pa.int32()), "prompt_length": pa.int32()})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            batch: list[dict[str, object]] = []
            for example in examples:
                batch.append(
                    {"input_ids": example.input_ids, "prompt_length": example.prompt_length}
                )
                if len(batch) == _ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                    batch = []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        return cls(path)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``input_ids`` and ``labels`` of one example."""
        input_ids = self._table["input_ids"][index].as_py()
        prompt = self._table["prompt_length"][index].as_py()
        return labelled(input_ids, prompt)


def labelled(input_ids: list[int], prompt_length: int) -> dict[str, list[int]]:
    """Return ``input_ids`` and ``labels``, which ignore the prompt: a row as `collate` takes it."""
    labels = [IGNORED] * prompt_length + input_ids[prompt_length:]
    return {"input_ids": input_ids, "labels": labels}


def collate(rows: list[dict[str, list[int]]], padding: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[batch, longest]``.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], padding) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
    }
