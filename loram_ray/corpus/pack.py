"""Tokenised documents, joined by the end-of-text token and cut into equal sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from loram_ray.errors import LoramError

_DOCUMENTS_AT_ONCE = 64


def end_of_text(tokenizer: Any) -> int:
    """Id of the token that closes a document, and pads.

    Raises:
        LoramError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise LoramError(
            f"{tokenizer.name_or_path} must have an end-of-text token, its tokenizer has none; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def tokenise(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield each document's token ids, closed by the end-of-text token, no others added."""
    closing = end_of_text(tokenizer)
    iterator = iter(documents)
    while batch := list(islice(iterator, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            yield [*ids, closing]


def pack(
    documents: Iterable[list[int]], sequence_length: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents and cut them into sequences; only the last one is padded.

    Args:
        documents: token ids.
        sequence_length: tokens in a sequence.
        padding: token id after the end of the last sequence.

    Returns:
        int32 ``[sequences, sequence_length]`` and the true length of each, int32 ``[sequences]``.
    """
    parts = [np.asarray(ids, dtype=np.int32) for ids in documents]
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    count = -(-len(tokens) // sequence_length)
    lengths = np.full(count, sequence_length, dtype=np.int32)
    if count:
        lengths[-1] = len(tokens) - (count - 1) * sequence_length
    padded = np.full(count * sequence_length, padding, dtype=np.int32)
    padded[: len(tokens)] = tokens
    return padded.reshape(count, sequence_length), lengths
