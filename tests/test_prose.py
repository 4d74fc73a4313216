"""Prose is plain English: turns of phrase that readers stumble over do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TURNS = (
    r"mend(s|ed|ing)?",
    r"befall(s|en)?",
    r"told",
    r"anew",
    r"whoever",
    r"for ever",
    r"what became of",
    r"that there is(?! (a|an|no|not|only|one)\b)",
    r"is said to be",
    r"wherefore",
    r"of which there (is|are)",
    r"sooner done",
    r"(goes on|continues) where it was",
    r"could be had",
    r"leave it out",
    r"is no directory",
    r"cannot hold so",
    r"learnt by heart",
    r"what else one could",
    r"beside the next",
)
FOLDERS = {
    "loram_ray": ("*.py", "*.j2"),
    "docs": ("*.md", "*.py"),
    "cluster": ("*.md", "*.py", "*.yaml"),
    "jobs": ("*.py", "*.yaml"),
    ".": ("*.md", "Makefile"),
}


def files() -> list[Path]:
    found: list[Path] = []
    for folder, patterns in FOLDERS.items():
        for pattern in patterns:
            paths = (REPOSITORY / folder).glob(pattern if folder == "." else f"**/{pattern}")
            found += (path for path in paths if path.is_file())
    return sorted(found)


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_of_phrase_does_not_occur(turn: str) -> None:
    pattern = re.compile(rf"\b(?:{turn})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_the_files_are_there() -> None:
    assert len(files()) > 250
