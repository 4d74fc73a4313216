"""The table of commands: the command line, submit, run files and Python offer the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loram_ray as lr
from loram_ray.commands import COMMAND_OF, COMMANDS, Command, command_of, imported
from loram_ray.config import STAGES, RunConfig, load_command, load_run
from loram_ray.studies.tasks import tasks_of
from loram_ray.studies.trials import trials_of

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml"))


def test_every_command_is_offered_everywhere() -> None:
    assert [*STAGES] == [command.name for command in COMMANDS if command.name != "run"]
    assert set(STAGES) < set(RunConfig.model_fields)
    for command in COMMANDS:
        assert getattr(lr, command.name) is imported(command.function)
        assert getattr(lr, command.section_name) is command.model
        assert {command.name, command.section_name} <= set(lr.__all__)
        assert set(command.reads) <= set(STAGES)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_function_takes_a_section_and_the_settings_of_ray(command: Command) -> None:
    config, ray_config = inspect.signature(imported(command.function)).parameters.values()
    assert (config.name, config.annotation) == ("config", command.section_name)
    assert (ray_config.name, ray_config.annotation) == ("ray_config", "RayConfig | None")
    assert ray_config.default is None
    result, name, as_json = inspect.signature(imported(command.printer)).parameters
    assert (result, name, as_json) == ("name", "result", "as_json")


def test_reading_the_table_imports_nothing(tmp_path: Path) -> None:
    code = "import sys, loram_ray.commands; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert not {"pydantic", "torch", "ray", "typer", "yaml"} & set(done.stdout.split())


def test_a_row_a_model_and_a_function_make_a_command(tmp_path: Path) -> None:
    """The three things that CONTRIBUTING names, and nothing else."""
    (tmp_path / "extra.py").write_text(
        "from pathlib import Path\n"
        "from pydantic import Field\n"
        "from loram_ray.config.base import Section\n\n\n"
        "class CountConfig(Section):\n"
        '    """count: count up."""\n\n'
        '    base: str = Field(description="base model")\n'
        '    output: Path = Field(description="directory to write")\n'
        '    times: int = Field(3, description="how often")\n\n\n'
        "def count(config, ray_config=None):\n"
        "    return config\n\n\n"
        "def show(name, result, as_json):\n"
        "    print(name, result.base, result.output, result.times)\n"
    )
    code = """
import sys
import loram_ray
import loram_ray.commands as commands
loram_ray.__path__.append(".")
row = commands.Command("count", "extra.CountConfig", "extra.count", "Counting", "--times 2",
                       printer="extra.show")
commands.COMMANDS += (row,)
commands.COMMAND_OF["count"] = row
commands.SECTIONS_OF_A_RUN += ("count",)
from loram_ray.cli.main import main
sys.argv = ["loram", *sys.argv[1:]]
main()
"""
    (tmp_path / "run.yaml").write_text("base: b\noutput: out\ncount: {times: 4}\n")
    done = subprocess.run(
        [sys.executable, "-c", code, "count", "--config", "run.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "count b out/count 4\n", "")


def test_a_section_knows_its_command() -> None:
    recovery = lr.RecoverConfig(adapter="a", base="b", output="c")
    assert command_of(recovery) is COMMAND_OF["recover"]
    with pytest.raises(TypeError, match="no command takes RayConfig"):
        command_of(lr.RayConfig())


# What batch, sweep and compare take from the run file


def run_file(folder: Path, **sections: Any) -> RunConfig:
    data = {"data": "data.jsonl"}
    train = {"steps": 2, "lora": {"r": 4, "alpha": 4}, "output": "elsewhere", "eval_share": 0.5}
    return RunConfig.model_validate(
        {"base": "base", "output": "out", "train": {**train, **data}, **sections}
    )


def test_a_batch_shares_the_files_training(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    task = {"data": str(tmp_path / "a.jsonl"), "train": {"lora": {"r": 16}}}
    run = run_file(tmp_path, batch={"tasks": [task], "train": {"lora": {"alpha": 8}}})
    [made] = tasks_of(run.batch)
    assert made.train.steps == 2
    assert (made.train.lora.r, made.train.lora.alpha) == (16, 8)
    assert made.train.output != Path("elsewhere")


def test_a_sweep_shares_the_files_training() -> None:
    run = run_file(Path(), sweep={"data": "d", "grid": {"lora.r": [2]}, "train": {"steps": 3}})
    [trial] = trials_of(run.sweep, {"": Path("model")})
    assert (trial.train.steps, trial.train.lora.r, trial.train.lora.alpha) == (3, 2, 4)
    assert trial.train.eval_share == 0.5


def test_the_files_training_needs_no_data_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: base\noutput: out\ntrain: {steps: 2}\nbatch: {tasks: [{data: a.jsonl}]}\n"
    )
    assert load_run(file).batch.train == {"steps": 2}


def test_sections_made_in_python_are_shared_too() -> None:
    train = lr.TrainConfig(model="m", output="o", data="d", steps=7)
    batch = lr.BatchConfig(model="m", output="o", train={"seed": 5})
    run = RunConfig(base="base", output="out", train=train, batch=batch)
    assert run.batch.train == {"steps": 7, "seed": 5}


def test_a_whole_run_is_taken_for_one_more_version(tmp_path: Path) -> None:
    run = run_file(tmp_path, sweep={"data": "d", "ratios": [0.5]})
    with (
        pytest.warns(FutureWarning, match=r"call sweep\(run.sweep, run.ray\)"),
        pytest.raises(lr.LoramError, match="sweep.ratios needs the section prune"),
    ):
        lr.sweep(run)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("batch", ["align", "evaluate", "sweep"]),
        ("sweep", ["evaluate", "batch"]),
        ("compare", ["batch", "sweep"]),
        ("train", ["batch", "sweep"]),
        ("run", []),
    ],
)
def test_sections_that_a_command_does_not_read_are_named(
    tmp_path: Path, name: str, unread: list[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: b\noutput: o\ntrain: {data: d}\nevaluate: {data: d}\n"
        "align: {corpus: {sources: [{path: p}]}}\n"
        "batch: {tasks: [{data: d}]}\nsweep: {data: d, grid: {lora.r: [2]}}\n"
    )
    tasks = ["compare.tasks={t: {data: d, held_out: h}}"] if name == "compare" else []
    assert load_command(COMMAND_OF[name], file, tasks).unread == unread


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_run_files_hold_nothing_that_their_commands_do_not_read(path: Path) -> None:
    words = re.findall(r"loram (\w+) --config jobs/configs/" + path.name, path.read_text())
    names = [name for name in words if name in COMMAND_OF]
    assert names or "loram plan" in path.read_text()
    for name in names:
        assert load_command(COMMAND_OF[name], path).unread == []
