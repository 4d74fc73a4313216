"""Questions of a benchmark's rows, with solved ones in front of them, as text and as tokens."""

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
    """Read rows; one that has not all columns is bad.

    Args:
        data: a file, a directory or a glob.
        columns: that are needed.
        key: configuration key of the data.
        limit: rows at most.

    Raises:
        LoramError: there is no row.
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
    """Names of the columns that a prompt has places for."""
    return list(dict.fromkeys(_COLUMN.findall(prompt)))


def filled(prompt: str, row: dict[str, Any]) -> str:
    """A prompt with a row's values in their places; other braces stay."""
    return _COLUMN.sub(lambda place: str(row[place.group(1)]), prompt)


def good_rows(rows: Sequence[Any], max_bad_share: float) -> list[Any]:
    """Those that are not bad.

    Raises:
        LoramError: too many are bad.
    """
    bad = [row for row in rows if isinstance(row, BadRow)]
    refuse_bad_rows(bad, len(rows), max_bad_share, "evaluate.max_bad_share")
    return [row for row in rows if not isinstance(row, BadRow)]


def chosen(shots: Sequence[Shot], count: int, seed: int | None, key: str) -> list[Shot]:
    """The solved questions that are shown: the first, or some at random.

    Raises:
        LoramError: there are fewer.
    """
    if len(shots) < count:
        raise LoramError(
            f"{key} must hold as many rows as there are shots, {count}, it has {len(shots)}; "
            "lower shots or give more rows"
        )
    return list(shots[:count]) if seed is None else random.Random(seed).sample(shots, count)


class PromptBuilder:
    """Makes the text that a model is given.

    Args:
        tokenizer: of the model.
        shots: shown in front of each question.
        delimiter: between a question and its answer, where there is no chat.
        chat: whether the chat template is used.
        key: configuration key of the benchmark.

    Raises:
        LoramError: a chat without a chat template.
    """

    def __init__(
        self, tokenizer: Any, shots: Sequence[Shot], delimiter: str, chat: bool, key: str
    ) -> None:
        if chat and tokenizer.chat_template is None:
            raise LoramError(
                f"{key}.chat needs a chat template and the model's tokenizer has none; give a file "
                "with one as evaluate.chat_template, or set chat to false"
            )
        self._tokenizer, self._shots, self._key = tokenizer, shots, key
        self.chat = chat
        self.delimiter = "" if chat else delimiter

    def text(self, question: str) -> str:
        """All that stands before the answer, without the delimiter."""
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
        except Exception as error:  # a template is a program: it may raise anything
            raise LoramError(
                f"{self._key}.chat: the chat template refuses a question ({first_line(error)}); "
                "give another as evaluate.chat_template, or set chat to false"
            ) from error

    @property
    def beginning(self) -> int:
        """The token that stands for no context at all."""
        first, last = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return int(last if first is None else first)

    def ids(self, text: str) -> list[int]:
        """Token ids; a chat has its special tokens already."""
        if not self.chat:
            return ids_to_continue(self._tokenizer, text)
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def split_ids(
    builder: PromptBuilder, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, tokenised together.

    Space at the context's end goes to what follows, as tokenizers have it, but in a chat, where it
    is the template's. Where a token lies over
    the border, it is counted to what follows, and the context ends where it would alone (as lm-eval
    does it, so that scores can be compared).

    Returns:
        The context's, which are at least one, and the continuation's.
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
