"""Loading tokenizers, without the modelling code of transformers: it takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from loram_ray.errors import LoramError, first_line


def load_tokenizer(
    directory: Path | str, chat_template: Path | None = None, key: str = "chat_template"
) -> Any:
    """Load the tokenizer of a model directory.

    Args:
        directory: the model.
        chat_template: Jinja file, instead of the tokenizer's own chat template.
        key: configuration key or option of that file, for messages.

    Raises:
        LoramError: there is none that transformers can read, or the file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise LoramError(
            f"{directory} has no tokenizer that transformers can load ({first_line(error)}); "
            "copy the base's tokenizer files into it"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template, key)
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise LoramError(
                f"{key} {chat_template} is no chat template: {error} in line {error.lineno}; "
                "mend it"
            ) from error
        except TemplateError:  # it refuses this conversation, and says so of others when they come
            pass
    return tokenizer


def read_template(path: Path, key: str) -> str:
    """Read a file with a chat template.

    Raises:
        LoramError: it cannot be read as text.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LoramError(f"{key} {path} cannot be read ({error}); check the path") from error
