"""The help of every command, and shell completion, as users of typer expect them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.command import Command
from loram_ray.cli.commands import given_flags
from loram_ray.cli.main import app
from loram_ray.commands import COMMAND_OF
from loram_ray.config import load_command, load_run

REPOSITORY = Path(__file__).parents[2]
TYPES = {"str", "path", "int", "float", "bool", "list", "yaml", "choice"}
PLACEHOLDERS = {"FILE", "KEY=VALUE", "NAME=VALUE", "NAME", "COMMAND", "DIRECTORY"}


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """All commands and groups, with the words that call them."""
    group = group or typer.main.get_command(app)
    yield name, group
    for word, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {word}".strip())


ALL = dict(commands())
LEAVES = [name for name, command in ALL.items() if not hasattr(command, "commands")]


def options_of(name: str) -> list[Any]:
    """The options and arguments that the help of a command shows."""
    context = typer.Context(ALL[name], info_name=name)
    return [one for one in ALL[name].get_params(context) if not getattr(one, "hidden", False)]


def paragraphs(name: str) -> list[str]:
    """The paragraphs of a command's help, without the escapes of rich's markup."""
    return (ALL[name].help or "").replace("\\[", "[").split("\n\n")


def is_sentence(text: str) -> bool:
    """Whether text starts with a capital, a quotation or a formula and ends with a period."""
    return re.fullmatch(r"['\"A-Z].*[.]", text, flags=re.DOTALL) is not None


@pytest.mark.parametrize("name", ALL)
def test_help_is_made_of_sentences(name: str) -> None:
    first, *more = paragraphs(name)
    assert is_sentence(first) and len(first) <= 100, first
    for text in more:
        assert text.startswith("Example: ") or is_sentence(text), text
        assert "\n" not in text, "the terminal wraps lines"


@pytest.mark.parametrize("name", ALL)
def test_options_are_described_with_their_types(name: str) -> None:
    for option in options_of(name):
        text = re.sub(r"( \\?\[[^\]]*\])*$", "", option.help or "")
        assert is_sentence(text), f"{option.name}: {option.help}"
        shown = option.display_type_rich(ctx=typer.Context(ALL[name]))
        kind = re.sub(r"<(\w+)( range)?>.*", r"\1", shown).strip("[]{}")
        assert kind in TYPES | PLACEHOLDERS or re.fullmatch(r"<[\w|]+>", kind), shown


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_one_example_that_it_accepts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [example] = [text for text in paragraphs(name) if text.startswith("Example: ")]
    assert example.startswith(f"Example: loram {name}")
    words = shlex.split(example.removeprefix(f"Example: loram {name}"))
    parsed = ALL[name].make_context(name, words).params
    monkeypatch.chdir(REPOSITORY)
    if name in COMMAND_OF:
        flags = given_flags(COMMAND_OF[name], parsed)
        load_command(COMMAND_OF[name], parsed["config"], parsed["overrides"] or (), flags)
    elif parsed.get("config"):
        load_run(parsed["config"], parsed["overrides"] or ())


@pytest.mark.parametrize("name", ["run", "train"])
def test_required_options_come_first(name: str) -> None:
    required = [option.help.endswith("[required]") for option in options_of(name)]
    assert sum(required) >= 2
    assert required == sorted(required, reverse=True)


def test_keys_of_lists_are_listed_with_plain_defaults(loram: Command) -> None:
    ended = loram("evaluate", "--help")
    text = " ".join(ended.out.split())
    assert "benchmarks.N.limit (optional): " in text
    assert "benchmarks.N.shots (default 0): " in text
    assert "(default 'Question: {question}\\nAnswer:')" in text
    assert "None" not in text and "()" not in text


def completed(line: str, folder: Path) -> set[str]:
    """What bash offers after a line, from a process of its own as bash asks for it."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "loram_ray.cli"],
        cwd=folder,
        env={**os.environ, "_LORAM_COMPLETE": "complete_bash", **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("loram pr", {"prune"}),
        ("loram prune --meth", {"--method"}),
        ("loram prune --method ta", {"taylor"}),
    ],
)
def test_the_shell_completes_commands_options_and_choices(
    line: str, words: set[str], tmp_path: Path
) -> None:
    assert completed(line, tmp_path) == words


def test_completion_is_shown_for_the_shell(tmp_path: Path) -> None:
    line = f"{sys.executable} -m loram_ray.cli --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "complete -o default -F _loram_completion loram" in done.stdout
