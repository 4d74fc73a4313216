"""Options made from the configuration: types, defaults, precedence, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loram_ray as lr
from helpers import adapters, tiny
from helpers.command import Command
from loram_ray.commands import COMMAND_OF, COMMANDS
from loram_ray.config import load_command
from loram_ray.config.flags import Kind, flags_for

OF_ALL_COMMANDS = {"config", "set", "json", "debug", "help", "preview"}


def section(name: str, *arguments: str, config: Path | None = None, sets: Any = ()) -> Any:
    """A command's section from options, as the command line hands them over."""
    flags = {flag.option: flag for flag in flags_for(COMMAND_OF[name])}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    given = [(flags[option], text) for option, text in pairs]
    return load_command(COMMAND_OF[name], config, sets, given)[0]


def test_an_adapter_is_recovered_without_a_run_file(tmp_path: Path, loram: Command) -> None:
    base = tiny.write_base(tmp_path / "base", seed=0)
    pruning = lr.PruneConfig(base=str(base), output=tmp_path / "p", ratio=0.5, layers=(1, 3))
    trained = tmp_path / "adapter_pruned"
    adapters.train_randomly(lr.prune(pruning).output, trained)
    output = tmp_path / "adapter"
    done = loram("recover", "--adapter", trained, "--base", base, "--output", output)
    assert done.code == 0 and done.out.startswith(f"recover: done: {output}")
    config = lr.RecoverConfig(adapter=trained, base=str(base), output=tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (lr.recover(config).output / weights).read_bytes()


def test_a_base_is_pruned_without_a_run_file(tmp_path: Path, loram: Command) -> None:
    base, output = tiny.write_base(tmp_path / "base", seed=0), tmp_path / "pruned"
    words = ("--ratio", 0.5, "--method", "magnitude", "--layers", "1,3", "--seed", 7)
    assert loram("prune", "--base", base, "--output", output, *words).code == 0
    settings = lr.PruningPlan.load(output)
    assert (settings.ratio, settings.method) == (0.5, "magnitude")


PRUNE = ("--base", "b", "--output", "o")


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("prune", (*PRUNE, "--layers", "4,28"), lambda s: s.layers == (4, 28)),
        ("prune", (*PRUNE, "--layers", "[4, 28]"), lambda s: s.layers == (4, 28)),
        ("prune", (*PRUNE, "--layers", "null"), lambda s: s.layers is None),
        ("prune", (*PRUNE, "--scores", "yes"), lambda s: s.scores == Path("yes")),
        (
            "prune",
            (*PRUNE, "--method", "taylor", "--calibration.sources", "[{path: a.txt}]"),
            lambda s: s.calibration.sources[0].path == "a.txt" and s.calibration.samples == 128,
        ),
        (
            "prune",
            (*PRUNE, "--calibration", "{sources: [{path: a}]}", "--calibration.samples", "3"),
            lambda s: s.calibration.samples == 3,
        ),
        (
            "train",
            ("--model", "m", "--output", "o", "--data", "d", "--lora.targets", "q_proj,v_proj"),
            lambda s: s.lora.targets == ("q_proj", "v_proj"),
        ),
        (
            "train",
            ("--model", "m", "--output", "o", "--data", "1e3", "--lora.rank-pattern", "{q: 4}"),
            lambda s: s.lora.rank_pattern == {"q": 4} and s.data == "1e3",
        ),
        (
            "evaluate",
            ("--model", "m", "--output", "o", "--lm-eval", "a,b", "--lm-eval.shots", "2"),
            lambda s: s.lm_eval.tasks == ("a", "b") and s.lm_eval.shots == 2,
        ),
        (
            "evaluate",
            ("--model", "m", "--output", "o", "--benchmarks", "[{kind: perplexity, data: d}]"),
            lambda s: s.benchmarks[0].data == "d",
        ),
        (
            "batch",
            ("--model", "m", "--output", "o", "--tasks", "[{data: d}]", "--train.lora.r", "4"),
            lambda s: s.train == {"lora": {"r": 4}} and s.tasks[0].data == "d",
        ),
        (
            "compare",
            ("--base", "b", "--output", "o", "--tasks", "{t: {data: d, held_out: h}}")
            + ("--methods", "random,taylor", "--train.steps", "3"),
            lambda s: s.methods == ("random", "taylor") and s.train == {"steps": 3},
        ),
        (
            "run",
            (*PRUNE, "--prune.ratio", "0.25"),
            lambda s: s.prune.ratio == 0.25 and s.base == "b",
        ),
    ],
)
def test_values_are_read_as_their_keys_are(
    name: str, arguments: tuple[str, ...], value: Callable[[Any], bool]
) -> None:
    assert value(section(name, *arguments))


