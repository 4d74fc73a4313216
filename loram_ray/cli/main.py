"""The ``loram`` command: parse, call a stage, print. Nothing else."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

import loram_ray
from loram_ray.addresses import without_credentials
from loram_ray.cli import jobs as cli_jobs
from loram_ray.cli.commands import add_commands
from loram_ray.cli.tables import AsJson, Config, Debug, Overrides, console, print_json
from loram_ray.errors import LoramError, describe_path_error, one_line, root_cause
from loram_ray.runtime.interruption import Ending, Interruption
from loram_ray.runtime.launchers import forget_launchers
from loram_ray.runtime.streams import reader_is_gone, safe_streams
from loram_ray.utils.printing import plain, show

_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="loram",
    help="LoRAM: train a LoRA on a pruned model, recover it, use it on the full model.\n\n"
    "Settings come from options, from --set, or from a run file (--config), in this order. "
    "Start with loram init.",
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


add_commands(app)
app.command("submit", help=cli_jobs.SUBMIT_HELP)(cli_jobs.submit_command)
app.add_typer(cli_jobs.app, name="jobs")


_PLAN_HELP = """What a recipe will need, from shapes alone, before anything is loaded or rented.

loram plan --config jobs/configs/llama-3.1-70b.yaml

loram plan --config jobs/configs/llama-3.1-70b.yaml --set prune.ratio=0.95

Parameters and bytes of the base and of the pruned model, in bf16 and in NF4 (nominal: four bits a
parameter, as the paper counts; stored: what quantize writes, with embeddings and lm_head in bf16);
the memory of training a LoRA, by parts, and the GPUs that have it; what alignment needs. Only the
base's config.json is read; the shapes of the Llama 2 and 3.1 models are known without. Where the
config has no train section, training is as by default, with activations checkpointed and a LoRA on
lm_head as in the paper.
"""


@app.command("plan", help=_PLAN_HELP)
def plan_command(
    config: Config = None,
    overrides: Overrides = None,
    base_config: Annotated[
        Path | None,
        typer.Option("--base-config", help="The base's config.json, if it is nowhere else."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print what a recipe will need."""
    from loram_ray.estimating.forecast import forecast
    from loram_ray.estimating.tables import tables

    found = forecast(config, overrides or (), base_config)
    if as_json:
        print_json(found.as_json())
        return
    out = console(120)
    for part in tables(found):
        out.print(part)


_REPORT_HELP = """A page on a run, a batch, a sweep or a comparison, complete or not.

loram report runs/demo

Writes report.html, one file that needs no network, and report.md with its plots as PNG: the
stages with their sizes and times, losses, throughput, memory against GPUs, what pruning kept,
scores with their errors, quality against reduction, faults survived, and each stage's settings and
inputs. Plots need matplotlib: pip install 'loram-ray[report]'.
"""


@app.command("report", help=_REPORT_HELP)
def report_command(
    directory: Annotated[
        Path, typer.Argument(help="What a command wrote, or writes.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Directory to write; default: report in the directory."),
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


_CHAT_HELP = """Talk to a model, for a quick look at what was learnt; on a GPU where there is one.

loram chat --model runs/demo/inputs/base --adapter runs/demo/adapter

loram chat --model runs/demo/merged --prompt "What is 3 + 4?"

The model is a base, pruned, aligned, quantised or merged one. On a terminal the conversation goes
on until an empty line or Ctrl-D; with --prompt, or a question on standard input, there is one
answer, which alone is printed on standard output.
"""


@app.command("chat", help=_CHAT_HELP)
def chat_command(
    model: Annotated[str, typer.Option("--model", help="Directory of a model, or a hub id.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Directory of an adapter to put on it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One question.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja file, if the model has none.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws above temperature 0.")] = 0,
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
    """The one that is given, or all of standard input, or line after line from a terminal."""
    if prompt is not None or not sys.stdin.isatty():
        question = (prompt if prompt is not None else sys.stdin.read()).strip()
        if not question:
            raise LoramError("--prompt must hold a question, got none; write one")
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


def main(*before: str) -> None:
    """Run the command; a user's mistake is one line and exit code 2, a failure is exit code 1.

    An interruption is one line, too; the exit code says by which signal.

    Args:
        before: words of the command that come before those of the process.
    """
    try:
        with safe_streams():
            _run_command(*before)
    except LoramError as error:  # of standard output itself
        print(f"loram: {error}", file=sys.stderr)
        sys.exit(2)


def _run_command(*before: str) -> None:
    sys.argv[1:1] = before
    # bitsandbytes warns that a kernel nobody asked for is not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with Interruption() as interruption:
        try:
            forget_launchers()
            command = typer.main.get_command(app)
            sys.exit(command.main(prog_name="loram", standalone_mode=False))
        except BaseException as error:
            if "--debug" in sys.argv and not isinstance(error, SystemExit):
                print(without_credentials(traceback.format_exc()), file=sys.stderr, end="")
            if interruption.ending is not None:
                _end(interruption.ending)
            if isinstance(error, SystemExit):
                raise
            sys.exit(_tell(error))


def _end(ending: Ending) -> None:
    """End at once: threads that were interrupted must not go on while Python is taken down."""
    print(f"loram: {ending.line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ending.code)


def _tell(error: BaseException) -> int:
    """Print an error, one line for each mistake; return the exit code."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    root = root_cause(error)
    if isinstance(root, LoramError):
        code, lines = 2, [f"{line} ({notes})" if notes else line for line in root.lines]
    elif (usage := _usage(error)) is not None:
        code, lines = 2, usage
    elif (place := describe_path_error(root)) is not None:
        code, lines = 2, [place]
    else:
        more = f"--debug shows more; {notes}" if notes else "--debug shows more"
        code, lines = 1, [f"failed: {one_line(error)} ({more})"]
    for line in lines:
        print(plain(f"loram: {' '.join(line.splitlines())}"), file=sys.stderr)
    return code


def _usage(error: BaseException) -> list[str] | None:
    """The lines on a mistake in the arguments; None for any other error."""
    if not isinstance(error, _USAGE_ERROR):
        return None
    path = error.ctx.command_path if error.ctx is not None else "loram"
    message = error.format_message().strip()  # none where the help was shown instead
    return [f"{message.rstrip('.')}; see {path} --help"] if message else []
