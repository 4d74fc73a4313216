"""The ``loram`` command: parses arguments, calls a stage and prints the result."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

import loram_ray
from loram_ray.addresses import without_credentials
from loram_ray.cli import jobs as cli_jobs
from loram_ray.cli import plan
from loram_ray.cli.commands import add_commands
from loram_ray.cli.init import HELP, init_command
from loram_ray.cli.tables import AsJson, Debug, help_text, print_json
from loram_ray.config.aliases import RenamedKeyWarning
from loram_ray.errors import LoramError, describe_path_error, one_line, root_cause
from loram_ray.runtime.interruption import Ending, Interruption
from loram_ray.runtime.launchers import forget_launchers
from loram_ray.runtime.streams import reader_is_gone, safe_streams
from loram_ray.utils.printing import plain, show

START, RESULTS, CLUSTER = "Start", "Results", "On a cluster"
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="loram",
    help="LoRAM: train a LoRA on a pruned model, recover it, use it on the full "
    "model.\n\nSettings come from options, --set and a run file (--config), in order of "
    "precedence. Start with loram init.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"loram {version('loram-ray')}")
        raise typer.Exit


@app.callback()
def _options_of_loram(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


app.command("init", help=help_text(HELP), rich_help_panel=START)(init_command)
app.command("plan", help=help_text(plan.HELP), rich_help_panel=START)(plan.plan_command)

add_commands(app)


_REPORT_HELP = """Write a report on a run, batch, sweep or comparison, even an incomplete one.

Example: loram report runs/demo

Writes report.html, a single file that needs no network, and report.md with plots as PNG. Plots need
matplotlib: pip install 'loram-ray[report]'.
"""


@app.command("report", help=help_text(_REPORT_HELP), rich_help_panel=RESULTS)
def report_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY",
            help="Output directory of the command, which may still be running.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Directory to write to. Default: report, inside the directory."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a page on results."""
    page = loram_ray.report(directory, output)
    if as_json:
        print_json({"page": str(page)})
    else:
        show(f"report: done: {page}")


_CHAT_HELP = """Chat with a model.

Example: loram chat --model runs/demo/inputs/base --adapter runs/demo/adapter

The model can be a base, pruned, aligned, quantised or merged model. On a terminal the conversation
continues until an empty line or Ctrl-D. With --prompt, or a question on standard input, only the
answer is printed.
"""


@app.command("chat", help=help_text(_CHAT_HELP), rich_help_panel=RESULTS)
def chat_command(
    model: Annotated[
        str, typer.Option("--model", help="Model: a directory or a Hugging Face Hub id.")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Directory of a PEFT adapter for the model.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Question to answer once, without a conversation."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template", help="Jinja file with a chat template, if the model has none."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum number of tokens in an answer.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 decodes greedily."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.")] = 0,
    debug: Debug = False,
) -> None:
    """Answer one question, or several on a terminal."""
    from loram_ray.evaluation.chat import Sampling, open_chat

    sampling = Sampling(max_new_tokens, temperature, seed)
    chat = open_chat(model, adapter, template, system, sampling)
    for question in _questions(prompt):
        chat.ask(question, _show_piece)


def _show_piece(text: str) -> None:
    show(text, end="")
    if reader_is_gone():
        raise typer.Exit(0)


def _questions(prompt: str | None) -> Iterator[str]:
    """Yield the given question, or all of standard input, or each line typed on a terminal."""
    if prompt is not None or not sys.stdin.isatty():
        question = (prompt if prompt is not None else sys.stdin.read()).strip()
        if not question:
            raise LoramError("--prompt must not be empty; add a question")
        yield question
        return
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


app.command("submit", help=help_text(cli_jobs.SUBMIT_HELP), rich_help_panel=CLUSTER)(
    cli_jobs.submit_command
)
app.add_typer(cli_jobs.app, name="jobs", rich_help_panel=CLUSTER)


def _run_app() -> int:
    """Parse the arguments and run the command; return the exit code."""
    code = typer.main.get_command(app).main(prog_name="loram", standalone_mode=False)
    return code if isinstance(code, int) else 0


def main(work: Callable[[], int | None] = _run_app) -> None:
    """Run the command: one line and exit code 2 for a user's mistake, exit code 1 for a failure.

    An interruption prints one line too, and its exit code depends on the signal.

    Args:
        work: Does the command's work and returns its exit code.
    """
    try:
        with safe_streams():
            _run_command(work)
    except LoramError as error:  # writing to standard output failed
        print(f"loram: {error}", file=sys.stderr)
        sys.exit(2)


def _run_command(work: Callable[[], int | None]) -> None:
    # bitsandbytes warns about a kernel that is not needed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _renamed_keys_in_one_line(), Interruption() as interruption:
        try:
            forget_launchers()
            sys.exit(work())
        except BaseException as error:
            if "--debug" in sys.argv and not isinstance(error, SystemExit):
                print(without_credentials(traceback.format_exc()), file=sys.stderr, end="")
            if interruption.ending is not None:
                _end(interruption.ending)
            if isinstance(error, SystemExit):
                raise
            sys.exit(_tell(error))


@contextmanager
def _renamed_keys_in_one_line() -> Iterator[None]:
    """Print the warnings about renamed keys as the command's other lines, without a place."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedKeyWarning)
        show_any = warnings.showwarning

        def show_one(message: Any, category: Any, *place: Any, **options: Any) -> None:
            if issubclass(category, RenamedKeyWarning):
                print(plain(f"loram: {message}"), file=sys.stderr)
            else:
                show_any(message, category, *place, **options)

        warnings.showwarning = show_one
        yield


def _end(ending: Ending) -> None:
    """End at once, as interrupted threads must not run during Python's shutdown."""
    print(f"loram: {ending.line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ending.code)


def _tell(error: BaseException) -> int:
    """Print an error, one line for each mistake, and return the exit code."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    root = root_cause(error)
    if isinstance(root, LoramError):
        code, lines = 2, [f"{line} ({notes})" if notes else line for line in root.lines]
    elif (usage := _usage(error)) is not None:
        code, lines = 2, usage
    elif (place := describe_path_error(root)) is not None:
        code, lines = 2, [place]
    else:
        more = "; ".join(filter(None, ("use --debug for the traceback", notes)))
        code, lines = 1, [f"failed: {one_line(error)} ({more})"]
    for line in lines:
        print(plain(f"loram: {' '.join(line.splitlines())}"), file=sys.stderr)
    return code


def _usage(error: BaseException) -> list[str] | None:
    """Return the lines on a mistake in the arguments; None for any other error."""
    if not isinstance(error, _USAGE_ERROR):
        return None
    path = error.ctx.command_path if error.ctx is not None else "loram"
    message = error.format_message().strip()  # empty if the help was printed
    return [f"{message.rstrip('.')}; see {path} --help"] if message else []
