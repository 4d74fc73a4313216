"""Handle dataset directories: those written by ``save_to_disk``, and those with several splits."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from loram_ray.corpus.places import Place
from loram_ray.corpus.splits import Declared, Several, declared_in, mixed_splits, selecting
from loram_ray.errors import LoramError
from loram_ray.utils.parsing import parse_json

_README_BYTES = 2**20
_STATE_BYTES = 64 * 2**20
_README_LEVELS = 3
_TOP_PARTS = {"hf": 3}
"""Number of components in the shortest address of a dataset; for other stores a bucket suffices."""


@dataclass(frozen=True)
class SavedDataset:
    """Content of a saved dataset's ``state.json``.

    Attributes:
        files: Paths of the data files.
        split: Name of the split, if recorded.
    """

    files: frozenset[str]
    split: str | None


def saved_datasets(place: Place, paths: Collection[str], key: str) -> dict[str, SavedDataset]:
    """Return the saved datasets below a directory, keyed by their directories.

    Args:
        place: Location of the directory.
        paths: Paths of all files below it.
        key: Configuration key of the directory for error messages.

    Raises:
        LoramError: If several splits were saved together, or a file is missing.
    """
    for path in paths:
        if posixpath.basename(path) == "dataset_dict.json":
            _refuse_dictionary(place, path, key)
    saved = {}
    for path in paths:
        if posixpath.basename(path) == "state.json":
            folder = posixpath.dirname(path)
            state = _read_object(place, path)
            entries = state.get("_data_files")
            if isinstance(entries, list):
                names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
                files = frozenset(posixpath.join(folder, str(name)) for name in names)
                split = state.get("_split")
                split = split.partition("[")[0] if isinstance(split, str) else None
                saved[folder] = SavedDataset(files, split)
    missing = sorted(path for dataset in saved.values() for path in dataset.files - set(paths))
    if missing:
        raise LoramError(f"{place.name_of(missing[0])} is missing; copy the dataset again")
    return saved


def refuse_mixed_splits(
    place: Place,
    folder: str,
    paths: Sequence[str],
    key: str,
    recorded: Mapping[str, str | None] | None = None,
) -> None:
    """Refuse files from several splits or configurations of a dataset.

    Args:
        place: Location of the files.
        folder: Directory of the dataset, or one inside it.
        paths: Paths of the files.
        key: Configuration key of the files for error messages.
        recorded: Recorded splits of the files of saved datasets.

    Raises:
        LoramError: If there are several; the message lists them and shows how to select one.
    """
    if len(paths) < 2:
        return
    top, declared = _declared(place, folder)
    relative = {posixpath.relpath(path, top): path for path in paths}
    recorded = recorded or {}
    known = {name: split for name, path in relative.items() if (split := recorded.get(path))}
    several = mixed_splits(list(relative), declared, known)
    if several is None:
        return
    split, chosen = _suggested(several, key)
    pattern = selecting(chosen, sorted(set(relative) - set(chosen)))
    remedy = (
        f"a path or glob of the files of {split} alone"
        if pattern is None
        else place.name_of(posixpath.join(_as_given(place, folder, top), pattern))
    )
    raise LoramError(
        f"{key} must be one {several.kind} of a dataset, but {place.name_of(folder.rstrip('/'))} "
        f"has {', '.join(several.names)}; use {remedy}"
    )


def _suggested(several: Several, key: str) -> tuple[str, Sequence[str]]:
    """Return the split that is probably meant; for evaluation, one that is not for training."""
    names = list(several.splits)
    if "eval" in key:
        names.sort(key=lambda name: ("test" not in name, "train" in name))
    else:
        names.sort(key=lambda name: "train" not in name)
    return names[0], several.splits[names[0]]


def _declared(place: Place, folder: str) -> tuple[str, list[Declared]]:
    """Return the directory of the README that declares a dataset's files, and its declarations.

    The README is searched for in the directory and its parents; without one, the directory itself
    is returned.
    """
    found = place.filesystem.get_file_info(
        [posixpath.join(above, "README.md") for above in _upwards(place, folder)]
    )
    for info in found:
        if info.type == fs.FileType.File:
            with place.filesystem.open_input_stream(info.path) as stream:
                declared = declared_in(bytes(stream.read(_README_BYTES)).decode(errors="replace"))
            if declared:
                return posixpath.dirname(info.path), declared
    return folder, []


def _upwards(place: Place, folder: str) -> Iterator[str]:
    """Yield a directory and some of its parents."""
    least = _TOP_PARTS.get(place.scheme, 1)
    if place.scheme in ("", "file"):
        folder = os.path.abspath(folder)
    for _ in range(_README_LEVELS):
        yield folder
        folder = posixpath.dirname(folder.rstrip("/"))
        if len(folder.split("/")) < least or folder in ("", "/"):
            return


def _as_given(place: Place, folder: str, top: str) -> str:
    """Return the directory of a README as the user would write it."""
    if place.scheme or os.path.isabs(folder):
        return top
    return posixpath.normpath(posixpath.join(folder, posixpath.relpath(top, folder)))


def _refuse_dictionary(place: Place, path: str, key: str) -> None:
    splits = _read_object(place, path).get("splits")
    names = [str(split) for split in splits] if isinstance(splits, list) else []
    folder = posixpath.dirname(path)
    one = place.name_of(posixpath.join(folder, names[0] if names else "train"))
    raise LoramError(
        f"{key} must be one split of a dataset, but {place.name_of(folder)} has "
        f"{', '.join(names) or 'several'}; use {one}"
    )


def _read_object(place: Place, path: str) -> dict[str, Any]:
    """Read a JSON object of a dataset; any other JSON value counts as empty."""
    with place.filesystem.open_input_stream(path) as stream:
        content = bytes(stream.read(_STATE_BYTES))
    remedy = "copy the dataset again"
    value: object = parse_json(
        content, place.name_of(path), kind=object, remedy=remedy, constants=True
    )
    return value if isinstance(value, dict) else {}
