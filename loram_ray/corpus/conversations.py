"""Parse fine-tuning data: conversations and plain text, in the formats in common use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from loram_ray.corpus.files import EXAMPLES, list_files
from loram_ray.corpus.messages import (
    KEYS_OF_WEIGHT,
    BadMessages,
    checked_messages,
    is_special,
    parsed,
    without_nulls,
)
from loram_ray.corpus.read import BadRow
from loram_ray.corpus.rows import read_rows

_FORMS = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'"
_OF_TEMPLATES = ("tools", "chat_template_kwargs", "documents")
_PREFERENCE = "preferences are not supported; remove it to train on the rest"
_OF_MEDIA = "only text is supported; remove it to train on the text alone"
_MASK = "the loss covers whole answers; weight messages with 'weight', 0 or 1"
_ROWS_ALIKE = "all rows have the same weight; weight messages with 'weight', 0 or 1"
_THOUGHTS = "reasoning belongs in the assistant's message; move it there"
_REFUSED = {
    **dict.fromkeys(("rejected", "chosen", "kto_tag", "label"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _OF_MEDIA),
    "functions": "it is the deprecated form of 'tools'; use 'tools'",
    "enable_thinking": "it belongs in 'chat_template_kwargs'; move it there",
    **dict.fromkeys(("reasoning_content", "thinking"), _THOUGHTS),
    **dict.fromkeys(("assistant_masks", "completion_mask", "loss_mask"), _MASK),
    **dict.fromkeys(("weight", "train"), _ROWS_ALIKE),
}
"""Columns that change the meaning of a row in other trainers, and why they are rejected.

Null, empty and default values are accepted; see `_is_refused`.
"""
_REFUSED_WITH_TEXT = ("assistant_masks", "completion_mask", "loss_mask", "weight", "train")
_COLUMNS = (
    *("messages", "prompt", "completion", "instruction", "input", "output", "text"),
    *("system", "history"),
    *_OF_TEMPLATES,
    *_REFUSED,
)


@dataclass(frozen=True)
class Conversation:
    """Messages of one conversation; the loss is on the assistant's.

    Attributes:
        place: Origin as ``file:line``.
        messages: Messages in OpenAI's format; the last is the assistant's.
        tools: JSON schemas of the tools that the assistant may call.
        arguments: Other arguments of the chat template, by name.
        given: Indices of the assistant messages without loss.
    """

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    given: frozenset[int] = frozenset()

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Text of the last answer."""
        return str(self.messages[-1]["content"])

    @property
    def learnt(self) -> list[int]:
        """Indices of the assistant messages with loss."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and number not in self.given
        ]

    @property
    def content(self) -> Any:
        """JSON-serialisable content that identifies the conversation."""
        if self.tools is None and not self.arguments and not self.given:
            return self.messages
        return [self.messages, self.tools, self.arguments, sorted(self.given)]


@dataclass(frozen=True)
class Document:
    """Plain text to train on as a whole.

    Attributes:
        place: Origin as ``file:line``.
        text: Text, never empty.
    """

    place: str
    text: str


def conversations(
    data: str, key: str, limit: int | None = None
) -> Iterator[Conversation | Document | BadRow]:
    """Yield the parsed rows of a data set, including the rows that cannot be used.

    Args:
        data: File, directory, address or glob.
        key: Configuration key for error messages.
        limit: Maximum number of rows to read.
    """
    read = 0
    for file in list_files(data, key, EXAMPLES):
        for row in read_rows(file, _COLUMNS):
            if limit is not None and read >= limit:
                return
            read += 1
            yield row if isinstance(row, BadRow) else parse_row(*row)


def forms_of(data: str, key: str) -> frozenset[str]:
    """List the features of a data set beyond plain questions and answers.

    Args:
        data: File, directory, address or glob.
        key: Configuration key for error messages.

    Returns:
        ``text`` for plain text; ``columns`` for columns or message keys that change what a row
        means; ``spaces`` for answers that start with whitespace.
    """
    return frozenset(
        form
        for file in list_files(data, key, EXAMPLES)
        for row in read_rows(file, _COLUMNS)
        if not isinstance(row, BadRow)
        for form in _forms_of_row(row[1])
    )


def _forms_of_row(row: dict[str, Any]) -> Iterator[str]:
    found, messages = parse_row("", row), row.get("messages")
    if isinstance(found, Document):
        yield "text"
        return
    if isinstance(found, Conversation):
        means_more = bool(found.tools or found.arguments or found.given)
        if any(found.messages[number]["content"][:1].isspace() for number in found.learnt):
            yield "spaces"
    else:
        refused = any(_is_refused(name, row) for name in _REFUSED)
        means_more = refused or any(row.get(name) for name in _OF_TEMPLATES)
    of_messages = isinstance(messages, list) and any(map(is_special, messages))
    if means_more or of_messages or row.get("system") or row.get("history"):
        yield "columns"


def parse_row(place: str, row: dict[str, Any]) -> Conversation | Document | BadRow:
    """Parse a row: OpenAI messages, prompt and completion, Alpaca instruction, or plain text.

    If a row fits several formats, the first one in this order applies.
    """
    try:
        messages = _messages_of(row)
        names = _REFUSED if messages is not None else _REFUSED_WITH_TEXT
        refused = [name for name in names if _is_refused(name, row)]
        if refused:
            raise BadMessages(f"its '{refused[0]}' cannot be trained on: {_REFUSED[refused[0]]}")
        if messages is None:
            text = row.get("text")
            if isinstance(text, str) and text.strip():
                return Document(place, text)
            raise BadMessages(f"it must have text in {_FORMS}")
        checked, given = checked_messages(messages)
        return Conversation(place, checked, _tools_of(row), _arguments_of(row), given)
    except BadMessages as error:
        return BadRow(place, str(error))


def _messages_of(row: dict[str, Any]) -> object | None:
    """Return a row's messages, or None if it is in none of the message formats."""
    messages = row.get("messages")
    if messages is None:
        messages = _question_and_answer(row)
    system, history = row.get("system"), row.get("history")
    if messages is None or not (system or history):
        return messages
    if not isinstance(messages, list) or (history and row.get("messages") is not None):
        raise BadMessages(
            "its 'history' is only supported with 'instruction' and 'output'; remove it"
        )
    turns = []
    for turn in history or ():
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise BadMessages("its 'history' must be a list of question and answer pairs")
        turns += _turn(*turn)
    if not system:
        return [*turns, *messages]
    if not isinstance(system, str):
        raise BadMessages("its 'system' must be text")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") == "system":
        if first.get("content") != system:
            raise BadMessages("its 'system' differs from the system message; remove one of them")
        return messages
    return [{"role": "system", "content": system}, *turns, *messages]


