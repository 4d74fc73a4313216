"""Files of text wherever they are: on disk, in an object store, on the Hugging Face hub.

The one place that knows file systems, kinds of files and compression. A file is named as the user
names it: a local path, or ``s3://``, ``gs://``, ``file://`` or ``hf://datasets/org/name/…``. What
follows ``?`` in an address is for the file system (``s3://bucket/key?endpoint_override=…``).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pyarrow import CompressedInputStream, NativeFile, fs

from loram_ray.errors import LoramError

_STORES = ("s3", "gs", "hf", "file")
_LINES, _COLUMNS = (".jsonl", ".txt"), (".parquet", ".arrow")
_TABLES = (".csv", ".tsv", ".json")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 2**20
_RETRY_SECONDS = 60
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
    stem, suffix = posixpath.splitext(_Place(path).inner)
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
    place = _Place(path)
    with _saying_why(f"{key} {path}"):
        [found] = place.filesystem.get_file_info([place.inner])
        if found.type == fs.FileType.File:
            infos = [found]
        elif found.type == fs.FileType.Directory:
            infos = _in_directory(place, key, kinds)
        else:
            infos = _matching(place)
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
    place = _Place(path)
    return place.filesystem.open_input_file(place.inner)


def read_lines(path: str) -> Iterator[bytes]:
    """Yield every line of a file, unpacked; memory does not grow with the file.

    Raises:
        LoramError: it is compressed and cut or damaged. How much was lost cannot be known, so it
            counts as no number of bad rows.
    """
    form, place, number = form_of(path), _Place(path), 0
    codec = form.codec if form is not None else None
    with place.filesystem.open_input_stream(place.inner, compression=None) as raw:
        try:
            stream = CompressedInputStream(raw, codec) if codec is not None else raw
            for line in io.BufferedReader(stream, _BUFFER):  # type: ignore[type-var]
                number += 1
                yield line
        except OSError as error:
            if codec is None:
                raise
            raise LoramError(
                f"{path} is cut or damaged past line {number} ({_in_one_line(error)}); get the "
                "file again, or leave it out"
            ) from error


def identify_file(file: DataFile) -> str:
    """What tells a file's content from another's, without reading much of what is large or far.

    A local file's SHA-256, over 256 MiB of both ends alone; on the hub the blob's id; in an object
    store the time of the last change.
    """
    place = _Place(file.path)
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


class _Place:
    """A path taken apart: the scheme, what the file system calls it, and what is for that."""

    def __init__(self, path: str) -> None:
        scheme, separator, rest = path.partition("://")
        if not separator:
            self.scheme, self.inner, self._prefix, self._query = "", path, "", ""
            return
        if scheme not in _STORES:
            stores = ", ".join(f"{store}://" for store in _STORES)
            raise LoramError(f"{path} must be a local path or begin with {stores}; copy it there")
        rest, mark, query = rest.partition("?")
        authority, slash, key = rest.partition("/")
        if scheme == "file" and authority:
            raise LoramError(f"{path} must have three slashes after file:, and no host; mend it")
        user, at, bucket = authority.rpartition("@")
        self.scheme, self.inner = scheme, bucket + slash + key
        self._prefix, self._query = f"{scheme}://{user}{at}", mark + query
        self._authority = authority

    @property
    def filesystem(self) -> fs.FileSystem:
        if self.scheme in ("", "file"):
            return fs.LocalFileSystem()
        return _store(self.scheme, self._authority, self._query)

    def name_of(self, inner: str) -> str:
        """Return how the user would name something on the same file system."""
        return f"{self._prefix}{inner.removeprefix('./')}{self._query}"


@functools.cache
def _store(scheme: str, authority: str, query: str) -> fs.FileSystem:
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
    if scheme == "gs" and "retry_limit_seconds=" not in query:
        # by itself it would try for a quarter of an hour
        query += ("&" if query else "?") + f"retry_limit_seconds={_RETRY_SECONDS}"
    return fs.FileSystem.from_uri(f"{scheme}://{authority}{query}")[0]


def _in_directory(place: _Place, key: str, kinds: Kinds) -> list[fs.FileInfo]:
    infos = _walk(place, place.inner)
    by_path = {info.path: info for info in infos}
    for path in by_path:
        if posixpath.basename(path) == "dataset_dict.json":
            splits = _read_object(place, path).get("splits", [])
            folder = place.name_of(posixpath.dirname(path))
            raise LoramError(
                f"{key} must be one split of a dataset, {folder} holds {', '.join(splits)}; "
                f"write {folder}/{splits[0] if splits else 'train'}"
            )
    saved: dict[str, set[str]] = {}
    for path in by_path:
        if posixpath.basename(path) == "state.json":
            folder = posixpath.dirname(path)
            entries = _read_object(place, path).get("_data_files")
            if entries is not None:
                saved[folder] = {posixpath.join(folder, entry["filename"]) for entry in entries}
    missing = sorted(set().union(*saved.values()) - set(by_path))
    if missing:
        raise LoramError(f"{place.name_of(missing[0])} is missing; copy the dataset again")
    kept = []
    for path, info in by_path.items():
        folder = posixpath.dirname(path)
        is_cache = path.endswith(".arrow") and folder in saved and path not in saved[folder]
        form = form_of(path)
        is_read = form is not None and form.kind in kinds.names and form.kind != ".json"
        if is_read and not is_cache:
            kept.append(info)
    return kept


def _matching(place: _Place) -> list[fs.FileInfo]:
    """Files that a glob matches; ``**`` stands for any number of folders."""
    parts = place.inner.split("/")
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if plain == len(parts):
        return []
    base = "/".join(parts[:plain]) or ("/" if place.inner.startswith("/") else ".")
    skipped = len(base.rstrip("/")) + 1
    return [
        info
        for info in _walk(place, base, recursive=len(parts) - plain > 1 or parts[-1] == "**")
        if _matches(info.path[skipped:].split("/"), parts[plain:])
    ]


def _walk(place: _Place, base: str, recursive: bool = True) -> list[fs.FileInfo]:
    """Files below a folder, hidden ones and those in hidden folders excepted."""
    selector = fs.FileSelector(base, allow_not_found=True, recursive=recursive)
    skipped = len(base.rstrip("/"))
    return [
        info
        for info in place.filesystem.get_file_info(selector)
        if info.type == fs.FileType.File and "/." not in f"/{info.path[skipped:].lstrip('/')}"
    ]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _read_object(place: _Place, path: str) -> dict[str, Any]:
    with place.filesystem.open_input_stream(path) as stream:
        try:
            value = json.loads(stream.read())
        except ValueError as error:
            raise LoramError(
                f"{place.name_of(path)} is not JSON ({error}); copy the dataset again"
            ) from error
    return value if isinstance(value, dict) else {}


@contextmanager
def _saying_why(what: str) -> Iterator[None]:
    try:
        yield
    except LoramError:
        raise
    except Exception as error:  # each store has errors of its own
        raise LoramError(
            f"{what} cannot be listed ({_in_one_line(error):.300}); check the address, the "
            "connection and your credentials"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
