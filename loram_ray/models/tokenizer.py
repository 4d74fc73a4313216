"""Loading of tokenizers, without transformers' modelling code, which takes seconds to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_ray.errors import LoramError, first_line, shown
from loram_ray.models.tokenizer_files import require_template, require_tokenizer_files
from loram_ray.utils.bounded_call import TooLong, within
from loram_ray.utils.files import require_regular_files
from loram_ray.utils.parsing import read_json, read_text

_PROBES = ("Hello.", "a", "0")
RENDER_SECONDS = 10.0
"""Maximum CPU time in seconds to render a conversation, which normally takes milliseconds."""


@dataclass(frozen=True)
class Frame:
    """The tokens that the tokenizer adds before and after a document.

    Attributes:
        opening: Token ids before the text; empty for many tokenizers, BOS for others (Llama,
            Gemma).
        closing: Token ids after the text, including the end-of-text token.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]

    @property
    def end(self) -> int:
        """Last token of every document."""
        return self.closing[-1]

    @property
    def settings(self) -> dict[str, list[int]]:
        """Settings for a stage's identity; empty if the only added token is one at the end.

        Earlier versions added no other token, so their outputs stay valid.
        """
        if not self.opening and len(self.closing) == 1:
            return {}
        return {"opening": list(self.opening), "closing": list(self.closing)}

    def around(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids of a document with its opening and closing tokens."""
        return [*_opened(ids, self.opening), *self.closing]


def frame_of(tokenizer: Any) -> Frame:
    """Return the tokens that begin and end a document.

    Raises:
        LoramError: If the tokenizer has no end-of-text token.
    """
    opening, closing = added_around(tokenizer)
    end = end_of_text(tokenizer)
    return Frame(opening, closing if end in closing else (*closing, end))


def end_of_text(tokenizer: Any) -> int:
    """Return the id of the end-of-text token, which is also used for padding.

    Raises:
        LoramError: If the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise LoramError(
            f"{tokenizer.name_or_path} must have an end-of-text token, but its tokenizer has none; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def ids_to_continue(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text to continue: with the opening tokens, without an end token."""
    opening, _ = added_around(tokenizer)
    return _opened(tokenizer(text, add_special_tokens=False)["input_ids"], opening)


def continuation(
    tokenizer: Any, prompt: Sequence[int], new: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Decode generated tokens after their prompt and return the text without the prompt's.

    Decoded alone, tokens can lose a leading space under SentencePiece, or a character whose first
    bytes are in the prompt.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Token ids of the prompt; the last few are enough.
        new: Generated token ids.
        skip_special_tokens: Whether to leave special tokens out of the text.
    """
    before, whole = tokenizer.batch_decode(
        [[*prompt], [*prompt, *new]], skip_special_tokens=skip_special_tokens
    )
    return str(whole[len(os.path.commonprefix([before, whole])) :])


def _opened(ids: Sequence[int], opening: tuple[int, ...]) -> list[int]:
    """Prepend the opening tokens unless the ids already begin with them."""
    return [*ids] if tuple(ids[: len(opening)]) == opening else [*opening, *ids]


def added_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids that the tokenizer adds before and after a text.

    They are determined from its output on a text, because flags such as ``add_bos_token`` may
    disagree with it.

    Raises:
        LoramError: If it adds tokens elsewhere.
    """
    for text in _PROBES:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for begin in range(len(whole) - len(plain) + 1) if plain else ():
            end = begin + len(plain)
            if whole[begin:end] == plain:
                return tuple(whole[:begin]), tuple(whole[end:])
    raise LoramError(
        f"{tokenizer.name_or_path} must have a tokenizer that adds special tokens only before and "
        "after a text; use its base's tokenizer files"
    )


def load_tokenizer(
    directory: Path | str, chat_template: Path | None = None, key: str = "chat_template"
) -> Any:
    """Load the tokenizer of a model directory.

    Args:
        directory: Directory of the model.
        chat_template: Jinja file that replaces the tokenizer's own chat template.
        key: Configuration key or option that named that file, for messages.

    Raises:
        LoramError: If transformers cannot load the tokenizer, or the file cannot be read.
    """
    from transformers import AutoTokenizer

    require_regular_files(directory)
    require_tokenizer_files(Path(directory))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise LoramError(
            f"{directory} has no tokenizer that Transformers can load ({first_line(error)}); copy "
            "the base's tokenizer files into it"
        ) from error
    _require_embedded(tokenizer, Path(directory))
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template, key)
    name = f"{directory}: chat_template" if chat_template is None else f"{key} {chat_template}"
    require_template(tokenizer.chat_template, name)
    return tokenizer


def _require_embedded(tokenizer: Any, directory: Path) -> None:
    """Reject tokenizers with a token id beyond the rows of the embeddings.

    Opening the weights checks that the embeddings have as many rows as ``config.json`` says.
    """
    if not (directory / "config.json").is_file():
        return
    config: dict[str, Any] = read_json(directory / "config.json")
    words = config.get("vocab_size") if isinstance(config, dict) else None
    if type(words) is not int:
        return
    beyond = [(number, token) for token, number in tokenizer.get_vocab().items() if number >= words]
    if beyond:
        number, token = min(beyond)
        raise LoramError(
            f"{directory}: token {token!r:.80} has id {number}, but the embeddings have {words} "
            "rows; resize the model's embeddings or remove the token from its tokenizer"
        )


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], **arguments: Any) -> str:
    """Apply a tokenizer's chat template, which is a program and may raise anything.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages of the conversation.
        arguments: Further arguments of `apply_chat_template`.

    Raises:
        LoramError: If the template takes too long.
    """
    try:
        text: str = within(
            RENDER_SECONDS,
            lambda: tokenizer.apply_chat_template(messages, tokenize=False, **arguments),
        )
    except TooLong as error:
        raise LoramError(
            f"the chat template must render a conversation within {RENDER_SECONDS:g} s, but takes "
            f"longer for {len(messages)} messages that begin with "
            f"{shown(messages[0].get('content'))}; use another template"
        ) from error
    return text


def read_template(path: Path, key: str) -> str:
    """Read a file with a chat template.

    Raises:
        LoramError: If it cannot be read as text.
    """
    if not os.path.lexists(path):
        raise LoramError(f"{key} {path} does not exist; check the path")
    return read_text(path, key, remedy="check the path")
