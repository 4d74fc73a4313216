"""Settings under dotted keys, and the names of what they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loram_ray.config.base import over

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._=+-]+")


def with_values(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a section with values over them whose keys are dotted, e.g. ``lora.r``."""
    found = dict(settings)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        inner: dict[str, Any] = {last: value}
        for parent in reversed(parents):
            inner = {parent: inner}
        found = over(found, inner)
    return found


def named(name: str, values: Mapping[str, Any]) -> str:
    """A name for a directory: what is given, and each value with the end of its key."""
    parts = [f"{dotted.rpartition('.')[2]}={value}" for dotted, value in values.items()]
    return _NOT_IN_NAMES.sub("_", "-".join([*([name] if name else []), *parts]))
