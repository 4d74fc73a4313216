"""Resolve paths and addresses of data: their file systems and the files below them."""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs

from loram_ray.addresses import credentials_error
from loram_ray.corpus.splits import matches
from loram_ray.errors import LoramError

_STORES = ("s3", "gs", "hf", "file")
_RETRY_SECONDS = 60


class Place:
    """Path or address, split into its scheme, the path inside its file system, and the query."""

    def __init__(self, path: str) -> None:
        if problem := credentials_error(path):
            raise LoramError(f"the data's address {problem}")
        scheme, separator, rest = path.partition("://")
        if not separator:
            self.scheme, self.inner, self._prefix, self._query = "", path, "", ""
            return
        if scheme not in _STORES:
            stores = ", ".join(f"{store}://" for store in _STORES)
            raise LoramError(
                f"{path} must be a local path or begin with {stores}; copy the data there"
            )
        rest, mark, query = rest.partition("?")
        authority, slash, key = rest.partition("/")
        if scheme == "file" and authority:
            raise LoramError(
                f"{path} must have three slashes after file: and no host; fix the address"
            )
        user, at, bucket = authority.rpartition("@")
        self.scheme, self.inner = scheme, bucket + slash + key
        self._prefix, self._query = f"{scheme}://{user}{at}", mark + query
        self._authority = authority

    @property
    def filesystem(self) -> fs.FileSystem:
        """File system of the path."""
        if self.scheme in ("", "file"):
            return fs.LocalFileSystem()
        return _store(self.scheme, self._authority, self._query)

    def name_of(self, inner: str) -> str:
        """Return a path of the same file system as the user would write it."""
        return f"{self._prefix}{inner.removeprefix('./')}{self._query}"


@functools.cache
def _store(scheme: str, authority: str, query: str) -> fs.FileSystem:
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
    if scheme == "gs" and "retry_limit_seconds=" not in query:
        # the default limit is 15 minutes
        query += ("&" if query else "?") + f"retry_limit_seconds={_RETRY_SECONDS}"
    return fs.FileSystem.from_uri(f"{scheme}://{authority}{query}")[0]


def matching(place: Place) -> list[fs.FileInfo]:
    """Return the files that match a glob; ``**`` matches any number of directories."""
    parts = place.inner.split("/")
    plain = _plain_parts(place)
    if plain == len(parts):
        return []
    base = folder_of(place)
    skipped = len(base.rstrip("/")) + 1
    return [
        info
        for info in walk(place, base, recursive=len(parts) - plain > 1 or parts[-1] == "**")
        if matches(info.path[skipped:].split("/"), parts[plain:])
    ]


def walk(place: Place, base: str, recursive: bool = True) -> list[fs.FileInfo]:
    """Return the files below a directory, except hidden files and those in hidden directories."""
    selector = fs.FileSelector(base, allow_not_found=True, recursive=recursive)
    skipped = len(base.rstrip("/"))
    return [
        info
        for info in place.filesystem.get_file_info(selector)
        if info.type == fs.FileType.File and "/." not in f"/{info.path[skipped:].lstrip('/')}"
    ]


def folder_of(place: Place) -> str:
    """Return the directory below which a glob's files are."""
    parts = place.inner.split("/")[: _plain_parts(place)]
    return "/".join(parts) or ("/" if place.inner.startswith("/") else ".")


def _plain_parts(place: Place) -> int:
    """Return the number of path components before the first pattern."""
    parts = place.inner.split("/")
    return next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn the errors of a store into one-line errors.

    Raises:
        LoramError: If ``what`` cannot be listed.
    """
    try:
        yield
    except LoramError:
        raise
    except Exception as error:  # each store raises its own exceptions
        raise LoramError(
            f"{what} cannot be listed ({in_one_line(error):.300}); check the address, the "
            "connection and your credentials"
        ) from error


def in_one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())
