"""Pack tokenised documents into sequences of equal length.

Each document gets the tokenizer's opening and end tokens. A document that continues in another
sequence gets the opening there again: models that rely on their first token (Llama, Gemma) degrade
without it.
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

DOCUMENTS_AT_ONCE = 512
CHARACTERS_AT_ONCE = 2**20


def tokenise(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield each document's token ids, with its opening and end tokens; see `frame_of`."""
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if _is_full(batch):
            yield from tokenise_batch(tokenizer, batch)
            batch = []
    yield from tokenise_batch(tokenizer, batch)


def _is_full(batch: list[str]) -> bool:
    return len(batch) >= DOCUMENTS_AT_ONCE or sum(map(len, batch)) >= CHARACTERS_AT_ONCE


def tokenise_batch(tokenizer: Any, documents: list[str]) -> list[list[int]]:
    """Return each document's token ids, in the form that `tokenise` yields."""
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
    """Concatenate documents and cut them into sequences; only the last one is padded.

    Args:
        documents: Token ids of each document, starting with the opening.
        sequence_length: Number of tokens per sequence.
        padding: Token id that pads the last sequence.
        opening: Token ids that start every sequence.

    Returns:
        Sequences, int32 ``[sequences, sequence_length]``, and their lengths without padding, int32
        ``[sequences]``.

    Raises:
        LoramError: If the opening fills a whole sequence.
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
    """Insert the opening wherever a document continues in another sequence, int32 ``[tokens]``.

    Args:
        ids: Token ids of the document, starting with the opening.
        filled: Number of tokens in all earlier documents.
        sequence_length: Number of tokens per sequence.
        opening: Token ids of the opening.
    """
    document = np.asarray(ids, dtype=np.int32)
    room = sequence_length - filled % sequence_length
    if not opening or len(document) <= room:
        return document
    inner = sequence_length - len(opening)
    if inner < 1:
        raise LoramError(
            f"a sequence must be longer than the {len(opening)} tokens with which the tokenizer "
            f"starts each text, got {sequence_length}; raise sequence_length or max_length"
        )
    rest = document[max(room, len(opening)) :]
    rows = -(-len(rest) // inner)
    again = np.empty((rows, sequence_length), dtype=np.int32)
    again[:, : len(opening)] = opening
    again[:, len(opening) :] = np.pad(rest, (0, rows * inner - len(rest))).reshape(rows, inner)
    return np.concatenate([document[:room], again.reshape(-1)[: len(rest) + rows * len(opening)]])


class PackedFile:
    """Write packed sequences to a Parquet file, one document at a time.

    The columns are ``row_id`` (int64), ``input_ids`` (list of ``sequence_length`` int32) and
    ``length`` (int32). Memory is bounded by a batch of documents and a row group, and the file does
    not depend on how documents are batched.

    Args:
        path: Path of the file; it is written beside this path and renamed by `close`.
        tokenizer: Tokenizer of the model.
        sequence_length: Number of tokens per sequence.
        rows_per_group: Number of rows per row group.
        first_row_id: Id of the first sequence; the others count up from it.
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
        """Add a document."""
        self._batch.append(document)
        if _is_full(self._batch):
            self._tokenise()

    def _tokenise(self) -> None:
        """Tokenise the buffered documents and write the row groups that are full."""
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
        """Write the remaining sequences, pad the last one, and move the file into place."""
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
