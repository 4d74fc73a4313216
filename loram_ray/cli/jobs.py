"""loram submit and loram jobs: run the same commands on a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from loram_ray.cli.tables import AsJson, Debug, Overrides, console, help_text, print_json
from loram_ray.commands import COMMAND_OF
from loram_ray.config import RunConfig, load_run, section_of
from loram_ray.errors import LoramError
from loram_ray.runtime.interruption import current
from loram_ray.runtime.streams import reader_is_gone
from loram_ray.runtime.submission import (
    ADDRESS,
    Environment,
    Jobs,
    JobSpec,
    require_directory,
    run_job,
)
from loram_ray.utils.printing import plain, show, without_colours

Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="Address of the Ray dashboard."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.", show_default=False)]
CommandName = Annotated[
    str,
    typer.Argument(metavar="COMMAND", help=f"One of {', '.join(COMMAND_OF)}.", show_default=False),
]
RunFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="Run file.")]
Directory = Annotated[
    str | None,
    typer.Option(
        "--directory", help="Folder on the cluster that relative paths are resolved against."
    ),
]
Installation = Annotated[
    Environment,
    typer.Option(
        "--environment",
        help="Code that the job runs. 'image': what is installed on the nodes; 'package': this "
        "installation of loram_ray; 'pins': also its dependencies, in the versions installed "
        "here.",
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME=VALUE",
        help="Environment variable for the job and its workers, e.g. KEY=VALUE; not for secrets.",
    ),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="Metadata of the job, e.g. KEY=VALUE."),
]
Cpus = Annotated[
    float,
    typer.Option(
        "--entrypoint-cpus",
        min=0,
        help="CPUs of the entry point. With 0 it runs on the head node.",
    ),
]
Gpus = Annotated[float, typer.Option("--entrypoint-gpus", min=0, help="GPUs of the entry point.")]
Memory = Annotated[
    int, typer.Option("--entrypoint-memory", min=0, help="Memory of the entry point in bytes.")
]
NewName = Annotated[str | None, typer.Option("--name", help="Name of the job. Default: generated.")]
Retries = Annotated[
    int, typer.Option("--retries", min=0, help="Maximum number of times to resubmit a failed job.")
]
Detach = Annotated[
    bool,
    typer.Option("--detach", help="Print the job's name and return immediately, without retries."),
]

SUBMIT_HELP = """Run a command on a cluster as a Ray job, show its output and return its exit code.

Example: loram submit train --config jobs/configs/demo.yaml --address http://127.0.0.1:8265

The run file is checked here and sent with the job. Its relative paths are resolved against
--directory, a folder on storage that all nodes share. On a local cluster it defaults to the working
directory. Weights, data and secrets are not sent. Set secrets such as HF_TOKEN in the nodes'
environment.

Ctrl-C leaves the job running. A job that fails is resubmitted up to --retries times, with
increasing delays, and resumes from its last checkpoint. A mistake in the run file is not retried.

The cluster's token is read from RAY_AUTH_TOKEN, from the file in RAY_AUTH_TOKEN_PATH, or from
~/.ray/auth_token. Plain HTTP does not hide it: forward the port (ssh -L, kubectl port-forward,
ray dashboard) or use TLS.
"""

app = typer.Typer(help="List and stop submitted jobs, and show their output.", no_args_is_help=True)


def submit_command(
    command: CommandName,
    config: RunFile,
    overrides: Overrides = None,
    address: Address = ADDRESS,
    directory: Directory = None,
    environment: Installation = "package",
    variables: Variables = None,
    metadata: Metadata = None,
    cpus: Cpus = 0,
    gpus: Gpus = 0,
    memory: Memory = 0,
    name: NewName = None,
    retries: Retries = 3,
    detach: Detach = False,
    debug: Debug = False,
) -> None:
    """Run a stage on a cluster."""
    settings = _checked(command, config, overrides or ())
    spec = JobSpec(
        command=command,
        config=config,
        overrides=overrides or (),
        directory=require_directory(address, directory, settings),
        environment=environment,
        variables=_pairs(variables, "--env"),
        cpus=cpus,
        gpus=gpus,
        memory=memory,
        metadata=_pairs(metadata, "--metadata"),
        name=name,
        retries=retries,
    )
    jobs = Jobs(address, _say)
    if detach:
        print(jobs.submit(spec))
    else:
        _run_and_show(jobs, spec, address)


def _checked(command: str, config: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the run file's settings, which must have the command's section."""
    if command not in COMMAND_OF:
        raise LoramError(
            f"COMMAND must be one of {', '.join(COMMAND_OF)}, got {command}; see loram --help"
        )
    settings = load_run(config, overrides)
    if command != "run":
        section_of(settings, command)
    return settings


