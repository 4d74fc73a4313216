"""Submit stages as Ray Jobs, and follow, retry, list and stop them.

The runtime environment contains this package's code and the run file, but no weights, data or
secrets. Weights and data are on storage that the cluster's nodes share, and secrets in the
environment that the nodes were started with.
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

from loram_ray.addresses import credentials_error, without_credentials
from loram_ray.config import RunConfig
from loram_ray.errors import LoramError
from loram_ray.runtime.locks import backoff

T = TypeVar("T")

RUN_FILE = "run.yaml"
ADDRESS = "http://127.0.0.1:8265"
USER_ERROR, INTERRUPTED = 2, 130
_SECRET = re.compile(r"token|secret|password|passwd|credential|(^|_)key($|_)", re.IGNORECASE)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PATIENCE = 300.0
"""Seconds without an answer of the cluster until a request fails."""

Environment = Literal["image", "package", "pins"]


@dataclass(frozen=True)
class JobSpec:
    """Specification of a job.

    Attributes:
        command: Command of ``loram``, e.g. ``train``.
        config: Path of the validated run file.
        overrides: Dotted keys with values, as in ``--set``.
        directory: Directory on the cluster that relative paths refer to.
        environment: Code to run: ``image`` uses what is installed on the cluster; ``package`` adds
            this package's code; ``pins`` also installs its dependencies in the local versions.
        variables: Environment variables, without secrets.
        cpus: Logical CPUs of the entry point. It runs on the head node if it requests no resources.
        gpus: GPUs of the entry point.
        memory: Memory of the entry point in bytes.
        metadata: Labels to find the job by.
        name: Name of the job. Default: a unique one.
        retries: Number of times to resubmit a job that failed through no fault of its own.
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
                    f"--env must not contain secrets, got {name}, which would be shown with the "
                    "job; set it in the environment of the cluster's nodes"
                )

        seen = {"--env": self.variables, "--metadata": self.metadata}
        for option, pairs in seen.items():
            for name, value in pairs.items():
                if problem := credentials_error(value):
                    raise LoramError(f"{option} {name} {problem}")

    def entrypoint(self) -> str:
        """Return the shell command that the cluster runs."""
        line = ["python", "-m", "loram_ray.cli", self.command, "--set", "ray.address=auto"]
        for override in self.overrides:
            line += ["--set", override]
        file, there = f'FILE="$PWD"/{RUN_FILE}', f"cd {shlex.quote(self.directory)} || exit 2"
        return f'{file}; {there}; exec {shlex.join(line)} --config "$FILE"'

    def described(self) -> dict[str, str]:
        """Return the metadata shown with the job, without secrets."""
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
        """Create the runtime environment.

        Args:
            folder: Empty directory for the run file.
        """
        (folder / RUN_FILE).write_bytes(self.config.read_bytes())
        environment: dict[str, Any] = {"working_dir": str(folder)}
        if self.environment != "image":
            environment["py_modules"] = [str(Path(__file__).parents[1])]
            environment["excludes"] = ["**/__pycache__/"]
        if self.environment == "pins":
            environment["pip"] = pins()
        if self.variables:
            environment["env_vars"] = dict(self.variables)
        return environment


def pins() -> list[str]:
    """Pin this package's dependencies to the local versions, except Ray.

    A job must use the cluster's own version of Ray to connect to it.
    """
    pinned = []
    for line in requires("loram-ray") or ():
        named = re.match(r"[A-Za-z0-9_.-]+", line)
        if named is None or "extra ==" in line or named[0] == "ray":
            continue
        installed = version(named[0]).partition("+")[0]  # without torch's local version suffix
        pinned.append(f"{named[0]}=={installed}")
    return pinned


def require_directory(address: str, directory: str | None, settings: RunConfig) -> str:
    """Return the directory on the cluster that a run's relative paths refer to.

    Args:
        address: Address of the cluster's dashboard.
        directory: Directory given by the user, if any.
        settings: Run file.

    Raises:
        LoramError: No directory is given, the cluster is remote, and the run has relative paths.
    """
    if directory is not None:
        return directory
    if _host_of(address) in _LOCAL:
        return str(Path.cwd())
    relative = next((path for path in _paths(settings) if not path.is_absolute()), None)
    if relative is not None:
        raise LoramError(
            f"--directory must be given for relative paths such as {relative}; add a directory on "
            "storage that all nodes share"
        )
    return "/"


