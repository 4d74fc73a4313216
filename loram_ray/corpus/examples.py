"""Tokenise fine-tuning examples, with loss on the answers only."""

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
    continuation_ids,
    end_of_answer,
    ids_of,
    refuse_unread_parts,
    render,
)
from loram_ray.errors import LoramError
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import frame_of

_ROWS_PER_BATCH = 1024

Spans = tuple[tuple[int, int], ...]
"""Half-open token ranges ``(start, end)`` that carry loss."""


@dataclass(frozen=True)
class Example:
    """Tokenised conversation or text.

    Attributes:
        place: Origin as ``file:line``.
        input_ids: Token ids of the whole example.
        learnt: Token ranges that carry loss.
    """

    place: str
    input_ids: list[int]
    learnt: Spans

    @property
    def labels(self) -> list[int]:
        """Labels, not shifted: token ids that carry loss, and `IGNORED` elsewhere."""
        return labels_of(self.input_ids, self.learnt)


def labels_of(input_ids: list[int], learnt: Iterable[tuple[int, int]]) -> list[int]:
    """Return labels that copy the token ids in the given ranges and are `IGNORED` elsewhere."""
    labels = [IGNORED] * len(input_ids)
    for begin, end in learnt:
        labels[begin:end] = input_ids[begin:end]
    return labels


def tokenise_row(
    tokenizer: Any, row: Conversation | Document, max_length: int
) -> list[Example] | BadRow:
    """Tokenise a conversation into an example, or a text into one example per piece.

    Conversations longer than ``max_length`` are truncated on the right; one that loses all its
    answer tokens is a bad row. A text is split into pieces, each of which starts with the
    tokenizer's opening tokens.

    Args:
        tokenizer: Tokenizer of the model; conversations need its chat template.
        row: Conversation or text to tokenise.
        max_length: Maximum length of an example in tokens.
    """
    if isinstance(row, Document):
        frame = frame_of(tokenizer)
        tokenised = tokenise_batch(tokenizer, [row.text])
        rows, lengths = pack(tokenised, max_length, frame.end, frame.opening)
        pieces = [ids[:n].tolist() for ids, n in zip(rows, lengths.tolist(), strict=True)]
        given = max(len(frame.opening), 1)  # the first token of a chunk is never predicted
        return [Example(row.place, p, ((given, len(p)),)) for p in pieces if len(p) > given]
    try:
        refuse_unread_parts(tokenizer, row)
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
            f"no answer token fits into max_length = {max_length} (the prompt has "
            f"{found[0][1][0][0]})",
        )
    return examples