def test_options_are_over_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: b\noutput: o\nprune: {ratio: 0.1, seed: 1, method: magnitude}\n")
    found = section("prune", "--ratio", "0.3", config=file, sets=["prune.ratio=0.2"])
    assert (found.ratio, found.seed, found.output) == (0.3, 1, Path("o/pruned"))
    assert section("prune", config=file, sets=["prune.ratio=0.2"]).ratio == 0.2
    assert section("merge", "--parity", "false", config=file).parity is False  # it has no section


def test_a_file_for_one_command_needs_no_base_and_no_output(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recover: {adapter: a, base: b, output: o}\ntrain: {}\n")
    assert section("recover", config=file).output == Path("o")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["recover", "--adapter", "a"],
            [
                "--base must be given; add it, or a run file with --config",
                "--output must be given; add it, or a run file with --config",
            ],
        ),
        (
            ["prune", *PRUNE, "--ratio", "2"],
            ["--ratio must be less than 1, got 2; change the value"],
        ),
        (
            ["prune", *PRUNE, "--ratio", "[1"],
            ["--ratio must be valid YAML, got '[1'; quote it"],
        ),
        (
            ["train", "--model", "m", "--output", "o", "--data", "d", "--lora.r", "x"],
            ["--lora.r must be a valid integer, unable to parse string"],
        ),
        (
            ["prune", "--config", "run.yaml", "--ratio", "0.5"],
            ["run.yaml: prune.seed must be greater than or equal to 0, got -1; change the value"],
        ),
        (
            ["merge", "--config", "part.yaml", "--base", "b"],
            ["part.yaml: merge.adapter must be given; add it to the config or pass --adapter"],
        ),
        (["prune", "--ratoi", "1"], ["No such option: --ratoi"]),
        (["prune", "--ratio"], ["Option '--ratio' requires an argument"]),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    arguments: list[str],
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loram: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("base: b\noutput: o\nprune: {seed: -1}\n")
    (tmp_path / "part.yaml").write_text("merge: {output: o}\n")
    done = loram(*arguments)
    assert (done.code, done.out) == (2, "")
    found = done.err.splitlines()
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(f"loram: {start}")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_options_are_distinct_and_described(command: Any) -> None:
    flags = flags_for(command)
    names = [flag.option for flag in flags]
    assert len(names) == len(set(names))
    assert not {name.removeprefix("--") for name in names} & OF_ALL_COMMANDS
    for flag in flags:
        if not flag.hidden:
            assert flag.help and not flag.help[0].isspace(), flag.key
            assert flag.kind is not Kind.CHOICE or flag.choices


def test_underscores_and_switches_are_taken(tmp_path: Path, loram: Command) -> None:
    words = ("--model", "m", "--data", "d", "--output", tmp_path / "o")
    done = loram("train", *words, "--batch_size", 3, "--no-packing", "--micro-batch-size", 2)
    assert done.line.startswith("loram: --batch-size must be a multiple of micro_batch_size = 2")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_commands_on_ray_join_a_cluster_by_an_option(command: Any, tmp_path: Path) -> None:
    """As ``ray job submit -- loram … --ray.address auto`` needs it."""
    flags = [flag for flag in flags_for(command) if flag.key == "ray.address"]
    assert bool(flags) == command.uses_ray
    if command.name == "run":
        file = tmp_path / "run.yaml"
        file.write_text("base: b\noutput: o\nray: {address: local}\n")
        assert load_command(command, file, (), [(flags[0], "auto")]).ray.address == "auto"


def test_unread_sections_are_named_when_work_begins(tmp_path: Path, loram: Command) -> None:
    base = tiny.write_base(tmp_path / "base", seed=0)
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {base}\nprune: {{layers: [1, 3]}}\nbatch: {{tasks: [{{data: a}}]}}\n")
    words = ("--config", file, "--output", tmp_path / "pruned")
    refused = loram("prune", *words, "--ratio", 0.999)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
    done = loram("prune", *words, "--ratio", 0.5)
    line = f"prune      ignores these sections of {file}: batch"
    assert (done.code, done.err.splitlines().count(line)) == (0, 1)