def _host_of(address: str) -> str:
    """Return the host of a dashboard's address.

    Raises:
        LoramError: The address is not http or https. Ray would import a module named
            after any other scheme.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlparse(url)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = None
    if not host or scheme not in ("http", "https"):
        raise LoramError(
            "--address must be the dashboard of a Ray cluster, such as http://127.0.0.1:8265, "
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
    """Client for the jobs of a cluster.

    Args:
        address: Address of the cluster's dashboard, e.g. ``http://127.0.0.1:8265``.
        log: Callback for lines that explain delays.
        patience: Seconds without an answer of the cluster until a request fails.

    Raises:
        LoramError: The address is invalid, no cluster answers, or it rejects the token.
    """

    def __init__(
        self,
        address: str,
        log: Callable[[str], None] = lambda line: None,
        patience: float = _PATIENCE,
    ) -> None:
        _host_of(address)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            address  # the environment takes precedence over Ray's argument
        )
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard", "ray._private.runtime_env"):  # logged here instead
            logging.getLogger(name).setLevel(logging.WARNING)
        self._address = without_credentials(address)  # for messages
        self._log, self._patience = log, patience
        with self._explained():
            self._client = JobSubmissionClient(address)

    def submit(self, spec: JobSpec, attempt: int = 0) -> str:
        """Submit a job once, even over lost connections; return its name."""
        name = (
            spec.name or f"loram-{spec.command}-{time.strftime('%m%d%H%M')}-{secrets.token_hex(3)}"
        )
        if attempt:
            name += f"-{attempt}"
        with tempfile.TemporaryDirectory() as folder, self._explained():
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
                        return name  # the request was accepted, but its answer was lost
                    raise
                finally:
                    sent.append(name)

            sent: list[str] = []
            return self._answered(send)

    def follow(self, name: str, show: Callable[[str], None]) -> int:
        """Show a job's output until it ends, reconnecting as needed; return its exit code."""
        asyncio.run(self._follow(name, show))
        return exit_code(self._ended(name))

    def details(self, name: str) -> Any:
        """Return Ray's details of a job."""
        with self._explained(name):
            return self._answered(lambda: self._client.get_job_info(name))

    def all(self) -> list[Any]:
        """Return Ray's details of all submitted jobs, newest first."""
        with self._explained():
            listed = self._answered(self._client.list_jobs)
        submitted = [job for job in listed if job.submission_id]
        return sorted(submitted, key=lambda job: -(job.start_time or 0))

    def logs(self, name: str) -> str:
        """Return a job's output so far."""
        with self._explained(name):
            return self._answered(lambda: self._client.get_job_logs(name))

    def stop(self, name: str) -> str:
        """Stop a job, wait until it has stopped and return its state."""
        with self._explained(name):
            self._answered(lambda: self._client.stop_job(name))
        return str(self._ended(name).status.value)

    def _ended(self, name: str) -> Any:
        """Wait until a job has ended and return Ray's details of it."""
        while not (details := self.details(name)).status.is_terminal():
            time.sleep(0.5)
        return details

    async def _follow(self, name: str, show: Callable[[str], None]) -> None:
        shown = 0
        waits = backoff(self._patience)
        while True:
            passed = 0
            try:
                async for text in self._client.tail_job_logs(name):
                    new = text[max(shown - passed, 0) :]  # a new connection replays all output
                    passed += len(text)
                    if new:
                        show(new)
                        shown = max(shown, passed)
                        waits = backoff(self._patience)
                if self.details(name).status.is_terminal():
                    return
                lost = "the connection was closed"
            except (OSError, RuntimeError) as error:
                self.details(name)  # raises if the job no longer exists
                lost = _short(error)
            self._wait(waits, lost)

    def _answered(self, ask: Callable[[], T]) -> T:
        waits = backoff(self._patience)
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
                f"({why}); the job may still be running, check with loram jobs list"
            )
        self._log(f"no answer from {self._address} ({why}); retrying in {seconds:.0f} s")
        time.sleep(seconds)

    @contextmanager
    def _explained(self, name: str | None = None) -> Iterator[None]:
        """Replace errors that the user can fix by a `LoramError`."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise LoramError(
                f"the cluster at {self._address} rejected the token; set RAY_AUTH_TOKEN to the "
                "cluster's token, or RAY_AUTH_TOKEN_PATH to a file with it"
            ) from error
        except ConnectionError as error:
            raise LoramError(
                f"--address must be the dashboard of a Ray cluster, but {self._address} does not "
                "answer; start the cluster or forward its port"
            ) from error
        except RuntimeError as error:
            if name is not None and ("404" in str(error) or "does not exist" in str(error)):
                line = f"job {name} does not exist at {self._address}; see loram jobs list"
                raise LoramError(line) from error
            if "already exists" in str(error):
                line = "--name must be new, but a job with that name exists; choose another"
                raise LoramError(line) from error
            raise


def run_job(
    jobs: Jobs,
    spec: JobSpec,
    show: Callable[[str], None],
    began: Callable[[str], None],
    pauses: Callable[[], Iterator[float]] = lambda: backoff(float("inf"), first=10.0),
) -> int:
    """Submit and follow a job; resubmit it if it failed through no fault of its own.

    Args:
        jobs: Jobs of the cluster.
        spec: Specification of the job.
        show: Callback for the job's output.
        began: Callback for the name of each attempt.
        pauses: Function that returns the pauses between attempts, in seconds.

    Returns:
        Exit code of the last attempt.
    """
    waits = pauses()
    for attempt in range(spec.retries + 1):
        name = jobs.submit(spec, attempt)
        began(name)
        code = jobs.follow(name, show)
        if attempt == spec.retries or not is_retryable(spec.command, code):
            return code
        time.sleep(next(waits))
    raise AssertionError("not reachable")


def exit_code(details: Any) -> int:
    """Return a job's exit code: the driver's, 130 if it was stopped, 137 if unknown."""
    state = str(details.status.value)
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code
    return 137 if code is None else int(code) if code > 0 else 128 - int(code)


def is_retryable(command: str, code: int) -> bool:
    """Return whether a retry may succeed: not after a user's mistake or a stop.

    A batch that exits with 1 is complete; the reasons of its failed tasks are in the results table.
    """
    return code not in (0, USER_ERROR, INTERRUPTED) and not (command == "batch" and code == 1)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
