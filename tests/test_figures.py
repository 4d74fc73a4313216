"""Figures in documents are those of recorded results, and each record names its commit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import figures  # noqa: E402
from figures import HERE, RECORDS, REPOSITORY, Statement  # noqa: E402
from render import as_markdown  # noqa: E402
from statements import EXEMPT, STATEMENTS  # noqa: E402


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return figures.facts()


@pytest.mark.parametrize("name", STATEMENTS)
def test_figures_of_a_document_are_those_of_its_records(name: str, known: dict[str, Any]) -> None:
    assert figures.differences(REPOSITORY / name, STATEMENTS[name], known) == []


def documents() -> list[str]:
    pages = sorted((REPOSITORY / "docs").rglob("*.md"))
    others = ("CHANGELOG.md", "CONTRIBUTING.md", "cluster/README.md")
    return list(
        dict.fromkeys([*STATEMENTS, *(str(p.relative_to(REPOSITORY)) for p in pages), *others])
    )


@pytest.mark.parametrize("name", documents())
def test_no_figure_of_a_document_is_without_a_record(name: str) -> None:
    found = figures.without_record(REPOSITORY / name, STATEMENTS.get(name, []), EXEMPT)
    assert found == []


def test_results_are_rendered_from_their_file() -> None:
    assert (HERE / "RESULTS.md").read_text() == as_markdown(figures.results())


def records() -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}
    return {**found, **{f"results.{name}": entry for name, entry in figures.results().items()}}


@pytest.mark.parametrize("name", records())
def test_a_record_says_how_it_was_made(name: str) -> None:
    record = records()[name]
    assert {"commit", "date", "machine", "found"} <= set(record)
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    if _history_is_whole():
        kind = subprocess.run(
            ["git", "cat-file", "-t", record["commit"]],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert kind.stdout.strip() == "commit", record["commit"]


def test_each_file_of_scores_has_its_commit() -> None:
    commits = figures.record("study")["found"]
    assert set(commits) == {path.name for path in (HERE / "study").glob("*.json")}
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in commits.values())


def _history_is_whole() -> bool:
    """Whether this is a checkout with all of its history."""
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return shallow.stdout.strip() == "false"


def test_a_figure_that_is_changed_or_added_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("LoRAM kept 61.0% of\nthe gain. It took 3.5 hours, a 70B model.\n")
    statements = [Statement("LoRAM kept {demo[gain]:.1%} of the gain")]
    known = {"demo": {"gain": 0.609}}
    assert figures.differences(page, statements, known) == ["LoRAM kept 60.9% of the gain"]
    assert figures.without_record(page, statements, EXEMPT) == [(2, "3.5 hours")]
    page.write_text(figures.written(page.read_text(), statements, known))
    assert figures.differences(page, statements, known) == []
    assert page.read_text().startswith("LoRAM kept 60.9% of\nthe gain.")