def _question_and_answer(row: dict[str, Any]) -> list[Any] | None:
    """Return a row's question and answer as messages, or None if it has none.

    Alpaca's ``input`` is appended to the instruction.
    """
    question, answer = row.get("prompt"), row.get("completion")
    if question is None and answer is None:
        question, answer = row.get("instruction"), row.get("output")
        context = row.get("input")
        if isinstance(question, str) and isinstance(context, str) and context.strip():
            question = f"{question}\n\n{context}"
    if question is None and answer is None:
        return None
    if isinstance(question, str) and isinstance(answer, str):
        return _turn(question, answer)
    if isinstance(question, list) and isinstance(answer, list):  # TRL's format: both are messages
        before = [_without_loss(message) for message in question]
        return [*before, *answer]
    raise BadMessages(f"it must have text in {_FORMS}")


def _turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _without_loss(message: Any) -> Any:
    is_answer = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, KEYS_OF_WEIGHT[0]: 0} if is_answer else message


def _is_refused(name: str, row: dict[str, Any]) -> bool:
    value = row.get(name)
    if name == "label":  # a bool is a preference; numbers and strings are class labels
        return isinstance(value, bool)
    if name in KEYS_OF_WEIGHT:
        return value is not None and value != 1
    return bool(value)


def _tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = without_nulls(parsed(row.get("tools"), "tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadMessages("its 'tools' must be a list of JSON schemas")
    return tools


def _arguments_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the chat template's arguments other than messages and tools."""
    given = without_nulls(parsed(row.get("chat_template_kwargs"), "chat_template_kwargs")) or {}
    if not isinstance(given, dict):
        raise BadMessages("its 'chat_template_kwargs' must be an object")
    documents = row.get("documents")
    if isinstance(documents, list) and documents and isinstance(documents[0], dict):
        given = {**given, "documents": documents}  # a list of strings is not meant for the template
    return given
