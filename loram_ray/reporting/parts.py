"""Elements of a report: sections, tables and the stage flow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loram_ray.reporting.figures import Figure

_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?( ?[%a-zA-Z]{0,3})( ± .*)?$")


@dataclass(frozen=True)
class Table:
    """Table of text cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numbers(self) -> list[bool]:
        """For each column, whether it is numeric and not the first; such columns align right."""
        return [
            place > 0 and any(column) and all(_NUMBER.match(cell) for cell in column if cell)
            for place, column in enumerate(
                [row[place] for row in self.rows] for place in range(len(self.head))
            )
        ]


@dataclass
class Part:
    """A section of the page.

    Attributes:
        title: Title of the section.
        says: Introductory text.
        figures: Plots of the section.
        tables: Tables of the section.
        folded: Names and texts of collapsed blocks.
    """

    title: str
    says: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Box:
    """A stage in the flow, with a few lines about it."""

    name: str
    lines: Sequence[str]
    finished: bool


@dataclass
class Report:
    """Content of a report.

    Attributes:
        title: Title of the page.
        state: Whether the results are complete, and otherwise what is missing.
        facts: Names and values of general facts.
        flow: Stages, in the order in which they ended.
        parts: Sections of the page.
    """

    title: str
    state: str
    facts: list[tuple[str, str]]
    flow: list[Box]
    parts: list[Part]


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def text(value: Any) -> str:
    """Format a value for a table cell; None is empty."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
