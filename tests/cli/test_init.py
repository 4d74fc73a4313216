"""The run file that ``loram init`` writes is valid, and its chain runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import loram_ray as lr
from helpers import tiny
from helpers.command import Command
from loram_ray.config import load_run


@pytest.mark.parametrize("name", ["base", "org/model", "with space: and # more", "é'\"", "yes"])
def test_the_file_says_what_was_given(tmp_path: Path, loram: Command, name: str) -> None:
    file = tmp_path / "run.yaml"
    done = loram("init", "--base", name, "--data", f"{name}.jsonl", "--output", file)
    assert (done.code, done.err) == (0, "")
    run = load_run(file)
    assert (run.base, run.train.data, run.output) == (name, f"{name}.jsonl", Path("runs/mine"))
    assert run.align is None and run.evaluate is None
    assert run.recover.base == name


def test_text_and_test_rows_add_their_sections(tmp_path: Path, loram: Command) -> None:
    file = tmp_path / "run.yaml"
    words = ("--base", "b", "--data", "d", "--text", "t.txt", "--test", "e.jsonl")
    assert loram("init", *words, "--output", file).code == 0
    run = load_run(file)
    assert run.align.corpus.sources[0].path == "t.txt"
    assert run.evaluate.data == "e.jsonl"
    commented = tmp_path / "without.yaml"
    loram("init", *words[:4], "--output", commented)
    text = commented.read_text().replace("# align:\n", "align:\n").replace("text.jsonl", "t.txt")
    for line in load_lines(file, "align:"):
        text = text.replace(f"# {line}\n", f"{line}\n")
    (tmp_path / "again.yaml").write_text(text)
    assert load_run(tmp_path / "again.yaml").align == run.align  # by removing "# "


def load_lines(file: Path, start: str) -> list[str]:
    lines = file.read_text().splitlines()
    first = lines.index(start) + 1
    return lines[first : lines.index("", first)]


def test_a_file_is_replaced_by_force_alone(tmp_path: Path, loram: Command) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    words = ("init", "--base", "b", "--data", "d", "--output", file)
    line = loram(*words).line
    assert line == (
        f"loram: --output must name a new file, but {file} exists; choose another or pass --force"
    )
    assert file.read_text() == "mine"
    assert loram(*words, "--force").code == 0
    assert load_run(file).base == "b"


def test_a_base_with_credentials_is_refused(tmp_path: Path, loram: Command) -> None:
    words = ("--base", "https://me:secret@host/b", "--data", "d")
    done = loram("init", *words, "--output", tmp_path / "run.yaml")
    assert "secret" not in done.line
    assert not [*tmp_path.iterdir()]


def test_the_written_chain_runs(tmp_path: Path, loram: Command) -> None:
    """Pruning as the file says; the rest of the chain is tested in test_run."""
    base = tiny.write_base(tmp_path / "base", seed=0)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions())
    file = tmp_path / "run.yaml"
    words = ("--base", base, "--data", data, "--directory", tmp_path / "out", "--output", file)
    assert loram("init", *words).code == 0
    done = loram("prune", "--config", file, "--layers", "1,3", "--ratio", 0.5)
    assert done.code == 0, done.err
    assert lr.PruningPlan.load(tmp_path / "out" / "pruned").ratio == 0.5


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_the_whole_written_run_runs(tmp_path: Path, loram: Command) -> None:
    base = tiny.write_base(tmp_path / "base", seed=0)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions())
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.texts())
    file = tmp_path / "run.yaml"
    words = ("--base", base, "--data", data, "--text", text, "--test", data)
    assert loram("init", *words, "--directory", tmp_path / "out", "--output", file).code == 0
    small = "--prune.layers 1,3 --prune.ratio 0.5 --train.steps 2 --train.cpus 1 --evaluate.limit 4"
    small += " --align.steps 2 --align.corpus.sequence-length 32 --align.precision fp32"
    done = loram("run", "--config", file, *shlex.split(small))
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
