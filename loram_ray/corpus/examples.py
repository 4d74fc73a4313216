"""Tokens of fine-tuning examples, with loss on the answers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from loram_ray.corpus.conversations import Conversation, Document, conversations
from loram_ray.corpus.pack import pack, tokenise_batch
from loram_ray.corpus.read import BadRow, refuse_bad_rows
from loram_ray.corpus.selection import below_share
from loram_ray.corpus.templates import (
    TemplateFault,
    end_of_answer,
    ids_behind,
    ids_of,
    render,
    require_read,
)
from loram_ray.errors import LoramError
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import frame_of

_ROWS_PER_BATCH = 1024

Spans = tuple[tuple[int, int], ...]
"""First token and the one past the last of each stretch that carries loss."""


@dataclass(frozen=True)
class Example:
    """A tokenised conversation or text.

    Attributes:
        place: ``file:line``.
        input_ids: all tokens.
        learnt: those that carry loss.
    """

    place: str
    input_ids: list[int]
    learnt: Spans

    @property
    def labels(self) -> list[int]:
        """Token ids that are learnt, and `IGNORED` for others; not shifted."""
        return labels_of(self.input_ids, self.learnt)


def labels_of(input_ids: list[int], learnt: Iterable[tuple[int, int]]) -> list[int]:
    """Copy the tokens of some stretches, all others are `IGNORED`."""
    labels = [IGNORED] * len(input_ids)
    for begin, end in learnt:
        labels[begin:end] = input_ids[begin:end]
    return labels


def tokenise_row(
    tokenizer: Any, row: Conversation | Document, max_length: int
) -> list[Example] | BadRow:
    """Turn a conversation into an example, or a text into one for each piece.

    Conversations longer than ``max_length`` are cut on the right; one of which no answer's token is
    left is a bad row. A text is cut into pieces, each begun as the tokenizer begins a text.

    Args:
        tokenizer: of the model; with a chat template, for conversations.
        row: what to learn.
        max_length: of an example, in tokens.
    """
    if isinstance(row, Document):
        frame = frame_of(tokenizer)
        tokenised = tokenise_batch(tokenizer, [row.text])
        rows, lengths = pack(tokenised, max_length, frame.end, frame.opening)
        pieces = [ids[:n].tolist() for ids, n in zip(rows, lengths.tolist(), strict=True)]
        given = max(len(frame.opening), 1)  # of a piece the first token is not predicted
        return [Example(row.place, p, ((given, len(p)),)) for p in pieces if len(p) > given]
    try:
        require_read(tokenizer, row)
        found = _tokenise(tokenizer, row)
    except TemplateFault as error:
        return BadRow(row.place, str(error))
    examples = []
    for ids, answers in found:
        learnt = tuple(
            (begin, min(end, max_length)) for begin, end in answers if begin < max_length
        )
        if learnt:
            examples.append(Example(row.place, ids[:max_length], learnt))
    if not examples:
        return BadRow(
            row.place,
            f"no answer token is left in max_length = {max_length} (the prompt has "
            f"{found[0][1][0][0]})",
        )
    return examples


def _tokenise(tokenizer: Any, conversation: Conversation) -> list[tuple[list[int], Spans]]:
    """Token ids of a conversation, and where its answers are.

    An answer begins behind the tokens of its prompt as generation is given them, and goes on to
    where the conversation up to here would end, or, where the template renders earlier answers
    otherwise than the last (Qwen 3), through the token that closes an answer.

    Where the tokenizer joins a prompt's end with an answer's beginning, a prompt that ends inside
    the conversation would be tokenised otherwise in it: each answer makes an example of its own.
    """
    whole = render(tokenizer, conversation, len(conversation.messages), prompt=False)
    places = [_place_of(tokenizer, conversation, number, whole) for number in conversation.learnt]
    ids = ids_of(tokenizer, whole)
    prompts = [ids_of(tokenizer, whole[:begin]) for begin, _ in places]
    through = [ids if end == len(whole) else ids_of(tokenizer, whole[:end]) for _, end in places]
    if all(ids[: len(part)] == part for part in (*prompts, *through)):
        return [(ids, tuple(zip(map(len, prompts), map(len, through), strict=True)))]
    return [
        ([*prompt, *answer], ((len(prompt), len(prompt) + len(answer)),))
        for prompt, (begin, end) in zip(prompts, places, strict=True)
        for answer in [ids_behind(tokenizer, prompt, whole[begin:end])]
    ]


def _place_of(
    tokenizer: Any, conversation: Conversation, number: int, whole: str
) -> tuple[int, int]:
    """Where in the conversation's text an answer begins and ends, in characters."""
    prompt = render(tokenizer, conversation, number, prompt=True)
    begin, end = len(prompt), len(whole)
    if not whole.startswith(prompt):
        raise TemplateFault(_what_differs(prompt, whole))
    if number < len(conversation.messages) - 1:
        through = render(tokenizer, conversation, number + 1, prompt=False)
        alike = whole.startswith(through) and len(through) > begin
        end = len(through) if alike else _closed(tokenizer, whole, begin)
    if begin == end:
        raise TemplateFault("the chat template renders no answer behind its prompt")
    return begin, end


