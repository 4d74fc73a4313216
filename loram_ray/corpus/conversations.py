"""What fine-tuning data hold: conversations and plain texts, in the forms that are in use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.read import BadRow
from loram_ray.corpus.rows import read_rows

_FORMS = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'"
_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's are to be learnt.

    Attributes:
        place: ``file:line``.
        messages: in OpenAI's form; the last is the assistant's.
    """

    place: str
    messages: list[dict[str, Any]]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Text of the last answer."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Document:
    """A text all of which is to be learnt.

    Attributes:
        place: ``file:line``.
        text: not empty.
    """

    place: str
    text: str


def conversations(
    data: str, key: str, limit: int | None = None
) -> Iterator[Conversation | Document | BadRow]:
    """Yield what the rows of files hold, and the rows that hold nothing of use.

    Args:
        data: a file, a directory, an address or a glob.
        key: configuration key, for messages.
        limit: rows read at most.
    """
    read = 0
    for file in list_files(data, key, EXAMPLES):
        for row in read_rows(file, _COLUMNS):
            if limit is not None and read >= limit:
                return
            read += 1
            yield row if isinstance(row, BadRow) else parse_row(*row)


def parse_row(place: str, row: dict[str, Any]) -> Conversation | Document | BadRow:
    """Read a row: OpenAI's messages, prompt and completion, Alpaca's instruction, or plain text.

    Where a row could be several of these, the first counts.
    """
    messages = row.get("messages")
    if messages is None:
        question, answer = _question_and_answer(row)
        text = row.get("text")
        if isinstance(question, str) and isinstance(answer, str):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        elif question is None and answer is None and isinstance(text, str) and text.strip():
            return Document(place, text)
        else:
            return BadRow(place, f"it must have text in {_FORMS}")
    messages = _without_nothing(messages)
    problem = _problem_with(messages)
    return BadRow(place, problem) if problem else Conversation(place, messages)


def _question_and_answer(row: dict[str, Any]) -> tuple[Any, Any]:
    """A row's pair, Alpaca's input after its instruction; None for what is not there."""
    question, answer = row.get("prompt"), row.get("completion")
    if question is not None or answer is not None:
        return question, answer
    question, context = row.get("instruction"), row.get("input")
    if isinstance(question, str) and isinstance(context, str) and context.strip():
        question = f"{question}\n\n{context}"
    return question, row.get("output")


def _without_nothing(messages: object) -> Any:
    """Leave out what a table's columns have for every message and most have not."""
    if not isinstance(messages, list):
        return messages
    return [
        {k: v for k, v in message.items() if v is not None}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _problem_with(messages: object) -> str | None:
    if not isinstance(messages, list) or len(messages) < 2:
        return "'messages' must be a list of at least a user's and an assistant's message"
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"a message's role must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return "a message's content must be text"
    if messages[-1]["role"] != "assistant":
        return "no answer: the last message must be the assistant's"
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[0] == "system" else turns
    for number, role in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            return (
                "roles out of order: a system message may come first, then user and assistant take "
                f"turns; message {len(messages) - len(turns) + number + 1} is the {role}'s"
            )
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        return "no answer: an assistant's message must have text"
    return None
