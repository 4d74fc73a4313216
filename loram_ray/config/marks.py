"""Marks on the keys of sections, which say in one place how a key is treated."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Alias:
    """Marks a key that may also be given under another name."""

    name: str


@dataclass(frozen=True)
class Renamed(Alias):
    """Marks a key that had another name, which is accepted for one version with a warning.

    Identities and directory names are made with the former name, so that they stay valid.
    """


@dataclass(frozen=True)
class KeysOf:
    """Marks a dictionary of settings that a stage's section checks later.

    If the key is named like the stage, the run file's section of that name provides its defaults.

    Attributes:
        stage: Name of the section.
        without: Keys that are not taken from the run file's section.
    """

    stage: str
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DottedKeysOf:
    """Marks a dictionary whose keys are dotted keys of a stage's section, e.g. ``lora.r``."""

    stage: str


@dataclass(frozen=True)
class SetByStudy:
    """Marks a key of a training that a batch or a sweep sets itself."""


@dataclass(frozen=True)
class SetByComparison:
    """Marks a key that a comparison sets itself: what a stage reads and where it writes."""


@dataclass(frozen=True)
class EqualInTrials:
    """Marks a key that all trials of a sweep share, as their losses are compared."""


def keys_with(model: type[BaseModel], mark: object) -> frozenset[str]:
    """Return the keys of a section that have a mark."""
    return frozenset(key for key, field in model.model_fields.items() if mark in field.metadata)
