"""Tokenised documents, each begun and ended as the tokenizer does it, cut into equal sequences.

A document that is cut begins again in the next sequence: models that lean on their first token
(Llama, Gemma) are lost without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loram_ray.errors import LoramError
from loram_ray.models.tokenizer import end_of_text, frame_of

_DOCUMENTS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 2**20


def tokenise(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield each document's token ids with those that begin and end it; see `frame_of`."""
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if _is_full(batch):
            yield from tokenise_batch(tokenizer, batch)
            batch = []
    yield from tokenise_batch(tokenizer, batch)


def _is_full(batch: list[str]) -> bool:
    return len(batch) >= _DOCUMENTS_AT_ONCE or sum(map(len, batch)) >= _CHARACTERS_AT_ONCE


def tokenise_batch(tokenizer: Any, documents: list[str]) -> list[list[int]]:
    """Return each document's token ids, as `tokenise` yields them."""
    frame = frame_of(tokenizer)
    if not documents:
        return []
    encoded = tokenizer(
        documents, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [frame.around(ids) for ids in encoded["input_ids"]]


def pack(
    documents: Iterable[Sequence[int] | np.ndarray],
    sequence_length: int,
    padding: int,
    opening: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents and cut them into sequences; only the last one is padded.

    Args:
        documents: token ids; each begins with the opening.
        sequence_length: tokens in a sequence.
        padding: token id after the end of the last sequence.
        opening: token ids that every sequence begins with.

    Returns:
        int32 ``[sequences, sequence_length]`` and the true length of each, int32 ``[sequences]``.

    Raises:
        LoramError: the opening fills a sequence.
    """
    parts: list[np.ndarray] = []
    filled = 0
    for ids in documents:
        parts.append(_opened_again(ids, filled, sequence_length, opening))
        filled += len(parts[-1])
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    count = -(-len(tokens) // sequence_length)
    lengths = np.full(count, sequence_length, dtype=np.int32)
    if count:
        lengths[-1] = len(tokens) - (count - 1) * sequence_length
    padded = np.full(count * sequence_length, padding, dtype=np.int32)
    padded[: len(tokens)] = tokens
    return padded.reshape(count, sequence_length), lengths


def _opened_again(
    ids: Sequence[int] | np.ndarray, filled: int, sequence_length: int, opening: Sequence[int]
) -> np.ndarray:
    """Put the opening where a document goes on in another sequence, int32 ``[tokens]``.

    Args:
        ids: of the document, which begins with the opening.
        filled: tokens of all documents before it.
        sequence_length: tokens in a sequence.
        opening: token ids.
    """
    document = np.asarray(ids, dtype=np.int32)
    room = sequence_length - filled % sequence_length
    if not opening or len(document) <= room:
        return document
    inner = sequence_length - len(opening)
    if inner < 1:
        raise LoramError(
            f"a sequence must be longer than the {len(opening)} tokens that the tokenizer begins "
            f"each text with, got {sequence_length}; raise sequence_length or max_length"
        )
    rest = document[max(room, len(opening)) :]
    rows = -(-len(rest) // inner)
    again = np.empty((rows, sequence_length), dtype=np.int32)
    again[:, : len(opening)] = opening
    again[:, len(opening) :] = np.pad(rest, (0, rows * inner - len(rest))).reshape(rows, inner)
    return np.concatenate([document[:room], again.reshape(-1)[: len(rest) + rows * len(opening)]])


class PackedFile:
    """A Parquet file of packed sequences, written as the documents come.

    The columns are ``row_id`` int64, ``input_ids`` a list of ``sequence_length`` int32, and
    ``length`` int32. Memory is that of a batch of documents and of a row group, however many
    documents there are; the file is the same however they come.

    Args:
        path: written to a sibling that is renamed by `close`.
        tokenizer: of the model.
        sequence_length: tokens in a sequence.
        rows_per_group: rows of a row group.
        first_row_id: id of the first sequence; the others follow.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        sequence_length: int,
        rows_per_group: int,
        first_row_id: int,
    ) -> None:
        self.sequences = self.tokens = 0
        self._path, self._partial = path, path.with_suffix(".tmp")
        self._tokenizer, self._length, self._rows = tokenizer, sequence_length, rows_per_group
        self._padding, self._opening = end_of_text(tokenizer), frame_of(tokenizer).opening
        self._next_id = first_row_id
        self._batch: list[str] = []
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._schema = pa.schema(
            {
                "row_id": pa.int64(),
                "input_ids": pa.list_(pa.int32(), sequence_length),
                "length": pa.int32(),
            }
        )
        self._writer = pq.ParquetWriter(self._partial, self._schema)

    def add(self, document: str) -> None:
        """Take one more document."""
        self._batch.append(document)
        if _is_full(self._batch):
            self._tokenise()

    def _tokenise(self) -> None:
        """Tokenise the documents at hand and write the row groups that are full."""
        for ids in tokenise_batch(self._tokenizer, self._batch):
            part = _opened_again(ids, self._count, self._length, self._opening)
            self._waiting.append(part)
            self._count += len(part)
        self._batch = []
        group = self._rows * self._length
        if self._count >= group:
            tokens = np.concatenate(self._waiting)
            whole = len(tokens) // group * group
            for start in range(0, whole, group):
                self._write(tokens[start : start + group])
            self._waiting, self._count = [tokens[whole:].copy()], len(tokens) - whole

    def close(self) -> None:
        """Write the rest, of which the last sequence is padded, and put the file in its place."""
        self._tokenise()
        if self._count or not self.sequences:
            self._write(np.concatenate([*self._waiting, np.zeros(0, dtype=np.int32)]))
        self._writer.close()
        self._partial.replace(self._path)

    def _write(self, tokens: np.ndarray) -> None:
        rows, lengths = pack([tokens], self._length, self._padding)
        row_ids = self._next_id + np.arange(len(rows), dtype=np.int64)
        input_ids = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self._length)
        table = pa.table([pa.array(row_ids), input_ids, pa.array(lengths)], schema=self._schema)
        self._writer.write_table(table, row_group_size=self._rows)
        self._next_id += len(rows)
        self.sequences += len(rows)
        self.tokens += len(tokens)
