"""Files of text wherever they are: on disk, in an object store, on the Hugging Face hub.

The one place that knows file systems, kinds of files and compression. A file is named as the user
names it: a local path, or ``s3://``, ``gs://``, ``file://`` or ``hf://datasets/org/name/…``. What
follows ``?`` in an address is for the file system (``s3://bucket/key?endpoint_override=…``).
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import CompressedInputStream, NativeFile, fs

from loram_ray.corpus.encoding import refuse_other_encodings
from loram_ray.corpus.folders import refuse_several, saved_datasets
from loram_ray.corpus.places import Place, folder_of, in_one_line, matching, saying_why, walk
from loram_ray.errors import LoramError

_LINES, _COLUMNS = (".jsonl", ".txt"), (".parquet", ".arrow")
_TABLES = (".csv", ".tsv", ".json")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 2**20
_HASHED_WHOLE = 2**28
_HASHED_ENDS = 2**20


@dataclass(frozen=True)
class Kinds:
    """Kinds of files that somebody reads.

    Attributes:
        names: endings, those of compression excepted.
        said: how a message lists them.
    """

    names: tuple[str, ...]
    said: str


TEXT = Kinds(
    _LINES + _COLUMNS,
    ".jsonl, .txt (both also .gz, .zst), .json.gz, .json.zst, .parquet, .arrow",
)
"""What a corpus is made of."""
EXAMPLES = Kinds(TEXT.names + _TABLES, f"{TEXT.said}, .json, .csv, .tsv")
"""What examples to learn from are kept in."""


@dataclass(frozen=True)
class Form:
    """How a file is read.

    Attributes:
        kind: ``.jsonl``, ``.txt``, ``.parquet``, ``.arrow``, ``.csv``, ``.tsv`` or ``.json``.
        codec: ``gzip`` or ``zstd`` of a file that can only be read from its beginning.
    """

    kind: str
    codec: str | None = None


@dataclass(frozen=True)
class DataFile:
    """A file of text.

    Attributes:
        path: as its source names it.
        name: the last part.
        form: how it is read.
        size: bytes.
        modified: nanoseconds since the epoch, where the file system says.
    """

    path: str
    name: str
    form: Form
    size: int
    modified: int | None


def form_of(path: str) -> Form | None:
    """Return how a file is read, by its name, or None where it is not."""
    stem, suffix = posixpath.splitext(Place(path).inner)
    if suffix not in _CODECS:
        return Form(suffix) if suffix in EXAMPLES.names else None
    kind = posixpath.splitext(stem)[1]
    if kind == ".json":  # so C4 and others name JSON lines
        kind = ".jsonl"
    return Form(kind, _CODECS[suffix]) if kind in _LINES else None


def list_files(path: str, key: str, kinds: Kinds = TEXT) -> list[DataFile]:
    """Return the files that a path, an address or a glob names, sorted.

    Of a directory that is every file of a kind that is read, at any depth, hidden ones excepted,
    and ``.json``, which rarely is data there; of one saved by ``datasets`` the files that its
    ``state.json`` names.

    Args:
        path: what a source names.
        key: its configuration key, for messages.
        kinds: what is read.

    Raises:
        LoramError: there are none, a kind of file that is not read, or no such file system.
    """
    place = Place(path)
    with saying_why(f"{key} {path}"):
        [found] = place.filesystem.get_file_info([place.inner])
        if found.type == fs.FileType.File:
            infos = [found]
        elif found.type == fs.FileType.Directory:
            infos = _in_directory(place, key, kinds)
        else:
            infos = matching(place)
            refuse_several(place, folder_of(place), [info.path for info in infos], key)
    files = []
    for info in sorted(infos, key=lambda info: info.path):
        name = place.name_of(info.path)
        form = form_of(name)
        if form is None or form.kind not in kinds.names:
            raise LoramError(f"{key} must name files of {kinds.said}, got {name}; convert it")
        files.append(DataFile(name, info.base_name, form, info.size, info.mtime_ns))
    if not files:
        remedy = "check it" if "://" in path else "check it (of the hub: hf://datasets/org/name)"
        raise LoramError(f"{key} must name files of {kinds.said}, {path} has none; {remedy}")
    return files


def open_at(path: str, position: int = 0) -> io.BufferedReader:
    """Open a file that is not compressed, at a byte."""
    file = open_random(path)
    file.seek(position)
    return io.BufferedReader(file, _BUFFER)  # type: ignore[type-var]


def open_random(path: str) -> NativeFile:
    """Open a file for reading at any place."""
    place = Place(path)
    return place.filesystem.open_input_file(place.inner)


def read_lines(path: str) -> Iterator[bytes]:
    """Yield every line of a file, unpacked; memory does not grow with the file.

    Raises:
        LoramError: it is not UTF-8 text in lines; or it is compressed and cut or damaged. How much
            was lost cannot be known, so it counts as no number of bad rows.
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
                f"{path} is cut or damaged past line {number} ({in_one_line(error)}); get the "
                "file again, or leave it out"
            ) from error


def identify_file(file: DataFile) -> str:
    """What tells a file's content from another's, without reading much of what is large or far.

    A local file's SHA-256, over 256 MiB of both ends alone; on the hub the blob's id; in an object
    store the time of the last change.
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
    """SHA-256 of a file."""
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
    refuse_several(place, place.inner, [info.path for info in kept], key, recorded)
    return kept
