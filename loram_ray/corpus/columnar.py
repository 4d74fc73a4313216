"""Open Parquet and Arrow files without running code from them.

As soon as Arrow reads a schema, it rebuilds extension types with the class registered in the
process, and that class may run anything: values of Ray's ``ray.data.arrow_pickled_object``,
registered by ``import ray.data``, are unpickled. The raw bytes of a schema are therefore searched
for extension types before Arrow interprets them, and files that use one are refused.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.lib import ArrowException

from loram_ray.errors import LoramError
from loram_ray.utils.files import open_descriptor

_EXTENSION, _HARMLESS = b"ARROW:extension:name", b"ARROW:extension_name"
_ARROW_SCHEMA = b"ARROW:schema"
_ARROW_MAGIC, _PARQUET_MAGIC = b"ARROW1", b"PAR1"
_TAIL = 2**16


def open_parquet(source: Path | pa.NativeFile, name: str, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a Parquet file, refusing extension types.

    Args:
        source: Local path or open file.
        name: Name of the file in error messages.
        buffer_size: Bytes to read at once; 0 reads whole column chunks.

    Raises:
        LoramError: If this is not a Parquet file, has an extension type, or repeats a column name.
    """
    try:
        file = _opened(source) if isinstance(source, Path) else source
        footer = _footer(file, _PARQUET_MAGIC, 0)
        for serialised in _arrow_schemas_in(footer):
            _refuse_extensions(serialised, _schema_of_message, name)
        # open with the footer that was checked
        metadata = _metadata_of(footer)
        opened = pq.ParquetFile(
            file, metadata=metadata, buffer_size=buffer_size, arrow_extensions_enabled=False
        )
        schema = opened.schema_arrow
    except (ArrowException, OSError, binascii.Error) as error:
        reason = " ".join(str(error).split())
        raise LoramError(f"{name} is not a Parquet file ({reason}); download it again") from error
    _refuse_repeated_fields(schema, name)
    return opened


def _opened(path: Path) -> pa.OSFile:
    """A regular file; pyarrow would wait for a FIFO's other end."""
    os.close(open_descriptor(path))
    return pa.OSFile(str(path))


def arrow_batches(file: pa.NativeFile, name: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file or stream, refusing extension types.

    Args:
        file: File opened at its beginning.
        name: Name of the file in error messages.

    Raises:
        LoramError: If there is an extension type or a repeated column name.
        ArrowException: If the file is truncated or damaged.
    """
    is_stream = file.read(len(_ARROW_MAGIC)) != _ARROW_MAGIC
    if is_stream:
        file.seek(0)
        _refuse_extensions(_first_message(file), _schema_of_message, name)
        file.seek(0)
        reader = pa.ipc.open_stream(file)
        batches = iter(reader)
    else:
        _refuse_extensions(_footer(file, _ARROW_MAGIC, 2), _schema_of_footer, name)
        file.seek(0)
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    _refuse_repeated_fields(reader.schema, name)
    yield from batches


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Refuse repeated column names.

    Raises:
        LoramError: If a name occurs twice; unnamed columns are not compared.
    """
    seen = {""}
    for name in names:
        if name and name in seen:
            raise LoramError(
                f"{where} must have one column '{name}', but has several; rename the others"
            )
        seen.add(name)


def _refuse_repeated_fields(fields: Iterable[pa.Field], where: str) -> None:
    """Refuse repeated field names at any depth, since a row becomes a dictionary."""
    listed = list(fields)
    refuse_repeated([field.name for field in listed], where)
    for field in listed:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not pa.types.is_union(kind):
            _refuse_repeated_fields((kind.field(n) for n in range(kind.num_fields)), where)


def _footer(file: pa.NativeFile, magic: bytes, padding: int) -> bytes:
    """Read the footer that ends both formats, before its length (four bytes) and the magic bytes.

    Args:
        file: Open file.
        magic: Magic bytes of the format.
        padding: Number of bytes after the magic bytes at the start of the file.
    """
    size, closing = file.size(), 4 + len(magic)
    file.seek(max(size - _TAIL, 0))
    tail = file.read(_TAIL)  # a single round trip for a remote file
    length = int.from_bytes(tail[-closing : -len(magic)], "little", signed=True)
    if not tail.endswith(magic) or not 0 < length <= size - closing - len(magic) - padding:
        raise pa.ArrowInvalid("it does not end with a footer")
    if length + closing > len(tail):
        file.seek(size - closing - length)
        tail = file.read(length + closing)
    return bytes(tail[-closing - length : -closing])


def _metadata_of(footer: bytes) -> pq.FileMetaData:
    """Return the metadata in a Parquet footer, without the file's data."""
    whole = _PARQUET_MAGIC + footer + len(footer).to_bytes(4, "little") + _PARQUET_MAGIC
    return pq.ParquetFile(pa.BufferReader(whole), arrow_extensions_enabled=False).metadata


def _arrow_schemas_in(footer: bytes) -> list[bytes]:
    """Return the Arrow schemas in a Parquet footer, of which Arrow would rebuild the first.

    Their keys are replaced by others of the same length, which Arrow does not recognise.
    """
    number = itertools.count()
    names = [b"ARROW:%06d" % next(number) for _ in range(footer.count(_ARROW_SCHEMA))]
    parts = footer.split(_ARROW_SCHEMA)
    renamed = b"".join(x for pair in zip(parts, [*names, b""], strict=True) for x in pair)
    found = _metadata_of(renamed).metadata or {}
    return [base64.b64decode(found[name], validate=True) for name in names if name in found]


def _first_message(file: pa.NativeFile) -> bytes:
    """Return the raw bytes of an Arrow stream's first message, its schema, without parsing it."""
    try:
        message = pa.ipc.read_message(file)
    except EOFError as error:
        raise pa.ArrowInvalid("it is empty") from error
    return bytes(message.serialize())


def _schema_of_message(message: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(message))


def _schema_of_footer(footer: bytes) -> pa.Schema:
    opening, closing = _ARROW_MAGIC + b"\0\0", len(footer).to_bytes(4, "little") + _ARROW_MAGIC
    return pa.ipc.open_file(pa.BufferReader(opening + footer + closing)).schema


def _refuse_extensions(schema: bytes, parse: Callable[[Any], pa.Schema], name: str) -> None:
    """Refuse extension types.

    Args:
        schema: Schema as serialised by Arrow; its metadata keys appear as raw bytes.
        parse: Function that parses the schema.
        name: Name of the file.

    Raises:
        LoramError: If there is an extension type; the message names the first.
    """
    if _EXTENSION not in schema:
        return
    harmless = parse(schema.replace(_EXTENSION, _HARMLESS))
    found = (pair for field in harmless for pair in _extensions_in(field))
    column, kind = next(found, ("?", "?"))
    raise LoramError(
        f"{name} must have columns of plain types, but '{column}' has the extension type '{kind}', "
        "and reading it could run code; write the file without that column"
    )


def _extensions_in(field: pa.Field) -> Iterator[tuple[str, str]]:
    kind = (field.metadata or {}).get(_HARMLESS)
    if kind is not None:
        yield field.name, kind.decode(errors="replace")
    type_ = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    for number in range(type_.num_fields):
        for name, inner in _extensions_in(type_.field(number)):
            yield f"{field.name}.{name}", inner
