"""Prompts of benchmarks: questions with solved examples in front, as text and as tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.read import BadRow, refuse_bad_rows
from loram_ray.corpus.rows import Row, read_rows
from loram_ray.errors import LoramError, first_line
from loram_ray.evaluation.benchmark import require_items
from loram_ray.models.tokenizer import ids_to_continue, render_chat

_COLUMN = re.compile(r"\{(\w+)\}")
_BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class Shot:
    """A solved question."""

    question: str
    answer: str


def rows_of(data: str, columns: Collection[str], key: str, limit: int | None) -> list[Row | BadRow]:
    """Read rows; a row that lacks a column counts as unusable.

    Args:
        data: File, directory or glob.
        columns: Required columns.
        key: Configuration key of the data, for messages.
        limit: Maximum number of rows.

    Raises:
        LoramError: There is no row.
    """
    found: list[Row | BadRow] = []
    for file in list_files(data, key, EXAMPLES):
        for row in read_rows(file, columns):
            if limit is not None and len(found) >= limit:
                break
            found.append(row if isinstance(row, BadRow) else _with_columns(row, columns))
    require_items(found, key, data)
    return found


def _with_columns(row: Row, columns: Collection[str]) -> Row | BadRow:
    place, values = row
    missing = [name for name in columns if values.get(name) is None]
    return BadRow(place, f"it has no {' and no '.join(missing)}") if missing else row


def columns_of(prompt: str) -> list[str]:
    """Return the names of the columns that a prompt template refers to."""
    return list(dict.fromkeys(_COLUMN.findall(prompt)))


def filled(prompt: str, row: dict[str, Any]) -> str:
    """Fill a prompt template with a row's values; other braces are kept."""
    return _COLUMN.sub(lambda place: str(row[place.group(1)]), prompt)


def good_rows(rows: Sequence[Any], max_bad_share: float) -> list[Any]:
    """Return the usable rows.

    Raises:
        LoramError: Too many rows are unusable.
    """
    bad = [row for row in rows if isinstance(row, BadRow)]
    refuse_bad_rows(bad, len(rows), max_bad_share, "evaluate.max_bad_share")
    return [row for row in rows if not isinstance(row, BadRow)]


def chosen(shots: Sequence[Shot], count: int, seed: int | None, key: str) -> list[Shot]:
    """Return the solved questions to show: the first ones, or a random sample if there is a seed.

    Raises:
        LoramError: There are fewer than ``count``.
    """
    if len(shots) < count:
        raise LoramError(
            f"{key} must have at least {count} rows for shots, got {len(shots)}; lower shots or "
            "add rows"
        )
    return list(shots[:count]) if seed is None else random.Random(seed).sample(shots, count)


class PromptBuilder:
    """Builds the text that a model gets.

    Args:
        tokenizer: Tokenizer of the model.
        shots: Solved questions in front of each question.
        delimiter: Text between a question and its answer, unless the chat template is used.
        chat: Whether the chat template is used.
        key: Configuration key of the benchmark, for messages.

    Raises:
        LoramError: The tokenizer has no chat template and ``chat`` is True.
    """

    def __init__(
        self, tokenizer: Any, shots: Sequence[Shot], delimiter: str, chat: bool, key: str
    ) -> None:
        if chat and tokenizer.chat_template is None:
            raise LoramError(
                f"{key}.chat needs a chat template, but the model's tokenizer has none; set "
                "evaluate.chat_template to a file, or set chat to false"
            )
        self._tokenizer, self._shots, self._key = tokenizer, shots, key
        self.chat = chat
        self.delimiter = "" if chat else delimiter

    def text(self, question: str) -> str:
        """Return everything before the answer, without the delimiter."""
        if not self.chat:
            shown = [f"{s.question}{self.delimiter}{s.answer}" for s in self._shots]
            return _BETWEEN_SHOTS.join([*shown, question])
        messages = []
        for shot in self._shots:
            messages += [
                {"role": "user", "content": shot.question},
                {"role": "assistant", "content": shot.answer},
            ]
        messages.append({"role": "user", "content": question})
        try:
            return render_chat(self._tokenizer, messages, add_generation_prompt=True)
        except LoramError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise LoramError(
                f"{self._key}.chat: the chat template rejects a question ({first_line(error)}); "
                "set evaluate.chat_template to another file, or set chat to false"
            ) from error

    @property
    def beginning(self) -> int:
        """The token that stands for an empty context."""
        first, last = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return int(last if first is None else first)

    def ids(self, text: str) -> list[int]:
        """Return token ids; a chat already contains its special tokens."""
        if not self.chat:
            return ids_to_continue(self._tokenizer, text)
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def split_ids(
    builder: PromptBuilder, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and its continuation, tokenised together.

    Trailing space of the context moves to the continuation, as tokenizers expect, except in a chat,
    where it belongs to the template. A token that spans the border counts as part of the
    continuation, and the context ends where it would end alone. This is as in lm-eval, so that
    scores can be compared.

    Returns:
        The token ids of the context, at least one, and of the continuation.
    """
    space = 0 if builder.chat else len(context) - len(context.rstrip())
    if space:
        context, continuation = context[:-space], context[-space:] + continuation
    whole, before = builder.ids(context + continuation), builder.ids(context)
    if not before:
        before = [builder.beginning]
        whole = [*before, *whole]
    split = min(len(before), len(whole) - 1)
    return before[:split], whole[split:]
