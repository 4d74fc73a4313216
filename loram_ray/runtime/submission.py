"""The stages as Ray Jobs: submitted, followed until they end, tried again, listed and stopped.

What goes to the cluster is the code of this package and the run file, in a runtime environment;
never weights, data or secrets. Those are on storage that the cluster's nodes see, and in the
environment that they were started with.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlparse

from pydantic import BaseModel

from loram_ray.addresses import problem_with, without_credentials
from loram_ray.config import RunConfig
from loram_ray.errors import LoramError
from loram_ray.runtime.locks import backing_off

T = TypeVar("T")

RUN_FILE = "run.yaml"
ADDRESS = "http://127.0.0.1:8265"
USER_ERROR, INTERRUPTED = 2, 130
_SECRET = re.compile(r"token|secret|password|passwd|credential|(^|_)key($|_)", re.IGNORECASE)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PATIENCE = 300.0
"""Seconds without an answer of the cluster after which it is given up."""

Environment = Literal["image", "package", "pins"]


@dataclass(frozen=True)
class JobSpec:
    """What is submitted.

    Attributes:
        command: of ``loram``, e.g. ``train``.
        config: the run file, read and found valid.
        overrides: dotted keys with values, as ``--set`` takes them.
        directory: on the cluster, where relative paths begin.
        environment: ``image``: what is installed there; ``package``: this package's code over it;
            ``pins``: also its dependencies in the versions that are installed here.
        variables: of the environment, without secrets.
        cpus: logical CPUs of the entry point; it runs on the head node if it asks for nothing.
        gpus: GPUs of the entry point.
        memory: bytes of the entry point.
        metadata: to find the job by.
        name: of the job; default: one that nobody else has.
        retries: times that a job is submitted again which ended for no fault of its own.
    """

    command: str
    config: Path
    overrides: Sequence[str]
    directory: str
    environment: Environment = "package"
    variables: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        for name in self.variables:
            if _SECRET.search(name):
                raise LoramError(
                    f"--env must not carry a secret, got {name}: whoever sees the job would see "
                    "it; set it in the environment that the cluster's nodes are started with"
                )

        seen = {"--env": self.variables, "--metadata": self.metadata}
        for option, pairs in seen.items():
            for name, value in pairs.items():
                if problem := problem_with(value):
                    raise LoramError(f"{option} {name} {problem}")

    def entrypoint(self) -> str:
        """The shell command that the cluster runs."""
        line = ["python", "-m", "loram_ray.cli", self.command, "--set", "ray.address=auto"]
        for override in self.overrides:
            line += ["--set", override]
        file, there = f'FILE="$PWD"/{RUN_FILE}', f"cd {shlex.quote(self.directory)} || exit 2"
        return f'{file}; {there}; exec {shlex.join(line)} --config "$FILE"'

    def described(self) -> dict[str, str]:
        """What is shown with the job: nothing that is secret."""
        text = self.config.read_bytes()
        return {
            "loram": version("loram-ray"),
            "command": self.command,
            "config": self.config.name,
            "config_sha256": hashlib.sha256(text).hexdigest(),
            "directory": self.directory,
            **self.metadata,
        }

    def runtime_env(self, folder: Path) -> dict[str, Any]:
        """The runtime environment, whose files are put into a folder.

        Args:
            folder: empty; it gets the run file.
        """
        (folder / RUN_FILE).write_bytes(self.config.read_bytes())
        found: dict[str, Any] = {"working_dir": str(folder)}
        if self.environment != "image":
            found["py_modules"] = [str(Path(__file__).parents[1])]
            found["excludes"] = ["**/__pycache__/"]
        if self.environment == "pins":
            found["pip"] = pins()
        if self.variables:
            found["env_vars"] = dict(self.variables)
        return found


def pins() -> list[str]:
    """This package's dependencies in the versions that are installed here, Ray's aside.

    Ray is the cluster's own: a job with another one could not talk to it.
    """
    found = []
    for line in requires("loram-ray") or ():
        named = re.match(r"[A-Za-z0-9_.-]+", line)
        if named is None or "extra ==" in line or named[0] == "ray":
            continue
        installed = version(named[0]).partition("+")[0]  # torch says which build it is
        found.append(f"{named[0]}=={installed}")
    return found


def require_directory(address: str, directory: str | None, settings: RunConfig) -> str:
    """Where relative paths of a run begin on the cluster.

    Args:
        address: of the cluster's dashboard.
        directory: as given.
        settings: of the run.

    Raises:
        LoramError: none is given, the cluster is elsewhere and the run has relative paths.
    """
    if directory is not None:
        return directory
    if _host_of(address) in _LOCAL:
        return str(Path.cwd())
    relative = next((path for path in _paths(settings) if not path.is_absolute()), None)
    if relative is not None:
        raise LoramError(
            f"--directory must name the folder on the cluster where relative paths begin, got none "
            f"and {relative}; name one on storage that all its nodes share"
        )
    return "/"


def _host_of(address: str) -> str:
    """The host of a dashboard's address.

    Raises:
        LoramError: it is no address of http or https; Ray would import a module of another's name.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlparse(url)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = None
    if not host or scheme not in ("http", "https"):
        raise LoramError(
            "--address must be that of a Ray cluster's dashboard, such as http://127.0.0.1:8265, "
            f"got {without_credentials(address)}; correct it"
        )
    return host


