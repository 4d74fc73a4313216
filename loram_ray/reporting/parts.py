"""What a report is made of: sections of sentences, plots and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loram_ray.reporting.figures import Figure

_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?( ?[%a-zA-Z]{0,3})( ± .*)?$")


@dataclass(frozen=True)
class Table:
    """Rows of text; numbers are to stand on the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numbers(self) -> list[bool]:
        """Which columns, after the first, are of numbers alone."""
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
        title: of it.
        says: sentences.
        figures: plots.
        tables: of text.
        folded: named texts that are shown when asked for.
    """

    title: str
    says: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Box:
    """A stage in the flow: its name, and what to say of it."""

    name: str
    lines: Sequence[str]
    finished: bool


@dataclass
class Report:
    """A page.

    Attributes:
        title: of it.
        state: complete, or what is missing.
        facts: names and values.
        flow: stages in the order in which they ended.
        parts: sections.
    """

    title: str
    state: str
    facts: list[tuple[str, str]]
    flow: list[Box]
    parts: list[Part]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def text(value: Any) -> str:
    """A value in a table; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
