"""Bad inputs: a right result, or one line that names file or key, exit code 2, and no trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bad_inputs import adapters, jobs, models, overrides, run_files, stages
from helpers.bad_inputs.harness import Row, check, copied, make_folder

TABLES = (run_files, overrides, models, adapters, stages, jobs)
ROWS = [row for table in TABLES for row in table.ROWS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "folder")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:60])
def test_a_bad_input_is_one_line_and_leaves_no_trace(
    row: Row,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check(row, copied(whole, tmp_path / "folder"), monkeypatch, capfd)


def test_the_tables_have_many_rows_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 300
