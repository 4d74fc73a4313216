"""Folders of datasets: those that ``save_to_disk`` wrote, and those of several splits."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from loram_ray.corpus.places import Place
from loram_ray.corpus.splits import Declared, Several, declared_in, selecting, several_in
from loram_ray.errors import LoramError
from loram_ray.utils.parsing import parse_json

_README_BYTES = 2**20
_STATE_BYTES = 64 * 2**20
_README_LEVELS = 3
_TOP_PARTS = {"hf": 3}
"""Parts of the shortest address that is a dataset; of other stores the bucket is one."""


@dataclass(frozen=True)
class SavedDataset:
    """What a dataset's ``state.json`` says.

    Attributes:
        files: paths of its data.
        split: its split, where it has one.
    """

    files: frozenset[str]
    split: str | None


def saved_datasets(place: Place, paths: Collection[str], key: str) -> dict[str, SavedDataset]:
    """The datasets saved below a folder, by their folders.

    Args:
        place: of the folder.
        paths: all files below it.
        key: its configuration key, for messages.

    Raises:
        LoramError: several splits were saved together, or a file is missing.
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


def refuse_several(
    place: Place,
    folder: str,
    paths: Sequence[str],
    key: str,
    recorded: Mapping[str, str | None] | None = None,
) -> None:
    """Refuse files of several splits or configurations of a dataset.

    Args:
        place: where they are.
        folder: the dataset's, or one in it.
        paths: of the files.
        key: the configuration key that names them, for messages.
        recorded: the splits of files of saved datasets.

    Raises:
        LoramError: they are of several; the message names them, and how to name one.
    """
    if len(paths) < 2:
        return
    top, declared = _declared(place, folder)
    relative = {posixpath.relpath(path, top): path for path in paths}
    recorded = recorded or {}
    known = {name: split for name, path in relative.items() if (split := recorded.get(path))}
    several = several_in(list(relative), declared, known)
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
        f"{key} must be one {several.kind} of a dataset, {place.name_of(folder.rstrip('/'))} "
        f"holds {', '.join(several.names)}; write {remedy}"
    )


def _suggested(several: Several, key: str) -> tuple[str, Sequence[str]]:
    """The split that is probably meant: to evaluate, one that is not for training."""
    names = list(several.splits)
    if "eval" in key:
        names.sort(key=lambda name: ("test" not in name, "train" in name))
    else:
        names.sort(key=lambda name: "train" not in name)
    return names[0], several.splits[names[0]]


def _declared(place: Place, folder: str) -> tuple[str, list[Declared]]:
    """The folder of the README that declares a dataset's files, and what it declares.

    It is looked for in the folder and the ones above; without any, the folder itself is returned.
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
    """A folder and some above it."""
    least = _TOP_PARTS.get(place.scheme, 1)
    if place.scheme in ("", "file"):
        folder = os.path.abspath(folder)
    for _ in range(_README_LEVELS):
        yield folder
        folder = posixpath.dirname(folder.rstrip("/"))
        if len(folder.split("/")) < least or folder in ("", "/"):
            return


def _as_given(place: Place, folder: str, top: str) -> str:
    """The folder of a README as the user would name it."""
    if place.scheme or os.path.isabs(folder):
        return top
    return posixpath.normpath(posixpath.join(folder, posixpath.relpath(top, folder)))


def _refuse_dictionary(place: Place, path: str, key: str) -> None:
    splits = _read_object(place, path).get("splits")
    names = [str(split) for split in splits] if isinstance(splits, list) else []
    folder = posixpath.dirname(path)
    one = place.name_of(posixpath.join(folder, names[0] if names else "train"))
    raise LoramError(
        f"{key} must be one split of a dataset, {place.name_of(folder)} holds "
        f"{', '.join(names) or 'several'}; write {one}"
    )


def _read_object(place: Place, path: str) -> dict[str, Any]:
    """Read a JSON file of a dataset; what is no object is of something else."""
    with place.filesystem.open_input_stream(path) as stream:
        content = bytes(stream.read(_STATE_BYTES))
    remedy = "copy the dataset again"
    value: object = parse_json(
        content, place.name_of(path), kind=object, remedy=remedy, constants=True
    )
    return value if isinstance(value, dict) else {}
