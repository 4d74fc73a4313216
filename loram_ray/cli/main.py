"""The ``loram`` command: parse, call a stage, print. Nothing else."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import loram_ray
from loram_ray.addresses import without_credentials
from loram_ray.cli import jobs as cli_jobs
from loram_ray.cli.tables import (
    AsJson,
    Config,
    Debug,
    Overrides,
    console,
    print_comparison,
    print_json,
    print_scores,
    print_systems,
    print_tasks,
    print_trials,
)
from loram_ray.config import STAGES, RunConfig, kind_of, load_run, section_of, section_types
from loram_ray.errors import LoramError, on_a_place, one_line, root_of
from loram_ray.runtime.interruption import Ending, Interruption
from loram_ray.runtime.launchers import forget_launchers
from loram_ray.runtime.streams import reader_is_gone, safe_streams
from loram_ray.utils.printing import plain, show

app = typer.Typer(
    name="loram",
    help=(
        "LoRAM: train a LoRA on a pruned model, recover it, use it on the full model.\n\n"
        "The stages in order: prune, align, train, recover, merge, evaluate; run does them all. "
        "Many trainings: batch, of many tasks, sweep, of many settings, and compare, of LoRAM with "
        "what else one could do. "
        "For publishers: quantize and publish. Before all of them: plan; after them: report, chat "
        "and export. "
        "On a cluster: submit, with any of these, and jobs."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
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


def _help(stage: str) -> str:
    model = STAGES[stage]
    keys = "\n\n".join(_keys(model, f"{stage}."))
    title = inspect.cleandoc(model.__doc__ or "").removeprefix(f"{stage}: ")
    file = stage if stage in ("batch", "sweep", "compare") else "demo"
    example = f"loram {stage} --config jobs/configs/{file}.yaml"
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


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        config: Config = None,
        overrides: Overrides = None,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        _run_stage(stage, load_run(config, overrides or ()), as_json)

    return command


def _run_stage(stage: str, settings: RunConfig, as_json: bool) -> None:
    section = section_of(settings, stage)
    function = getattr(loram_ray, stage)
    takes_ray = stage in ("prune", "align", "train")
    result = function(section, settings.ray) if takes_ray else function(section)
    if as_json:
        print_json({"output": str(result.output), **asdict(result.manifest)})
        return
    state = "complete before, skipped" if result.skipped else "done"
    show(f"{stage}: {state}: {result.output}")
    for key, value in result.manifest.details.items():
        shown = _spread(value) if isinstance(value, dict) and value else value
        show(f"  {key}: {shown}")


def _spread(values: dict[str, float]) -> str:
    """One line on a number for each of many linears."""
    least, most = min(values.values()), max(values.values())
    return f"{least:.3g} to {most:.3g}, one for each of {len(values)} in manifest.json"


def train_command(
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
    """Train a LoRA, or show what it would be trained on."""
    settings: RunConfig = load_run(config, overrides or ())
    if examples is None:
        _run_stage("train", settings, as_json)
        return
    from loram_ray.finetuning.preview import Preview, preview

    shown = []
    for row in preview(section_of(settings, "train"), examples):
        if isinstance(row, Preview):
            shown.append(row)
        else:
            print(plain(f"loram: cannot be used: {row}"), file=sys.stderr)
    if as_json:
        print_json([row.as_json() for row in shown])
        return
    out = console(120)
    for row in shown:
        out.print(row.as_text(), soft_wrap=not sys.stdout.isatty())


def evaluate_command(
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
    """Score a model."""
    given = list(overrides or ())
    if tasks is not None:
        given.append(f"evaluate.lm_eval.tasks=[{tasks}]")
    settings: RunConfig = load_run(config, given)
    result = loram_ray.evaluate(section_of(settings, "evaluate"), settings.ray)
    if as_json:
        print_json({"output": str(result.output), **asdict(result.manifest)})
        return
    print_scores(result.manifest.details)
    show(f"evaluate: {'complete before, skipped' if result.skipped else 'done'}: {result.output}")


_OWN_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "evaluate": evaluate_command,
}
_OF_SEVERAL = ("batch", "sweep", "compare", "publish")  # which say more than of one directory
for _name in STAGES:
    if _name not in _OF_SEVERAL:
        app.command(_name, help=_help(_name))(_OWN_COMMANDS.get(_name) or _stage_command(_name))


@app.command("batch", help=_help("batch"))
def batch_command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train an adapter for each of many tasks."""
    settings: RunConfig = load_run(config, overrides or ())
    result = loram_ray.batch(section_of(settings, "batch"), settings.ray)
    if as_json:
        print_json(result.rows)
    else:
        print_tasks(result.rows)
        show(f"results: {result.output}")
    if result.failed:
        print(f"loram: batch: {result.failed} of {len(result.rows)} tasks failed", file=sys.stderr)
        raise typer.Exit(1)


@app.command("sweep", help=_help("sweep"))
def sweep_command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Try settings of a training, and keep the best adapter."""
    from loram_ray.runtime.results import read_results

    result = loram_ray.sweep(load_run(config, overrides or ()))
    rows = read_results(result.output)
    if as_json:
        print_json(rows)
        return
    print_trials(rows)
    show(f"sweep: {'complete before, skipped' if result.skipped else 'done'}: {result.output}")


@app.command("compare", help=_help("compare"))
def compare_command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare LoRAM's variants with what else one could do."""
    result = loram_ray.compare(load_run(config, overrides or ()))
    if as_json:
        print_json({"rows": result.rows, "claims": result.claims})
    else:
        print_systems(result.rows, result.claims)
        show(f"results: {result.output}")
    if result.failed:
        for name, reason in result.failed.items():
            print(plain(f"loram: compare: {name}: {reason}"), file=sys.stderr)
        raise typer.Exit(1)


@app.command("publish", help=_help("publish"))
def publish_command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Upload a finished directory to a hub repository."""
    result = loram_ray.publish(section_of(load_run(config, overrides or ()), "publish"))
    if as_json:
        print_json(asdict(result))
        return
    show(f"publish: {'done' if result.changed else 'the same before, nothing sent'}: {result.url}")
    print(f"  commit: {result.commit}")


@app.command("run", help=_run_help())
def run_command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run all stages of one config and compare."""
    settings: RunConfig = load_run(config, overrides or ())
    result = loram_ray.run(settings)
    if as_json:
        print_json({"stages": result.stages, "rows": result.rows})
        return
    if result.rows:
        print_comparison(result.rows)
    show(f"results: {result.output}")


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
            app()
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
    root = root_of(error)
    if isinstance(root, LoramError):
        code, lines = 2, [f"{line} ({notes})" if notes else line for line in root.lines]
    elif (place := on_a_place(root)) is not None:
        code, lines = 2, [place]
    else:
        more = f"--debug shows more; {notes}" if notes else "--debug shows more"
        code, lines = 1, [f"failed: {one_line(error)} ({more})"]
    for line in lines:
        print(plain(f"loram: {' '.join(line.splitlines())}"), file=sys.stderr)
    return code
