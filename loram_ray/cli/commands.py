"""Commands of the command line, created from the table of commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.markup import escape
from typer.core import TyperCommand

from loram_ray.cli.tables import AsJson, Config, Debug, Overrides
from loram_ray.commands import COMMANDS, Command, imported
from loram_ray.config import kind_of, load_command, section_types
from loram_ray.config.flags import Flag, Kind, default_text, flags_for
from loram_ray.runtime.progress import notice

_GIVEN, _PREVIEW = "loram.given", "preview_"
_WIDEST = 24


def add_commands(app: typer.Typer) -> None:
    """Add every command of the table to the app."""
    for command in COMMANDS:
        app.command(
            command.name,
            cls=type(command.section_name, (_Configured,), {"row": command}),
            help=_help(command),
            epilog=_epilog(command),
            rich_help_panel=command.panel,
            context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
        )(_function_of(command))


def _function_of(command: Command) -> Callable[..., None]:
    def call(
        context: typer.Context,
        config: Config = None,
        overrides: Overrides = None,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        given = context.meta[_GIVEN]
        flags = given_flags(command, given)
        section, ray, unread = load_command(command, config, overrides or (), flags)
        text = f"ignores these sections of {config}: {', '.join(unread)}" if unread else None
        with notice(command.name, text):
            if (examples := given.get(_PREVIEW)) is not None:
                imported(command.preview)(section, examples, as_json)
                return
            result = command(section, ray)
        imported(command.printer)(command.name, result, as_json)

    return call


def given_flags(command: Command, given: dict[str, Any]) -> list[tuple[Flag, str]]:
    """Return the options of a section that were given, with their texts.

    Args:
        command: The command.
        given: Values by the parameter names that typer parsed.
    """
    texts = ((flag, _text(flag, given)) for flag in flags_for(command))
    return [(flag, text) for flag, text in texts if text is not None]


def _text(flag: Flag, given: dict[str, Any]) -> str | None:
    """Return the text given for a key; None if the option was not given."""
    value = given[_parameter(flag.key)]
    if given.get(_off(flag.key)) is not None:
        value = False
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Configured(TyperCommand):
    """Command with an option for each key of its section, created when it is called."""

    row: Command

    @cached_property
    def _options(self) -> list[Any]:
        flags = sorted(flags_for(self.row), key=_place_in_help)
        options = [option for flag in flags for option in _options_of(flag)]
        if self.row.preview:
            options.append(_preview_option())
        return _made_by_typer(options)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the section's options and those that all commands have."""
        return [*self._options, *super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        """Call the function with its own options; store the section's options in the context."""
        ctx.meta[_GIVEN] = {option.name: ctx.params.pop(option.name) for option in self._options}
        return super().invoke(ctx)


def _made_by_typer(options: list[inspect.Parameter]) -> list[Any]:
    """Return the options that typer creates from a function's parameters."""

    def function(**_: Any) -> None: ...

    function.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app).params


def _options_of(flag: Flag) -> Iterator[inspect.Parameter]:
    """Yield a key's option; if a switch is off by default, its negative form is hidden."""
    shown: Any = {"help": _sentence(flag), "hidden": flag.hidden, "rich_help_panel": _panel(flag)}
    if flag.kind is not Kind.SWITCH:
        metavar, completion = _metavar(flag), _completion(flag)
        kind: Any = Path if flag.kind is Kind.PATH else str
        info = typer.Option(flag.option, metavar=metavar, autocompletion=completion, **shown)
        yield _parameter_of(_parameter(flag.key), kind, info)
        return
    parents, dot, last = flag.option.removeprefix("--").rpartition(".")
    off = f"--{parents}{dot}no-{last}"
    if flag.default == "false":
        yield _parameter_of(_parameter(flag.key), bool, typer.Option(flag.option, **shown))
        yield _parameter_of(_off(flag.key), bool, typer.Option(off, hidden=True))
    else:
        both = typer.Option(f"{flag.option}/{off}", **shown)
        yield _parameter_of(_parameter(flag.key), bool, both)


def _preview_option() -> inspect.Parameter:
    help = "Show the tokens of the first examples and which carry loss, instead of training."
    return _parameter_of(
        _PREVIEW, int, typer.Option("--preview", min=1, metavar=Kind.INTEGER.value, help=help)
    )


def _parameter_of(name: str, kind: Any, option: Any) -> inspect.Parameter:
    option.show_default = False  # the help text contains it
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _place_in_help(flag: Flag) -> tuple[bool, bool]:
    """Return the sorting key of an option: its section's own keys and required ones come first."""
    return "." in flag.key, not flag.required


def _parameter(key: str) -> str:
    """Return the name of a key's parameter."""
    return key.replace(".", "__")


def _off(key: str) -> str:
    """Return the name of the parameter that turns a switch off."""
    return f"{_parameter(key)}__off"


def _metavar(flag: Flag) -> str:
    """Return the placeholder of a value: its choices, if they fit into a column."""
    choices = f"<{'|'.join(flag.choices)}>"
    return choices if flag.choices and len(choices) <= _WIDEST else flag.kind.value


def _sentence(flag: Flag) -> str:
    """Return the description of a key, with its choices and default."""
    words = [flag.help]
    if flag.choices and _metavar(flag) == flag.kind.value:
        words.append(f"[one of: {', '.join(flag.choices)}]")
    if flag.required:
        words.append("[required]")
    elif flag.default is not None:
        words.append(f"[default: {flag.default}]")
    return escape(" ".join(words))


def _panel(flag: Flag) -> str:
    """Return the option's panel in the help; each nested section has its own."""
    head, dot, _ = flag.key.rpartition(".")
    return f"Settings of {head}" if dot else "Settings"


def _completion(flag: Flag) -> Callable[[str], list[str]] | None:
    if not flag.choices:
        return None
    return lambda incomplete: [one for one in flag.choices if one.startswith(incomplete)]


def _help(command: Command) -> str:
    title = inspect.cleandoc(command.model.__doc__ or "").removeprefix(f"{command.name}: ")
    example = f"Example: loram {command.name} {command.example}"
    return escape(f"{title[0].upper()}{title[1:]}\n\n{example}")


def _epilog(command: Command) -> str:
    """Return the help on keys inside lists and dictionaries, which have no options."""
    lines = [*_items(command.model, "")] if command.name != "run" else []
    return (
        escape("\n\n".join(["Keys of items in lists and dictionaries:", *lines])) if lines else ""
    )


def _items(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inside = section_types(field.annotation)
        place = _place(field.annotation)
        for inner in inside:
            if not place:
                yield from _items(inner, f"{key}.")
                continue
            if len(inside) > 1:
                yield f"{key}{place} with kind {kind_of(inner)}: {inner.__doc__}"
            yield from _keys(inner, f"{key}{place}.")


def _place(annotation: Any) -> str:
    """Return how a dotted key refers to an item: by number or by key."""
    places: dict[Any, str] = {tuple: ".N", dict: ".KEY"}
    return places.get(get_origin(annotation), "")


def _keys(model: type[BaseModel], prefix: str, defaults: BaseModel | None = None) -> Iterator[str]:
    """Yield one line per key with name, default and meaning, including keys of nested sections."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        default = field.default if defaults is None else getattr(defaults, name)
        inside = section_types(field.annotation)
        if field.description:
            yield f"{key} ({_note_on(default)}): {field.description}"
        for inner in inside:
            values = default if isinstance(default, BaseModel) else None
            yield from _keys(inner, f"{key}{_place(field.annotation)}.", values)


def _note_on(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    text = None if isinstance(default, BaseModel) else default_text(default)
    return "optional" if text is None else f"default {text}"