def _tokenise(tokenizer: Any, conversation: Conversation) -> list[tuple[list[int], Spans]]:
    """Return the token ids of a conversation and the ranges of its answers.

    An answer starts after its prompt, tokenised as it would be for generation. It ends where the
    conversation up to that message would end; if the template renders earlier answers differently
    from the last one (Qwen 3), it ends with the token that closes an answer.

    If the tokenizer merges the end of a prompt with the start of its answer, the prompt's tokens
    would differ inside the conversation. Each answer then becomes an example of its own.
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
        for answer in [continuation_ids(tokenizer, prompt, whole[begin:end])]
    ]


def _place_of(
    tokenizer: Any, conversation: Conversation, number: int, whole: str
) -> tuple[int, int]:
    """Return the character range of an answer in the rendered conversation."""
    prompt = render(tokenizer, conversation, number, prompt=True)
    begin, end = len(prompt), len(whole)
    if not whole.startswith(prompt):
        raise TemplateFault(_what_differs(prompt, whole))
    if number < len(conversation.messages) - 1:
        through = render(tokenizer, conversation, number + 1, prompt=False)
        alike = whole.startswith(through) and len(through) > begin
        end = len(through) if alike else _closed(tokenizer, whole, begin)
    if begin == end:
        raise TemplateFault("the chat template renders no answer after its prompt")
    return begin, end


def _what_differs(prompt: str, whole: str) -> str:
    """Describe how the generation prompt differs from the rendered conversation."""
    begin = len(os.path.commonprefix([prompt, whole]))
    return (
        "the chat template's prompt is not a prefix of prompt and answer: it renders "
        f"{prompt[begin:]!r:.60} without the answer, but {whole[begin:]!r:.40} with it; set "
        "chat_template to a template that renders the prompt identically"
    )


def _closed(tokenizer: Any, whole: str, begin: int) -> int:
    """Return where an answer that starts at `begin` ends, after its closing token."""
    eos_id = end_of_answer(tokenizer)
    mark = "" if eos_id is None else str(tokenizer.convert_ids_to_tokens(eos_id))
    found = whole.find(mark, begin) if mark else -1
    if found < 0:
        raise TemplateFault(
            "the chat template renders earlier answers differently from the last, and ends no "
            "answer with a special token"
        )
    return found + len(mark)


def tokenised_rows(
    tokenizer: Any, data: str, max_length: int, key: str, limit: int | None = None
) -> Iterator[tuple[Conversation | Document, list[Example]] | BadRow]:
    """Yield each row with its examples, or the reason it cannot be used.

    Args:
        tokenizer: Tokenizer of the model.
        data: File, directory, address or glob.
        max_length: Maximum length of an example in tokens.
        key: Configuration key of the data, such as ``train.data``.
        limit: Maximum number of rows to read.

    Raises:
        LoramError: If a conversation needs a chat template and the tokenizer has none.
    """
    stage = key.partition(".")[0]
    for row in conversations(data, key, limit):
        if isinstance(row, BadRow):
            yield row
            continue
        if isinstance(row, Conversation) and tokenizer.chat_template is None:
            raise LoramError(
                f"{stage} needs a chat template for {row.place}, but the model's tokenizer has "
                f"none; set {stage}.chat_template to a template file"
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
    """Yield the usable examples; after the last row, fail if too many rows were bad.

    Args:
        tokenizer: Tokenizer of the model.
        data: File, directory, address or glob.
        max_length: Maximum length of an example in tokens.
        max_bad_share: Maximum share of bad rows.
        key: Configuration key of the data, such as ``train.data``.
        limit: Maximum number of rows to read.

    Raises:
        LoramError: If a chat template is missing, no example is usable, or too many rows are bad.
    """
    bad: list[BadRow] = []
    good = 0
    for found in tokenised_rows(tokenizer, data, max_length, key, limit):
        if isinstance(found, BadRow):
            bad.append(found)
            continue
        good += 1
        row, examples = found
        for example in examples:
            yield row, example
    refuse_bad_rows(bad, good + len(bad), max_bad_share, f"{key.partition('.')[0]}.max_bad_share")
    require_examples(good, data, key)


def require_examples(good: int, data: str, key: str) -> None:
    """Refuse data without usable examples.

    Raises:
        LoramError: If ``good`` is zero.
    """
    if good == 0:
        raise LoramError(
            f"{key} must contain examples, but {data} has no usable ones; add rows with text to "
            "train on"
        )


def is_held_out(row: Conversation | Document, share: float, seed: int) -> bool:
    """Whether a row belongs to the held-out share; equal rows are always on the same side."""
    content = row.text if isinstance(row, Document) else json.dumps(row.content, sort_keys=True)
    return below_share(content, share, seed)


_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "learnt": pa.list_(pa.int32())})


class _Writer:
    """Write examples to an Arrow file in batches."""

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
    """Dataset of tokenised examples in a memory-mapped Arrow file.

    Memory does not grow with the number of examples.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    @classmethod
    def write(cls, examples: Iterable[Example], path: Path) -> ExampleTable:
        """Write examples to a file and open it."""
        with _Writer(path) as writer:
            for example in examples:
                writer.write(example)
        return cls(path)

    @classmethod
    def split(
        cls, examples: Iterable[tuple[bool, Example]], path: Path, path_of_true: Path
    ) -> tuple[ExampleTable, ExampleTable]:
        """Write examples to two files, those paired with True to the second, and open both."""
        with _Writer(path) as writer, _Writer(path_of_true) as writer_of_true:
            for chosen, example in examples:
                (writer_of_true if chosen else writer).write(example)
        return cls(path), cls(path_of_true)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return len(self._table["input_ids"].combine_chunks().flatten())

    @property
    def lengths(self) -> list[int]:
        """Length of each example in tokens."""
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
