"""Commands of the command line, made from the table of commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from loram_ray.cli.tables import AsJson, Config, Debug, Overrides
from loram_ray.commands import COMMAND_OF, Command, imported
from loram_ray.config import STAGES, RunConfig, kind_of, load_run, section_of, section_types


def function_of(command: Command) -> Callable[..., None]:
    """The function that typer makes a command of the command line of."""
    match command.name:
        case "train":
            return _train_command
        case "evaluate":
            return _evaluate_command

    def call(
        config: Config = None,
        overrides: Overrides = None,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        _run(command, load_run(config, overrides or ()), as_json)

    return call


def _run(command: Command, run: RunConfig, as_json: bool) -> None:
    section = run if command.name == "run" else section_of(run, command.name)
    imported(command.printer)(command.name, command(section, run.ray), as_json)


def _train_command(
    config: Config = None,
    overrides: Overrides = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--preview",
            min=1,
            help="Show the tokens of so many examples, and which carry loss; do not train.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    run = load_run(config, overrides or ())
    if examples is None:
        _run(COMMAND_OF["train"], run, as_json)
    else:
        imported("cli.preview.show_examples")(section_of(run, "train"), examples, as_json)


def _evaluate_command(
    config: Config = None,
    overrides: Overrides = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of lm-eval, separated by commas; pip install 'loram-ray[lm-eval]'.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    given = [*(overrides or ()), *([f"evaluate.lm_eval.tasks=[{tasks}]"] if tasks else ())]
    _run(COMMAND_OF["evaluate"], load_run(config, given), as_json)


def help_of(command: Command) -> str:
    """What a command does, an example, and the keys of its section."""
    if command.name == "run":
        return _run_help()
    stage, model = command.name, command.model
    keys = "\n\n".join(_keys(model, f"{stage}."))
    title = inspect.cleandoc(model.__doc__ or "").removeprefix(f"{stage}: ")
    example = f"loram {stage} {command.example}"
    if stage == "train":
        example += f"\n\n{example} --preview 3"
    intro = "Keys of the config's section (paths default to the run's):"
    return f"{title}\n\n{example}\n\n{intro}\n\n{keys}"


def _run_help() -> str:
    shared = [line for line in _keys(RunConfig, "") if line.split()[0].split(".")[0] not in STAGES]
    return "\n\n".join(
        [
            "All stages of one config, skipping what is complete and resuming what is not.",
            "loram run --config jobs/configs/demo.yaml",
            "Keys of the config, beside the sections of the stages (see loram STAGE --help):",
            *shared,
        ]
    )


def _keys(model: type[BaseModel], prefix: str, defaults: BaseModel | None = None) -> list[str]:
    """One line a key: name, default, meaning; the keys of sections inside follow."""
    lines = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        default = field.default if defaults is None else getattr(defaults, name)
        inside = section_types(field.annotation)
        if not inside or field.description:
            said = "required" if default is PydanticUndefined else f"default {default}"
            lines.append(f"  {key} ({said}): {field.description}")
        for inner in inside:
            values = default if isinstance(default, BaseModel) else None
            kind: Any = get_origin(field.annotation)
            place = {tuple: ".N", dict: ".KEY"}.get(kind, "")
            if len(inside) > 1:
                lines.append(f"  {key}{place} of kind {kind_of(inner)}: {inner.__doc__}")
            lines += _keys(inner, f"{key}{place}.", values)
    return lines
