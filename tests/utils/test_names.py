"""Names and texts of others: they stay in their folder, and are neither markup nor commands."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from markdown_it import MarkdownIt
from rich.table import Table

from helpers import tiny
from helpers.command import Command, leftovers
from helpers.hostile_names import HOSTILE
from loram_ray.artifacts.manifest import MANIFEST_FILE, read_manifest
from loram_ray.artifacts.tensorfile import Checkpoint
from loram_ray.cli.main import _show_piece
from loram_ray.config import BatchConfig, CompareConfig, CorpusConfig, SweepConfig
from loram_ray.corpus.sources import SOURCES_FILE, Counts, list_sources
from loram_ray.errors import LoramError
from loram_ray.runtime.progress import Reporter, say
from loram_ray.studies.tasks import tasks_of
from loram_ray.studies.trials import trials_of
from loram_ray.utils.names import first_clash, is_inside, name_error, slug
from loram_ray.utils.printing import PlainConsole, markdown, plain, plain_lines

E_ACUTE = "é"
NOT_PLAIN = [
    "", " ", ".", "..", "/", "a/b", "../x", "/etc/passwd", "a\\b", "..\\x", "a\0b", "a\nb", "a\rb",
    "a\x1b[31mb", "a\x85b", "a\u2028b", "a\u202eb", "a\udcffb", "x" * 256, "é" * 128,
]  # fmt: skip
NO_FOLDER = [*NOT_PLAIN, "-rf", ".hidden", " a", "a ", "x" * 250]


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_names_that_leave_their_folder_or_break_lines_are_not_plain(name: str) -> None:
    assert name_error(name) is not None
    assert not is_inside(f"sub/{name}") or name == "a/b"


@pytest.mark.parametrize(
    "name", ["a", "a.b", "...", "é", "日本", "a b", "-x", ".x", "x" * 255, "😀"]
)
def test_plain_names_are_the_last_part_of_a_path_and_no_more(name: str, tmp_path: Path) -> None:
    assert name_error(name) is None
    (tmp_path / name).write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_that_differ_by_case_or_normalisation_clash() -> None:
    decomposed = unicodedata.normalize("NFD", E_ACUTE)
    assert first_clash(["a", "b", "A"]) == ("a", "A")
    assert first_clash([E_ACUTE, decomposed]) == (E_ACUTE, decomposed)
    assert first_clash(["straße", "STRASSE"]) is not None
    assert first_clash(["a", "a"]) == ("a", "a")
    assert first_clash(["a", "b", "a-b"]) is None


@pytest.mark.parametrize("text", [*HOSTILE, *NOT_PLAIN])
def test_slugs_are_plain_and_different(text: str) -> None:
    assert name_error(f"{slug(text)}.png") is None
    assert "/" not in slug(text) and slug(text)[0] not in ".-"
    assert slug(text) != slug(text + "x")


def batch(folder: Path, **task: Any) -> BatchConfig:
    data = tiny.write_jsonl(folder / "data.jsonl", tiny.questions())
    return BatchConfig(
        model=folder / "model",
        output=folder / "out",
        tasks=({"data": str(data), **task},),
        train={"steps": 1},
    )


@pytest.mark.parametrize("name", NO_FOLDER)
def test_tasks_whose_names_are_no_folders_are_refused(
    name: str, base: Path, tmp_path: Path, loram: Command
) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions())
    config = tmp_path / "batch.yaml"
    task = {"name": name, "data": str(data)}
    config.write_text(
        json.dumps({"base": str(base), "output": str(tmp_path / "out"), "batch": {"tasks": [task]}})
    )
    ended = loram("batch", "--config", config)
    of_yaml = "\0" in name or "\udcff" in name  # which is refused before it is a configuration
    assert "name" in ended.line and ("batch.tasks.0" in ended.line or of_yaml)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "batch.yaml"}


@pytest.mark.parametrize("file", [".jsonl", "..jsonl", "-r.jsonl", "results.json.jsonl"])
def test_tasks_take_no_bad_name_from_their_files(file: str, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / file, tiny.questions())
    config = batch(tmp_path, data=str(data))
    if file.startswith("results"):
        assert [task.name for task in tasks_of(config)] == ["results"]
        return
    with pytest.raises(LoramError, match=r"batch\.tasks\.0\.name must be .*; set the task's name"):
        tasks_of(config)


def test_tasks_are_not_named_as_the_batchs_own_files(tmp_path: Path) -> None:
    with pytest.raises(LoramError, match="different from results.json"):
        tasks_of(batch(tmp_path, name="Results.json"))


@pytest.mark.parametrize("other", ["Task", "TASK"])
def test_tasks_whose_folders_some_disks_hold_to_be_one_are_refused(
    other: str, tmp_path: Path
) -> None:
    data = str(tiny.write_jsonl(tmp_path / "data.jsonl", tiny.questions()))
    tasks = [{"name": name, "data": data} for name in ("task", other)]
    config = BatchConfig(model=tmp_path, output=tmp_path, tasks=tasks, train={"steps": 1})
    with pytest.raises(LoramError, match=f"task and {other} differ only in case"):
        tasks_of(config)


@pytest.mark.parametrize("name", [n for n in NO_FOLDER if "\0" not in n and "\udcff" not in n])
def test_comparisons_refuse_tasks_and_systems_that_are_no_folders(
    name: str, tmp_path: Path
) -> None:
    task = {"data": "a.jsonl", "held_out": "b.jsonl"}
    with pytest.raises(ValueError, match="must have names|String should match"):
        CompareConfig(output=tmp_path, tasks={name: task})
    with pytest.raises(ValueError, match="must have names|String should match"):
        CompareConfig(output=tmp_path, tasks={"a": task}, alignments={name: {}})


def test_comparisons_refuse_names_that_differ_by_case_alone(tmp_path: Path) -> None:
    task = {"data": "a.jsonl", "held_out": "b.jsonl"}
    with pytest.raises(ValueError, match="differ by more than case"):
        CompareConfig(base="base", output=tmp_path, tasks={"a": task, "A": task})
    for taken in ("Base", "QLoRAM", "Causal"):
        with pytest.raises(ValueError, match="must not use the name of"):
            CompareConfig(base="base", output=tmp_path, tasks={"a": task}, alignments={taken: {}})
    assert CompareConfig(
        base="base", output=tmp_path, tasks={"a": task}, alignments={"causal": {}}
    ).aligned


def test_trials_whose_names_become_equal_are_refused(tmp_path: Path) -> None:
    config = SweepConfig(
        model=tmp_path,
        output=tmp_path / "out",
        data="x",
        train={"steps": 1, "eval_share": 0.5},
        grid={"lora.targets": [["q_proj", "k_proj"], ["q_proj, k_proj"]]},
    )
    with pytest.raises(LoramError, match="distinct trial names"):
        trials_of(config, {"": tmp_path})


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_trials_of_models_without_a_name_are_refused(name: str, tmp_path: Path) -> None:
    config = SweepConfig(
        model=tmp_path,
        models=(tmp_path / "a", tmp_path / "b"),
        base="base",
        output=tmp_path / "out",
        data="x",
        train={"steps": 1, "eval_share": 0.5},
    )
    with pytest.raises(LoramError, match="sweep must have values whose trial names are"):
        trials_of(config, {name: tmp_path})


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", " ", "a\0b"])
def test_sources_whose_names_break_lines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="without (control|null) characters"):
        CorpusConfig(sources=[{"path": "x", "name": name}])


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
)
def test_weights_are_read_from_beside_their_index_only(outside: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"w": outside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoramError, match="must name files that are .*; download it again"):
        Checkpoint(model)


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "."])
def test_manifests_name_no_files_outside_their_directory(outside: str, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    described = {
        "stage": "prune", "identity": "0" * 64, "base_fingerprint": "0" * 64, "parents": {},
        "settings": {},
        "files": {outside: {"bytes": 6, "sha256": "0" * 64}},
    }  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps(described))
    with pytest.raises(LoramError, match="must name files in its directory"):
        read_manifest(folder)


def test_prepared_corpora_name_no_files_elsewhere(tmp_path: Path) -> None:
    counts = {field.name: 1 for field in dataclasses.fields(Counts)}
    files = {"unit_files": ["../x.parquet"], "held_out_files": []}
    entry = {"name": "a", "weight": None, "share": 1.0, **counts, **files}
    (tmp_path / SOURCES_FILE).write_text(json.dumps([entry]))
    with pytest.raises(LoramError, match="must name files next to it"):
        list_sources(tmp_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_show_names_as_they_are(text: str) -> None:
    table = Table("name", title=text)
    table.add_row(text)
    console = PlainConsole(width=500, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.print(text)
    shown = console.export_text(clear=False)
    for line in plain_lines(text).splitlines():
        assert shown.count(line.strip()) >= 2
    assert "\x1b" not in shown and "\x07" not in shown


def test_control_characters_are_written_out() -> None:
    assert plain("a\x1b[31m\x9b\n\r\u202e\udcff") == "a\\x1b[31m\\x9b\\n\\r\\u202e\\xff"
    assert plain_lines("a\r\nb\tc\x07") == "a\nb\tc\\x07"
    for readable in ("é", "日本", "😀", "👨\u200d👩\u200d👧", "a\u00a0b"):
        assert plain(readable) == readable


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_text_as_text(text: str) -> None:
    """A Markdown parser of its own finds nothing but text in it."""
    [_, inline, _] = MarkdownIt("gfm-like", {"linkify": False}).parse(f"x {markdown(text)} x")
    assert inline.children is not None
    kinds = {child.type for child in inline.children}
    assert kinds <= {"text", "text_special"}, kinds
    shown = "".join(child.content for child in inline.children)
    assert shown == f"x {' '.join(plain_lines(text).split())} x"


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_settings_that_no_file_system_holds_are_refused(
    text: str, base: Path, tmp_path: Path, loram: Command
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"prune": {"base": str(base), "output": text, "ratio": 0.5}}))
    ended = loram("prune", "--config", config)
    assert ended.line and "\0" not in ended.err
    assert not leftovers(tmp_path)


def test_each_mistake_is_one_line_whatever_its_value_holds(loram: Command) -> None:
    ended = loram("report", "no\nsuch\x1b[31m\x85dir\u2028ectory")
    assert "such\\x1b[31m" in ended.line and "\x85" not in ended.err and "\u2028" not in ended.err


@pytest.mark.parametrize("answer", ["\x1b]0;owned\x07", "\x9b31m", "a\rb", "\x1b[2J", "\x1b[201~x"])
def test_answers_of_models_command_no_terminal(
    answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for piece in answer:  # as they come, one character at a time
        _show_piece(piece)
    _show_piece("\n\ttext é\n")
    shown = capsys.readouterr().out
    assert shown.endswith("\n\ttext é\n")
    assert all(character.isprintable() or character in "\n\t" for character in shown)


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter("[red]", 2, "step", line_every=0) as reporter:
        reporter.update(1, {"[/red] a\x1b[31m\nb": 0.5})
    say("stage", "[bold]x[/] \x1b[31m")
    shown = capsys.readouterr().err
    assert "[red]" in shown and "[/red] a\\x1b[31m\\nb" in shown and "[bold]x[/] \\x1b[31m" in shown
    assert "\x1b" not in shown