def _what_differs(prompt: str, whole: str) -> str:
    """Why a template cannot be learnt from that does not begin an answer as it asks for one."""
    begin = len(os.path.commonprefix([prompt, whole]))
    return (
        f"the chat template's prompt is not a prefix of prompt and answer: it asks for an answer "
        f"with {prompt[begin:]!r:.60}, where with the answer it writes {whole[begin:]!r:.40}; give "
        "a template that writes both alike as chat_template"
    )


def _closed(tokenizer: Any, whole: str, begin: int) -> int:
    """Where an answer ends that begins there: behind its closing token."""
    closing = end_of_answer(tokenizer)
    mark = "" if closing is None else str(tokenizer.convert_ids_to_tokens(closing))
    found = whole.find(mark, begin) if mark else -1
    if found < 0:
        raise TemplateFault(
            "the chat template renders an earlier answer otherwise than the last, and closes none "
            "by a special token"
        )
    return found + len(mark)


def each_row(
    tokenizer: Any, data: str, max_length: int, key: str, limit: int | None = None
) -> Iterator[tuple[Conversation | Document, list[Example]] | BadRow]:
    """Yield each row with its examples, or why it cannot be used.

    Args:
        tokenizer: of the model.
        data: a file, a directory, an address or a glob.
        max_length: of an example, in tokens.
        key: configuration key of the data, such as ``train.data``.
        limit: rows read at most.

    Raises:
        LoramError: no chat template.
    """
    stage = key.partition(".")[0]
    for row in conversations(data, key, limit):
        if isinstance(row, BadRow):
            yield row
            continue
        if isinstance(row, Conversation) and tokenizer.chat_template is None:
            raise LoramError(
                f"{stage} needs a chat template for {row.place} and the model's tokenizer has "
                f"none; give a file with one as {stage}.chat_template"
            )
        found = tokenise_row(tokenizer, row, max_length)
        yield found if isinstance(found, BadRow) else (row, found)


def load_examples(
    tokenizer: Any,
    data: str,
    max_length: int,
    max_bad_share: float,
    key: str,
    limit: int | None = None,
) -> Iterator[tuple[Conversation | Document, Example]]:
    """Yield usable examples; when all are read, refuse if too many were not.

    Args:
        tokenizer: of the model.
        data: a file, a directory, an address or a glob.
        max_length: of an example, in tokens.
        max_bad_share: share of the rows that may be unusable.
        key: configuration key of the data, such as ``train.data``.
        limit: rows read at most.

    Raises:
        LoramError: no chat template, no usable example, or too many bad rows.
    """
    bad: list[BadRow] = []
    good = 0
    for found in each_row(tokenizer, data, max_length, key, limit):
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        good += 1
        row, examples = found
        for example in examples:
            yield row, example
    refuse_bad_rows(bad, good + len(bad), max_bad_share, f"{key.partition('.')[0]}.max_bad_share")
    require_some(good, data, key)


def require_some(good: int, data: str, key: str) -> None:
    """Refuse data without a usable example.

    Raises:
        LoramError: ``good`` is zero.
    """
    if good == 0:
        raise LoramError(
            f"{key} must hold examples, {data} has none that can be used; give rows with "
            "something to learn"
        )


def is_held_out(row: Conversation | Document, share: float, seed: int) -> bool:
    """Whether a row is one of the share that is held out; equal rows are on the same side."""
    content = row.text if isinstance(row, Document) else json.dumps(row.content, sort_keys=True)
    return below_share(content, share, seed)


_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "learnt": pa.list_(pa.int32())})


class _Writer:
    """Writes examples to an Arrow file, batch by batch."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.new_file(str(path), _SCHEMA)
        self._batch: list[dict[str, object]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._write_batch()
        self._file.close()

    def write(self, example: Example) -> None:
        bounds = [bound for span in example.learnt for bound in span]
        self._batch.append({"input_ids": example.input_ids, "learnt": bounds})
        if len(self._batch) == _ROWS_PER_BATCH:
            self._write_batch()

    def _write_batch(self) -> None:
        if self._batch:
            self._file.write_batch(pa.RecordBatch.from_pylist(self._batch, _SCHEMA))
            self._batch = []


class ExampleTable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Tokenised examples in a memory-mapped Arrow file: memory does not grow with their number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    @classmethod
    def write(cls, examples: Iterable[Example], path: Path) -> ExampleTable:
        """Write examples and open them."""
        with _Writer(path) as writer:
            for example in examples:
                writer.write(example)
        return cls(path)

    @classmethod
    def split(
        cls, examples: Iterable[tuple[bool, Example]], path: Path, path_of_true: Path
    ) -> tuple[ExampleTable, ExampleTable]:
        """Write examples to two files, those that come with True to the second, and open both."""
        with _Writer(path) as writer, _Writer(path_of_true) as writer_of_true:
            for chosen, example in examples:
                (writer_of_true if chosen else writer).write(example)
        return cls(path), cls(path_of_true)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._table["input_ids"].combine_chunks().flatten())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        found: list[int] = pc.list_value_length(self._table["input_ids"]).to_pylist()
        return found

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``input_ids`` and ``labels`` of one example."""
        input_ids = self._table["input_ids"][index].as_py()
        bounds = self._table["learnt"][index].as_py()
        learnt = zip(bounds[::2], bounds[1::2], strict=True)
        return {"input_ids": input_ids, "labels": labels_of(input_ids, learnt)}
