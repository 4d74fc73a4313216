"""Render conversations with a chat template, and detect the text it adds around an answer."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from loram_ray.corpus.conversations import Conversation
from loram_ray.corpus.messages import arguments_of_calls, with_arguments_as_text
from loram_ray.errors import LoramError, first_line
from loram_ray.models.tokenizer import continuation, render_chat

_ANSWER = "xyzzy"  # a word that no template contains
_ANCHORS = ("", "\n", ">", "a", "|")
_MEANINGFUL = ("tool_calls", "function_call", "reasoning_content", "thinking")
_RESERVED = frozenset(
    {"messages", "tools", "conversation", "chat_template"}
    | {"add_generation_prompt", "continue_final_message", "sanitize_control_tokens", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Parameters of `apply_chat_template` that are not passed to the template."""


class TemplateFault(ValueError):
    """The chat template cannot render a conversation in the form that training needs."""


class Surroundings(NamedTuple):
    """Text that a template adds around an answer.

    Attributes:
        before: Text between the generation prompt and the answer, such as an empty reasoning block.
        after: Text after the answer, including its closing token.
        ends_thoughts: End of a reasoning block that the generation prompt opens and the model
            closes.
    """

    before: str
    after: str
    ends_thoughts: str = ""

    def cut_off(self, answer: str) -> str:
        """Remove the surroundings from a generated answer.

        A reasoning block is removed even if it is not empty as in the template.
        """
        text = answer.strip()
        lines = self.before.split("\n")
        first, last = lines[0].strip(), lines[-1].strip()
        found = text.find(last, len(first) if len(lines) > 1 else 0)
        if self.ends_thoughts and self.ends_thoughts in text:
            text = text.partition(self.ends_thoughts)[2].strip()
        elif first and text.startswith(first) and found >= 0:
            text = text[found + len(last) :].strip()
        elif not (self.after and text.endswith(self.after)):
            return answer
        return text.removesuffix(self.after).strip()


NONE = Surroundings("", "")


def render(tokenizer: Any, conversation: Conversation, count: int, prompt: bool) -> str:
    """Apply the chat template.

    Arguments of tool calls are passed as objects, as Transformers expects. If the template prints
    an object verbatim, it was written for JSON text, and the arguments are passed as text.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversation: Conversation with messages, tools and template arguments.
        count: Number of messages to render, from the first.
        prompt: Whether to append the generation prompt.

    Raises:
        TemplateFault: If the template raises an error.
        LoramError: If the template takes too long.
    """
    messages = conversation.messages[:count]

    def apply(messages: list[dict[str, Any]]) -> str:
        try:
            return render_chat(
                tokenizer,
                messages,
                tools=conversation.tools,
                add_generation_prompt=prompt,
                **conversation.arguments,
            )
        except LoramError:
            raise
        except Exception as error:  # a template may raise anything
            raise TemplateFault(f"the chat template rejects it ({first_line(error)})") from error

    text = apply(messages)
    objects = [arguments for message in messages for arguments in arguments_of_calls(message)]
    if any(str(arguments) in text for arguments in objects if arguments):
        text = apply([with_arguments_as_text(message) for message in messages])
    return text


def refuse_unread_parts(tokenizer: Any, conversation: Conversation) -> None:
    """Refuse a conversation of which the template would silently drop a part.

    Raises:
        TemplateFault: If the template ignores the tools, an argument, or a key of a message.
    """
    reserved = [name for name in conversation.arguments if name in _RESERVED]
    if reserved:
        raise TemplateFault(f"'chat_template_kwargs' must not contain '{reserved[0]}'; remove it")
    names = [*conversation.arguments]
    if conversation.tools is not None:
        names.append("tools")
    for message in conversation.messages:
        names += [key for key in _MEANINGFUL if message.get(key)]
    for name in names:
        if not re.search(rf"\b{re.escape(name)}\b", _source_of(tokenizer, conversation)):
            raise _unread(f"'{name}'")
    if not any(m["role"] in ("system", "tool") or "name" in m for m in conversation.messages):
        return
    text = render(tokenizer, conversation, len(conversation.messages), prompt=False)
    for number, message in enumerate(conversation.messages):
        role, content = message["role"], message["content"].strip()
        if role != "tool" and "name" in message:  # the call names the tool
            _require_change(tokenizer, conversation, number, "name", text, f"the {role}'s 'name'")
        if role in ("system", "tool") and content not in text:
            _require_change(
                tokenizer, conversation, number, "content", text, f"the {role}'s content"
            )