def _paths(section: BaseModel) -> Iterator[Path]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, BaseModel):
                yield from _paths(one)
            elif isinstance(one, Path):
                yield one


class Jobs:
    """The jobs of a cluster.

    Args:
        address: of its dashboard, e.g. ``http://127.0.0.1:8265``.
        told: called with lines on what is waited for.
        patience: seconds without an answer after which the cluster is given up.

    Raises:
        LoramError: it is no address, no cluster answers there, or it rejects the token.
    """

    def __init__(
        self,
        address: str,
        told: Callable[[str], None] = lambda line: None,
        patience: float = _PATIENCE,
    ) -> None:
        _host_of(address)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to what it is told
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard", "ray._private.runtime_env"):  # what they say, we say
            logging.getLogger(name).setLevel(logging.WARNING)
        self._address = without_credentials(address)  # as messages name it
        self._told, self._patience = told, patience
        with self._clearly():
            self._client = JobSubmissionClient(address)

    def submit(self, spec: JobSpec, attempt: int = 0) -> str:
        """Submit a job, whatever the connection does meanwhile; return its name."""
        name = (
            spec.name or f"loram-{spec.command}-{time.strftime('%m%d%H%M')}-{secrets.token_hex(3)}"
        )
        if attempt:
            name += f"-{attempt}"
        with tempfile.TemporaryDirectory() as folder, self._clearly():
            runtime_env = spec.runtime_env(Path(folder))

            def send() -> str:
                try:
                    return str(
                        self._client.submit_job(
                            entrypoint=spec.entrypoint(),
                            submission_id=name,
                            runtime_env=runtime_env,
                            metadata=spec.described(),
                            entrypoint_num_cpus=spec.cpus or None,
                            entrypoint_num_gpus=spec.gpus or None,
                            entrypoint_memory=spec.memory or None,
                        )
                    )
                except RuntimeError as error:
                    if "already exists" in str(error) and sent:
                        return name  # by the request whose answer was lost
                    raise
                finally:
                    sent.append(name)

            sent: list[str] = []
            return self._answered(send)

    def follow(self, name: str, show: Callable[[str], None]) -> int:
        """Show a job's output until it ends, over lost connections; return its exit code."""
        asyncio.run(self._follow(name, show))
        return exit_code(self._ended(name))

    def details(self, name: str) -> Any:
        """What Ray says of a job."""
        with self._clearly(name):
            return self._answered(lambda: self._client.get_job_info(name))

    def all(self) -> list[Any]:
        """What Ray says of all submitted jobs, the newest first."""
        with self._clearly():
            found = self._answered(self._client.list_jobs)
        submitted = [job for job in found if job.submission_id]
        return sorted(submitted, key=lambda job: -(job.start_time or 0))

    def logs(self, name: str) -> str:
        """All output so far."""
        with self._clearly(name):
            return self._answered(lambda: self._client.get_job_logs(name))

    def stop(self, name: str) -> str:
        """Stop a job and wait until it has; return its state."""
        with self._clearly(name):
            self._answered(lambda: self._client.stop_job(name))
        return str(self._ended(name).status.value)

    def _ended(self, name: str) -> Any:
        """What Ray says of a job when it has ended."""
        while not (details := self.details(name)).status.is_terminal():
            time.sleep(0.5)
        return details

    async def _follow(self, name: str, show: Callable[[str], None]) -> None:
        shown = 0
        waits = backing_off(self._patience)
        while True:
            passed = 0
            try:
                async for text in self._client.tail_job_logs(name):
                    new = text[max(shown - passed, 0) :]  # a new connection begins at the beginning
                    passed += len(text)
                    if new:
                        show(new)
                        shown = max(shown, passed)
                        waits = backing_off(self._patience)
                if self.details(name).status.is_terminal():
                    return
                lost = "the connection was closed"
            except (OSError, RuntimeError) as error:
                self.details(name)  # it is there, or gone
                lost = _short(error)
            self._wait(waits, lost)

    def _answered(self, ask: Callable[[], T]) -> T:
        waits = backing_off(self._patience)
        while True:
            try:
                return ask()
            except OSError as error:
                self._wait(waits, _short(error))

    def _wait(self, waits: Iterator[float], why: str) -> None:
        seconds = next(waits, None)
        if seconds is None:
            raise LoramError(
                f"the cluster at {self._address} has not answered for {self._patience:g} s "
                f"({why}); the job may go on: loram jobs list shows it"
            )
        self._told(f"no answer from {self._address} ({why}); again in {seconds:.0f} s")
        time.sleep(seconds)

    @contextmanager
    def _clearly(self, name: str | None = None) -> Iterator[None]:
        """Say in one line what a user can mend."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise LoramError(
                f"the cluster at {self._address} rejects the token; set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to a file, to that of the cluster"
            ) from error
        except ConnectionError as error:
            raise LoramError(
                f"--address must be that of a Ray cluster's dashboard, nothing answers at "
                f"{self._address}; start the cluster or forward its port"
            ) from error
        except RuntimeError as error:
            if name is not None and ("404" in str(error) or "does not exist" in str(error)):
                said = f"there is no job {name} at {self._address}; see loram jobs list"
                raise LoramError(said) from error
            if "already exists" in str(error):
                said = "--name must be new, the cluster has that job; take another"
                raise LoramError(said) from error
            raise


def run_job(
    jobs: Jobs,
    spec: JobSpec,
    show: Callable[[str], None],
    began: Callable[[str], None],
    pauses: Callable[[], Iterator[float]] = lambda: backing_off(float("inf"), first=10.0),
) -> int:
    """Submit a job and follow it, again if it ended for no fault of its own.

    Args:
        jobs: of the cluster.
        spec: what to submit.
        show: gets the output.
        began: told the name of each try.
        pauses: seconds between tries.

    Returns:
        The exit code of the last try.
    """
    waits = pauses()
    for attempt in range(spec.retries + 1):
        name = jobs.submit(spec, attempt)
        began(name)
        code = jobs.follow(name, show)
        if attempt == spec.retries or not is_worth_another_try(spec.command, code):
            return code
        time.sleep(next(waits))
    raise AssertionError("not reached")


def exit_code(details: Any) -> int:
    """A job's exit code: the driver's, 130 if it was stopped, 137 if it vanished."""
    state = str(details.status.value)
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code
    return 137 if code is None else int(code) if code > 0 else 128 - int(code)


def is_worth_another_try(command: str, code: int) -> bool:
    """Whether a job may succeed when it is tried again: not a user's mistake, nor a stop.

    A batch that ends with 1 has ended: what failed has its reason in the table.
    """
    return code not in (0, USER_ERROR, INTERRUPTED) and not (command == "batch" and code == 1)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
