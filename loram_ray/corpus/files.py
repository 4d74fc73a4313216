"""Find and open text files on disk, in object stores and on the Hugging Face Hub.

This is the only module that knows file systems, file formats and compression. A file keeps the name
that the user gave: a local path, or ``s3://``, ``gs://``, ``file://`` or
``hf://datasets/org/name/…``. Anything after ``?`` in an address configures the file system
(``s3://bucket/key?endpoint_override=…``).
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import CompressedInputStream, NativeFile, fs

from loram_ray.corpus.encoding import refuse_other_encodings
from loram_ray.corpus.folders import refuse_mixed_splits, saved_datasets
from loram_ray.corpus.places import Place, folder_of, in_one_line, matching, one_line_errors, walk
from loram_ray.errors import LoramError

_LINES, _COLUMNS = (".jsonl", ".txt"), (".parquet", ".arrow")
_TABLES = (".csv", ".tsv", ".json")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 2**20
_HASHED_WHOLE = 2**28
_HASHED_ENDS = 2**20


@dataclass(frozen=True)
class Kinds:
    """Set of supported file formats.

    Attributes:
        names: File name suffixes, without those of compression.
        description: List of the formats for error messages.
    """

    names: tuple[str, ...]
    description: str


TEXT = Kinds(
    _LINES + _COLUMNS,
    ".jsonl, .txt (both also .gz, .zst), .json.gz, .json.zst, .parquet, .arrow",
)
"""Formats of corpus files."""
EXAMPLES = Kinds(TEXT.names + _TABLES, f"{TEXT.description}, .json, .csv, .tsv")
"""Formats of fine-tuning data."""


@dataclass(frozen=True)
class Form:
    """Format and compression of a file.

    Attributes:
        kind: ``.jsonl``, ``.txt``, ``.parquet``, ``.arrow``, ``.csv``, ``.tsv`` or ``.json``.
        codec: ``gzip`` or ``zstd`` for a compressed file, which can only be read from its
            beginning.
    """

    kind: str
    codec: str | None = None


@dataclass(frozen=True)
class DataFile:
    """File of text.

    Attributes:
        path: Path in the form the source uses.
        name: Last component of the path.
        form: Format and compression.
        size: Size in bytes.
        modified: Modification time in nanoseconds since the epoch, if the file system records it.
    """

    path: str
    name: str
    form: Form
    size: int
    modified: int | None


def form_of(path: str) -> Form | None:
    """Return the format of a file by its name, or None if it is not supported."""
    stem, suffix = posixpath.splitext(Place(path).inner)
    if suffix not in _CODECS:
        return Form(suffix) if suffix in EXAMPLES.names else None
    kind = posixpath.splitext(stem)[1]
    if kind == ".json":  # C4 and other datasets use this name for JSON Lines
        kind = ".jsonl"
    return Form(kind, _CODECS[suffix]) if kind in _LINES else None


def list_files(path: str, key: str, kinds: Kinds = TEXT) -> list[DataFile]:
    """Return the sorted files that a path, an address or a glob names.

    A directory stands for all its supported files at any depth, except hidden files and ``.json``,
    which is rarely data there. A directory saved by ``datasets`` stands for the files listed in its
    ``state.json``.

    Args:
        path: Path, address or glob of a source.
        key: Configuration key of the path for error messages.
        kinds: Supported formats.

    Raises:
        LoramError: If there are no files, or the format or file system is not supported.
    """
    place = Place(path)
    with one_line_errors(f"{key} {path}"):
        [found] = place.filesystem.get_file_info([place.inner])
        if found.type == fs.FileType.File:
            infos = [found]
        elif found.type == fs.FileType.Directory:
            infos = _in_directory(place, key, kinds)
        else:
            infos = matching(place)
            refuse_mixed_splits(place, folder_of(place), [info.path for info in infos], key)
    files = []
    for info in sorted(infos, key=lambda info: info.path):
        name = place.name_of(info.path)
        form = form_of(name)
        if form is None or form.kind not in kinds.names:
            raise LoramError(
                f"{key} must name files in the formats {kinds.description}, got {name}; convert it"
            )
        files.append(DataFile(name, info.base_name, form, info.size, info.mtime_ns))
    if not files:
        remedy = (
            "check the path"
            if "://" in path
            else ("check the path (on the Hub: hf://datasets/org/name)")
        )
        raise LoramError(
            f"{key} must name files in the formats {kinds.description}, but {path} "
            f"has none; {remedy}"
        )
    return files


def open_at(path: str, position: int = 0) -> io.BufferedReader:
    """Open an uncompressed file at a byte offset."""
    file = open_random(path)
    file.seek(position)
    return io.BufferedReader(file, _BUFFER)  # type: ignore[type-var]


def open_random(path: str) -> NativeFile:
    """Open a file for random access."""
    place = Place(path)
    return place.filesystem.open_input_file(place.inner)


def read_lines(path: str) -> Iterator[bytes]:
    """Yield each line of a file, decompressed; memory does not grow with the file.

    Raises:
        LoramError: If the file is not line-based UTF-8 text, or is compressed and truncated or
            damaged. The amount of lost data is unknown, so it never counts as bad rows.
    """
    form, place, number = form_of(path), Place(path), 0
    codec = form.codec if form is not None else None
    with place.filesystem.open_input_stream(place.inner, compression=None) as raw:
        try:
            stream = CompressedInputStream(raw, codec) if codec is not None else raw
            reader = io.BufferedReader(stream, _BUFFER)  # type: ignore[type-var]
            refuse_other_encodings(reader.peek(), path)
            for line in reader:
                number += 1
                yield line
        except OSError as error:
            if codec is None:
                raise
            raise LoramError(
                f"{path} is truncated or damaged past line {number} ({in_one_line(error)}); "
                "download it again or remove it"
            ) from error


def identify_file(file: DataFile) -> str:
    """Return an identifier of a file's content without reading much of a large or remote file.

    Local files use SHA-256, over both ends only above 256 MiB; files on the Hub their blob id;
    files in an object store their modification time.
    """
    place = Place(file.path)
    if place.scheme == "hf":
        return str(place.filesystem.handler.fs.info(place.inner)["blob_id"])
    if place.scheme not in ("", "file") and file.modified is not None:
        return f"modified {file.modified}"
    if file.size <= _HASHED_WHOLE:
        return hash_content(file.path)
    with open_random(file.path) as stream:
        digest = hashlib.sha256(stream.read(_HASHED_ENDS))
        stream.seek(file.size - _HASHED_ENDS)
        digest.update(stream.read(_HASHED_ENDS))
    return digest.hexdigest()


def hash_content(path: str) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_random(path) as stream:
        while piece := stream.read(_BUFFER):
            digest.update(piece)
    return digest.hexdigest()


def _in_directory(place: Place, key: str, kinds: Kinds) -> list[fs.FileInfo]:
    by_path = {info.path: info for info in walk(place, place.inner)}
    saved = saved_datasets(place, by_path, key)
    kept = []
    for path, info in by_path.items():
        dataset = saved.get(posixpath.dirname(path))
        is_cache = path.endswith(".arrow") and dataset is not None and path not in dataset.files
        form = form_of(path)
        is_read = form is not None and form.kind in kinds.names and form.kind != ".json"
        if is_read and not is_cache:
            kept.append(info)
    recorded = {path: dataset.split for dataset in saved.values() for path in dataset.files}
    refuse_mixed_splits(place, place.inner, [info.path for info in kept], key, recorded)
    return kept