def _require_change(
    tokenizer: Any, conversation: Conversation, number: int, key: str, text: str, what: str
) -> None:
    """Refuse a message key that has no effect on the rendered text."""
    messages = [*conversation.messages]
    messages[number] = {**messages[number], key: f"{messages[number][key]} {_ANSWER}"}
    other = dataclasses.replace(conversation, messages=messages)
    if render(tokenizer, other, len(messages), prompt=False) == text:
        raise _unread(what)


def _unread(what: str) -> TemplateFault:
    return TemplateFault(
        f"the chat template does not use {what}; set chat_template to a template that does, or "
        "remove it from the row"
    )


def _source_of(tokenizer: Any, conversation: Conversation) -> str:
    try:
        source: str = tokenizer.get_chat_template(tools=conversation.tools)
    except ValueError as error:
        raise TemplateFault(first_line(error)) from error
    return source


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of rendered text, which already holds its special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def continuation_ids(tokenizer: Any, prompt: list[int], text: str) -> list[int]:
    """Return the token ids of a text that continues a prompt without merging with its last token.

    SentencePiece tokenizers prepend a space to their input. The text is therefore tokenised after
    an anchor character, whose tokens are removed, such that prompt and text decode to the same
    string.
    """
    for anchor in _ANCHORS:
        front = ids_of(tokenizer, anchor)
        found = ids_of(tokenizer, anchor + text)
        if found[: len(front)] == front:
            ids = found[len(front) :]
            if continuation(tokenizer, prompt, ids, skip_special_tokens=False) == text:
                return ids
    return ids_of(tokenizer, text)


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Return the token ids of the prompt, up to the start of the last answer.

    Raises:
        TemplateFault: If the template raises an error.
    """
    count = len(conversation.messages) - 1
    return ids_of(tokenizer, render(tokenizer, conversation, count, prompt=True))


def surroundings(tokenizer: Any) -> Surroundings:
    """Return the text that the template adds around a plain answer to a plain question."""
    asked = {"role": "user", "content": "question"}
    answered = Conversation("", [asked, {"role": "assistant", "content": _ANSWER}])
    try:
        prompt = render(tokenizer, answered, 1, prompt=True)
        whole = render(tokenizer, answered, 2, prompt=False)
    except TemplateFault:
        return NONE
    begin, found, after = whole.rpartition(_ANSWER)
    if not found:
        return NONE
    if begin.startswith(prompt):
        return Surroundings(begin[len(prompt) :], after)
    opened = re.search(r"<(\w+)>\s*$", prompt[len(os.path.commonprefix([prompt, begin])) :])
    return Surroundings("", after, f"</{opened[1]}>" if opened else "")


def visible_surroundings(tokenizer: Any) -> Surroundings:
    """Return the parts of `surroundings` that remain in a decoded answer, without whitespace."""
    found = surroundings(tokenizer)
    return Surroundings(*(visible(tokenizer, text).strip() for text in found))


def visible(tokenizer: Any, text: str) -> str:
    """Return the part of rendered text that remains when it is decoded without special tokens."""
    eos_id = end_of_answer(tokenizer)
    ids = ids_of(tokenizer, text)
    ids = ids[: ids.index(eos_id)] if eos_id in ids else ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def end_of_answer(tokenizer: Any, listed: Collection[int] = ()) -> int | None:
    """Return the token with which the chat template closes an answer, or None.

    It often differs from the tokenizer's end-of-text token, which ends generation, and templates
    may write text before it. Special tokens take precedence over other added tokens, since some
    models (those with ChatML added) do not mark theirs as special.

    Args:
        tokenizer: Tokenizer with a chat template.
        listed: Token ids that end generation according to the model's configuration.
    """
    ids = ids_of(tokenizer, surroundings(tokenizer).after)
    added = tokenizer.added_tokens_decoder
    marked = {token for token, entry in added.items() if entry.special}
    special = marked | {*tokenizer.all_special_ids, *listed}
    for closing in (special, added):
        for token in ids:
            if token in closing:
                return token
    return None
