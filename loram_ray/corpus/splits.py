"""Detect the splits and configurations of a dataset directory, with the rules of ``datasets``.

They are declared in ``README.md``, or follow from the names of files and directories: a keyword
such as ``train`` or ``eval``, delimited by ``-``, ``.``, ``_``, a space or digits
(``datasets.data_files``).
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from loram_ray.errors import LoramError
from loram_ray.utils.parsing import parse_yaml

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _KEYWORDS.items() for word in words}
_SEPARATOR = r"[-._ 0-9]"
_KEYWORD = re.compile(
    rf"(?:^|{_SEPARATOR})({'|'.join(_SPLIT_OF)})(?={_SEPARATOR}|$)", re.IGNORECASE
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Declared:
    """Files that a README assigns to a split.

    Attributes:
        configuration: Name of the configuration.
        split: Name of the split; None if file names determine it.
        patterns: Globs of the files, relative to the README's directory.
    """

    configuration: str
    split: str | None
    patterns: tuple[str, ...]

    def split_of(self, path: str) -> str | None:
        """Return the split of a file, or None if the patterns do not match it."""
        if not any(matches(path.split("/"), pattern.split("/")) for pattern in self.patterns):
            return None
        return self.split or split_of(path) or "train"


@dataclass(frozen=True)
class Several:
    """Parts of a dataset that must not be read together.

    Attributes:
        kind: Kind of the parts.
        names: Names of all parts.
        splits: Paths of each split by name; for configurations, those of the first.
    """

    kind: Literal["split", "configuration"]
    names: Sequence[str]
    splits: Mapping[str, Sequence[str]]


def mixed_splits(
    paths: Sequence[str],
    declared: Sequence[Declared] = (),
    known: Mapping[str, str] | None = None,
) -> Several | None:
    """Return the splits or configurations of some files, or None if they all belong to one.

    Args:
        paths: Paths relative to the directory.
        declared: Declarations in the README.
        known: Recorded splits of some files.
    """
    parts: dict[tuple[str, str], list[str]] = {}
    for entry in declared:
        for path in paths:
            split = entry.split_of(path)
            if split is not None:
                parts.setdefault((entry.configuration, split), []).append(path)
    if any(len(set(files)) == len(paths) for files in parts.values()):
        return None
    configurations = list(dict.fromkeys(configuration for configuration, _ in parts))
    if parts:
        first = {
            split: files for (name, split), files in parts.items() if name == configurations[0]
        }
        if len(configurations) > 1:
            return Several("configuration", configurations, first)
        if len(first) > 1:
            return Several("split", list(first), first)
    named = {path: split for (_, split), files in parts.items() for path in files}
    known = known or {}
    return _several_by_name(
        {path: named.get(path) or split_of(path, known.get(path)) for path in paths}
    )


def _several_by_name(splits: Mapping[str, str | None]) -> Several | None:
    found: dict[str, list[str]] = {}
    for path, split in splits.items():
        if split is not None:
            found.setdefault(split, []).append(path)
    canonical = {_canonical(split) for split in found}
    if len(canonical) < 2:  # shards whose names are not split names do not form splits
        return None
    order = (*_KEYWORDS, *found)
    ordered = dict(sorted(found.items(), key=lambda item: order.index(item[0])))
    return Several("split", list(ordered), ordered)


def _canonical(split: str) -> str | None:
    keyword = _KEYWORD.search(split)
    return _SPLIT_OF[keyword[1].lower()] if keyword else None


def split_of(path: str, recorded: str | None = None) -> str | None:
    """Return the split that a path names, or None.

    Args:
        path: Path relative to the dataset's directory.
        recorded: Split recorded in a saved dataset's state; it takes precedence over the file name.
    """
    *folders, name = path.split("/")
    for folder in folders:
        if (split := _canonical(folder)) is not None:
            return split
    shard = _SHARD.match(name)
    return recorded or (shard[1] if shard else _canonical(name))


def declared_in(readme: str) -> list[Declared]:
    """Return the declarations in a README's YAML block, or an empty list if it cannot be read."""
    block = _FRONT_MATTER.match(readme.removeprefix("\ufeff"))
    try:
        data = parse_yaml(block[1], "README.md") if block else None
    except LoramError:
        return []
    configurations = data.get("configs") if isinstance(data, dict) else None
    if not isinstance(configurations, list):
        return []
    return [
        entry
        for configuration in configurations
        if isinstance(configuration, dict)
        for entry in _declared_by(configuration)
    ]


def _declared_by(configuration: dict[str, Any]) -> Iterable[Declared]:
    name = str(configuration.get("config_name", "default"))
    folder = str(configuration.get("data_dir") or "")
    files = configuration.get("data_files")
    if files is None:
        return [Declared(name, None, _patterns(folder, ["**"]))]
    if isinstance(files, str):
        files = [files]
    if isinstance(files, dict):
        pairs = list(files.items())
    elif not isinstance(files, list):
        return []
    elif all(isinstance(entry, dict) for entry in files):
        pairs = [(entry.get("split"), entry.get("path")) for entry in files]
    else:
        pairs = [("train", files)]
    return [Declared(name, str(split), _patterns(folder, paths)) for split, paths in pairs]


def _patterns(folder: str, paths: object) -> tuple[str, ...]:
    listed = paths if isinstance(paths, list) else [paths]
    return tuple(
        posixpath.normpath(posixpath.join(folder, path)) for path in listed if isinstance(path, str)
    )


def selecting(chosen: Sequence[str], others: Sequence[str]) -> str | None:
    """Return a path or simple glob that matches exactly the chosen files, or None."""
    if len(chosen) == 1:
        return glob.escape(chosen[0]) if glob.has_magic(chosen[0]) else chosen[0]
    folders = {posixpath.dirname(path) for path in chosen}
    common = posixpath.commonpath(folders) if "" not in folders else ""
    if common and not any(f"{path}/".startswith(f"{common}/") for path in others):
        return common
    names = [posixpath.basename(path) for path in chosen]
    stem = posixpath.commonprefix(names).rstrip("0123456789")
    anywhere = [] if len(folders) == 1 else ["**"]
    pattern = posixpath.join(glob.escape(common), *anywhere, f"{glob.escape(stem)}*")
    taken = [path for path in others if matches(path.split("/"), pattern.split("/"))]
    return pattern if stem and not taken else None


def matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether path components match those of a glob; ``**`` matches any number of them."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and matches(parts[1:], patterns[1:])