def _run_and_show(jobs: Jobs, spec: JobSpec, address: str) -> None:
    """Run a job and show its output; exit with its code if it failed."""
    began: list[str] = []

    def tell(job: str) -> None:
        began.append(job)
        _say(f"submitted {job} to {address}; stop it with: loram jobs stop {job}")
        if (interruption := current()) is not None:
            interruption.remedy = (
                f"{job} is still running; follow it with: loram jobs logs {job} --follow"
            )

    code = run_job(jobs, spec, _show, tell)
    if code:
        _say(f"{began[-1]} exited with code {code}")
        raise typer.Exit(code)


_LIST_HELP = """List the submitted jobs, the newest first.

Example: loram jobs list --address http://127.0.0.1:8265
"""


@app.command("list", help=help_text(_LIST_HELP))
def list_command(address: Address = ADDRESS, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the submitted jobs, the newest first."""
    rows = [_row(job) for job in Jobs(address, _say).all()]
    if as_json:
        print_json(rows)
        return
    table = Table(title="Jobs")
    keys = ("name", "state", "command", "config", "began", "minutes")
    for key in keys:
        table.add_column(key, justify="right" if key == "minutes" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys))
    console(140).print(table)


_LOGS_HELP = """Print the output of a job.

Example: loram jobs logs NAME --follow
"""


@app.command("logs", help=help_text(_LOGS_HELP))
def logs_command(
    name: Name,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Follow the output until the job ends, and return its exit code."
        ),
    ] = False,
    address: Address = ADDRESS,
    debug: Debug = False,
) -> None:
    """Print the output of a job."""
    jobs = Jobs(address, _say)
    if not follow:
        _show(jobs.logs(name))
        return
    code = jobs.follow(name, _show)
    if code:
        raise typer.Exit(code)


_STOP_HELP = """Stop a job. Submitted again, it continues from its last checkpoint.

Example: loram jobs stop NAME
"""


@app.command("stop", help=help_text(_STOP_HELP))
def stop_command(name: Name, address: Address = ADDRESS, debug: Debug = False) -> None:
    """Stop a job. Submitted again, it continues from its last checkpoint."""
    show(f"{name}: {Jobs(address, _say).stop(name).lower()}")


def _row(job: Any) -> dict[str, Any]:
    metadata = job.metadata or {}
    began = (job.start_time or 0) / 1000
    ended = (job.end_time or 0) / 1000 or time.time()
    return {
        "name": job.submission_id,
        "state": str(job.status.value).lower(),
        "command": metadata.get("command", job.entrypoint),
        "config": metadata.get("config", ""),
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)) if began else "",
        "minutes": round((ended - began) / 60, 1) if began else "",
        "metadata": metadata,
    }


def _pairs(lines: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for line in lines or ():
        key, equals, value = line.partition("=")
        if not key or not equals:
            raise LoramError(f"{option} must be NAME=VALUE, got {line}; add an equals sign")
        pairs[key] = value
    return pairs


def _show(text: str) -> None:
    show(without_colours(text), end="")
    if reader_is_gone():
        raise typer.Exit(0)


def _say(line: str) -> None:
    print(plain(f"loram: {line}"), file=sys.stderr, flush=True)
