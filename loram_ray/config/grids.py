"""Settings under dotted keys, and directory names derived from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loram_ray.config.aliases import former_key
from loram_ray.config.base import merge_settings
from loram_ray.config.train import TrainConfig

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._=+-]+")


def with_values(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's settings, overridden by values under dotted keys, e.g. ``lora.r``."""
    merged = dict(settings)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        inner: dict[str, Any] = {last: value}
        for parent in reversed(parents):
            inner = {parent: inner}
        merged = merge_settings(merged, inner)
    return merged


def named(name: str, values: Mapping[str, Any]) -> str:
    """Return a directory name: ``name``, followed by the last part of each key and its value.

    Renamed keys have their former names, so that directories written before are continued.
    """
    keys = {dotted: former_key(TrainConfig, dotted).rpartition(".")[2] for dotted in values}
    parts = [f"{keys[dotted]}={value}" for dotted, value in values.items()]
    return _NOT_IN_NAMES.sub("_", "-".join([*([name] if name else []), *parts]))
