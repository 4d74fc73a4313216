"""Check messages in OpenAI's format, and determine which carry loss."""

from __future__ import annotations

import json
from typing import Any

from loram_ray.errors import LoramError
from loram_ray.utils.parsing import parse_json

KEYS_OF_WEIGHT = ("weight", "train")
"""Keys for a message's loss: OpenAI's (0 or 1) and Axolotl's (false or true)."""
_ROLES = ("system", "user", "assistant", "tool")
_REFUSED = {
    "train_detail": "weight whole messages with 'weight', 0 or 1",
    "loss_mask": "weight whole messages with 'weight', 0 or 1",
    "refusal": "move it to 'content'",
    "audio": "only text is supported",
    "images": "only text is supported",
    "videos": "only text is supported",
}
_CALLS = ("tool_calls", "function_call")


class BadMessages(ValueError):
    """Messages that cannot be trained on, with the reason."""


def checked_messages(messages: object) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Check messages and normalise them: content as text, arguments of calls as objects.

    Messages after the last one with loss are dropped.

    Returns:
        The messages, and the indices of the assistant messages without loss.

    Raises:
        BadMessages: If the messages cannot be trained on.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadMessages(
            "'messages' must be a list with at least one user message and one assistant message"
        )
    given = set()
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise BadMessages(f"a message's role must be one of {', '.join(_ROLES)}")
        message = without_nulls(message)
        if not _takes_loss(message):
            given.add(number)
        checked.append(_checked(message))
    if checked[-1]["role"] != "assistant":
        raise BadMessages("no answer: the last message must be the assistant's")
    _require_turns([message["role"] for message in checked])
    if any(m["role"] == "assistant" and not _says_something(m) for m in checked):
        raise BadMessages("no answer: an assistant message must have text")
    answers = [n for n, m in enumerate(checked) if m["role"] == "assistant"]
    learnt = [number for number in answers if number not in given]
    if not learnt:
        raise BadMessages("no answer: every assistant message has weight 0")
    return checked[: learnt[-1] + 1], frozenset(n for n in answers if n in given and n < learnt[-1])


def is_special(message: object) -> bool:
    """Whether a message holds more than a role and text content."""
    if not isinstance(message, dict):
        return False
    keys = (*KEYS_OF_WEIGHT, *_CALLS, *_REFUSED, "name")
    special = any(message.get(key) is not None for key in keys)
    return special or message.get("role") == "tool" or isinstance(message.get("content"), list)


def without_nulls(value: Any) -> Any:
    """Drop nulls at any depth; tables fill the columns that a row lacks with them."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def parsed(value: Any, name: str) -> Any:
    """Decode a value that may be stored as JSON text, as is common in tables.

    Raises:
        BadMessages: If the text is not JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value, f"its '{name}'", kind=object, remedy="fix the row")
    except LoramError as error:
        raise BadMessages(str(error)) from error


def _takes_loss(message: dict[str, Any]) -> bool:
    """Pop a message's weight and return whether the message carries loss."""
    takes = True
    for key in KEYS_OF_WEIGHT:
        weight = message.pop(key, None)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise BadMessages(f"a message's {key} must be 0 or 1, got {weight!r:.40}")
        if weight and key == "train" and message["role"] != "assistant":
            raise BadMessages(
                f"only assistant messages can have a loss, but {key} is set on another"
            )
        takes = takes and bool(weight)
    return takes


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    for name, remedy in _REFUSED.items():
        if message.get(name):
            raise BadMessages(f"a message's '{name}' cannot be trained on: {remedy}")
    message = {**message, "content": _text_of(message)}
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise BadMessages("'tool_calls' must be a list in an assistant message")
    if not calls:
        del message["tool_calls"]
    else:
        message["tool_calls"] = [_checked_call(call) for call in calls]
    return message


def _text_of(message: dict[str, Any]) -> str:
    """Return a message's text; the parts of a list are joined."""
    content = message.get("content")
    if content is None and any(message.get(name) for name in _CALLS):
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise BadMessages(f"only text is supported, but a message has a part {part!r:.60}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadMessages("a message's content must be text")
    return content


def _checked_call(call: Any) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as chat templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadMessages("each of 'tool_calls' must have a 'function' with a 'name'")
    arguments = parsed(function.get("arguments"), "arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise BadMessages(f"a call's 'arguments' must be an object, got {arguments!r:.40}")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def arguments_of_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of each tool call of a checked message."""
    return [call["function"]["arguments"] for call in message.get("tool_calls", ())]


def with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a checked message with the arguments of its calls as JSON text, as in OpenAI's API."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _says_something(message: dict[str, Any]) -> bool:
    return bool(message["content"].strip()) or any(message.get(name) for name in _CALLS)


def _require_turns(roles: list[str]) -> None:
    """Require user and assistant to alternate, with an optional system message and tool answers."""
    follows = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    before = ""
    for number, role in enumerate(roles, start=1):
        if role not in follows[before]:
            raise BadMessages(
                "roles out of order: a system message may come first, then user and assistant must "
                f"alternate; message {number} has the role {role}"
            )
        before = role
