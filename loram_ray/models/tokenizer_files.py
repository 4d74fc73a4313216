"""Tokenizer files of a model directory, checked before transformers reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from loram_ray.artifacts.model_config import Token
from loram_ray.errors import LoramError
from loram_ray.models.template_probe import fault_of_template
from loram_ray.utils.parsing import read_bytes, read_json, read_text
from loram_ray.utils.parsing.documents import Document, checked

_REMEDY = "copy the base's tokenizer files into it"
_SpecialToken = str | dict[str, Any] | None
_Count = Annotated[int, Field(ge=0)]


class _TokenizerConfig(Document):
    """Keys of ``tokenizer_config.json`` that transformers computes with."""

    tokenizer_class: str | None = None
    bos_token: _SpecialToken = None
    eos_token: _SpecialToken = None
    pad_token: _SpecialToken = None
    unk_token: _SpecialToken = None
    additional_special_tokens: list[str | dict[str, Any]] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    chat_template: str | list[dict[str, str]] | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


class _SpecialTokens(Document):
    """Schema of ``special_tokens_map.json``."""

    bos_token: _SpecialToken = None
    eos_token: _SpecialToken = None
    pad_token: _SpecialToken = None
    unk_token: _SpecialToken = None
    additional_special_tokens: list[str | dict[str, Any]] | None = None


class _Tokenizer(Document):
    """Schema of ``tokenizer.json``, whose parts the tokenizers library checks."""

    model: dict[str, Any]
    added_tokens: list[dict[str, Any]] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


class GenerationConfig(Document):
    """Keys of ``generation_config.json`` that generation computes with."""

    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None
    max_length: _Count | None = None
    max_new_tokens: _Count | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    num_beams: Annotated[int, Field(ge=1, le=1000)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=1000)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: _Count | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None


_DOCUMENTS: dict[str, type[Document]] = {
    "tokenizer.json": _Tokenizer,
    "tokenizer_config.json": _TokenizerConfig,
    "special_tokens_map.json": _SpecialTokens,
    "generation_config.json": GenerationConfig,
}
_OTHERS = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt")
_MAX_BYTES = 256 * 2**20


def require_tokenizer_files(directory: Path) -> None:
    """Reject tokenizer files that would hang their reader or have values of wrong types.

    Raises:
        LoramError: If a file is invalid; the message names the first one.
    """
    if not directory.is_dir():
        raise LoramError(f"{directory} is not a model directory; check the path")
    for name, model in _DOCUMENTS.items():
        path = directory / name
        if os.path.lexists(path):
            data: dict[str, Any] = read_json(path, limit=_MAX_BYTES, remedy=_REMEDY)
            checked(model, data, str(path), remedy=_REMEDY)
    for name in _OTHERS:
        if os.path.lexists(directory / name):
            read_bytes(directory / name, limit=_MAX_BYTES, remedy=_REMEDY)
    template = directory / "chat_template.jinja"
    if os.path.lexists(template):
        read_text(template, remedy=_REMEDY)


def require_template(template: Any, name: str) -> None:
    """Reject a chat template that is not valid Jinja or never ends.

    Args:
        template: A template, several templates by name, or None.
        name: Name of the template's source, for messages.

    Raises:
        LoramError: If the template is invalid; the message says what it must be.
    """
    several = template.values() if isinstance(template, dict) else [template]
    for text in several:
        if isinstance(text, str) and (fault := fault_of_template(text)) is not None:
            raise LoramError(f"{name} is not a usable chat template: it must be {fault}; fix it")
