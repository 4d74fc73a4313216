"""What runs note for themselves, damaged: one line that names the file, or it is done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loram_ray.alignment.universal_checkpoint import read_worker_count
from loram_ray.corpus.sources import SOURCES_FILE, list_sources
from loram_ray.errors import LoramError
from loram_ray.pruning.calibration import _read_journal
from loram_ray.runtime.cluster import _job_variables
from loram_ray.runtime.progress import MetricsLog, last_step, read_metrics
from loram_ray.runtime.tracking import last_tracked
from loram_ray.stages.evaluate import _Harness, _Record
from loram_ray.studies.scores import SCORES_FILE, read_scores

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sources": (SOURCES_FILE, lambda path: list_sources(path.parent)),
    "workers": ("workers.json", lambda path: read_worker_count(path.parent)),
    "tracked": ("note.json", last_tracked),
    "pruning": ("journal.json", lambda path: _read_journal(path.parent)),
    "harness": ("lm_eval.json", lambda path: _Harness(path, wanted=True)),
    "scores": (SCORES_FILE, lambda path: read_scores([path], "exact_match", [])),
}
DAMAGED = {
    "empty": "",
    "cut": '{"a": [1,',
    "deep": "[" * 100_000,
    "no_utf8": b"\xff\xfe",
    "another_type": '[{"name": 7, "unit_files": "x"}]',
    "digits": "9" * 5000,
}


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(LoramError) as refused:
        read(path)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_journal_is_named_in_one_line(
    tmp_path: Path, reader: str, content: str | bytes
) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refusal(read, path)


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_in_place_of_a_journal_blocks_nobody(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    os.mkfifo(tmp_path / name)
    assert "FIFO" in refusal(read, tmp_path / name)


def test_a_prepared_corpus_names_a_source_and_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / SOURCES_FILE
    path.write_text("[]")
    assert "must name at least one source" in refusal(lambda path: list_sources(path.parent), path)
    source: dict[str, Any] = {"name": "a", "weight": None, "share": 1.0, "held_out_files": []}
    for name in ("../x.parquet", "/etc/passwd"):
        path.write_text(json.dumps([{**source, "unit_files": [name]}]))
        assert "files next to it" in refusal(lambda path: list_sources(path.parent), path)


def test_lines_of_metrics_without_a_step_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"loss": 1.0}\n{"step": "2"}\n7\n{"step"')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert last_step(path) == 1
    MetricsLog(path, resume_at=1).write(2, loss=1.0)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_damaged_line_of_an_evaluation_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = ('{"batch": 0, "found": [{"a": 1}], "seconds": 2.0}', '{"batch": 1}', '{"found": []}')
    path.write_text("\n".join((*lines, '{"batch": [], "found": 7, "seconds": ""}', "{")))
    assert _Record(path).found == {0: [{"a": 1}]}


@pytest.mark.parametrize(
    "value", ["", "{", "[]", '{"runtime_env": 7}', '{"runtime_env": {"env_vars": [1]}}']
)
def test_a_damaged_configuration_of_a_ray_job_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", value)
    with pytest.raises(LoramError, match=r"RAY_JOB_CONFIG_JSON_ENV_VAR .*; unset it"):
        _job_variables()


def test_variables_of_a_ray_job_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"A": "1"}}}')
    assert _job_variables() == {"A"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": null}')
    assert _job_variables() == set()
