"""Embedded Ray: listens on loopback only, in its own directory, and cleans up after itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loram_ray.errors import LoramError, root_cause
from loram_ray.runtime import interruption
from loram_ray.runtime.scratch import keep, remove_abandoned, scratch, temporary_directory
from loram_ray.runtime.watching import watched

HOST = "127.0.0.1"
_PREFIX = "loram-ray-"
_MARK = "LORAM_RAY_SESSION"
"""Environment variable with the session's directory, set in all of its processes."""
_INNER = "r"
"""Ray's subdirectory of the session's directory; Ray makes it writable for all users."""
_LONGEST_PARENT = 22
"""Maximum length of the parent directory: socket paths have at most 107 characters, 85 fixed."""
_ENDING = 5.0  # seconds for Ray's processes to exit
_ON_LOOPBACK = {
    # With this, Ray uses 127.0.0.1 as this machine's address and listens on nothing else; otherwise
    # it replaces even "127.0.0.1" by the external address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def authenticate() -> None:
    """Protect an embedded Ray with a random token, unless the user has set RAY_AUTH_MODE.

    Without the token, other users of the machine cannot connect.

    Raises:
        LoramError: Ray has already been imported, and reads this setting on import.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "ray._raylet" in sys.modules:
        raise LoramError(
            "RAY_AUTH_MODE must be set before Ray is imported; set it to token, and RAY_AUTH_TOKEN "
            "to a secret, or import ray after the first stage"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def embedded_ray(cpus: int, options: dict[str, Any]) -> Iterator[None]:
    """Run an embedded Ray inside the block.

    If a worker or Ray itself fails, the logs are kept and a note on the exception names their path.

    Args:
        cpus: Number of logical CPUs.
        options: Further arguments of ``ray.init``.
    """
    import ray

    with _nothing_left(), scratch(_PREFIX, _parent()) as folder:
        try:
            with _ended(folder):
                with (
                    _environment({**_ON_LOOPBACK, _MARK: str(folder)}),
                    on_loopback(),
                    keeping_signals(),
                ):
                    ray.init(
                        address="local",
                        num_cpus=cpus,
                        include_dashboard=False,
                        logging_level="ERROR",
                        _node_ip_address=HOST,
                        _temp_dir=str(folder / _INNER),
                        **options,
                    )
                with watched(_lost_process(folder), lambda: _processes_of(folder)):
                    yield
        except BaseException as error:
            if _is_of_ray(error):
                logs = _keep_logs(folder)
                error.add_note(f"Ray's logs: {logs}")
            raise


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """Remove the workers' temporary directories after the block."""
    try:
        yield
    finally:
        remove_abandoned("loram-", temporary_directory())


@contextlib.contextmanager
def _ended(folder: Path) -> Iterator[None]:
    """Shut Ray down after the block and kill any remaining process of its session."""
    import ray

    try:
        yield
    finally:
        current = interruption.current()
        lost = current is not None and current.ending is not None and current.ending.code == 1
        if lost:  # a process that the shutdown needs has died
            interruption.end_processes(_processes_of(folder))
        else:
            ray.shutdown()
            interruption.end_processes(_processes_of(folder), _ENDING)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Make Ray use 127.0.0.1 as this machine's address inside the block."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def keeping_signals() -> Iterator[None]:
    """Keep this process's signal handlers while Ray starts or joins a cluster."""
    import signal

    from ray._private import utils

    took = utils.set_sigterm_handler
    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
        utils.set_sigterm_handler = lambda handler: None
    try:
        with interruption.handlers_kept():
            yield
    finally:
        utils.set_sigterm_handler = took


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _parent() -> Path:
    """Return a parent for the session's directory whose path is short enough for sockets."""
    usual = temporary_directory()
    for folder in (usual, Path("/tmp")):
        if len(str(folder)) <= _LONGEST_PARENT and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise LoramError(
        f"TMPDIR must be at most {_LONGEST_PARENT} characters long because of Ray's sockets, got "
        f"{usual}, and /tmp is not writable; set TMPDIR to a shorter path"
    )


def _processes_of(folder: Path) -> list[Any]:
    """Return all processes of a session as ``psutil.Process``, whatever their parent."""
    import psutil

    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(_MARK) == str(folder):
                processes.append(process)
    return processes


def _lost_process(folder: Path) -> Callable[[], str | None]:
    """Return a function that reports a dead process that Ray depends on, or None."""
    import psutil

    needed = {
        process.name(): process
        for process in _processes_of(folder)
        if process.name() in ("gcs_server", "raylet")
    }

    def lost() -> str | None:
        for name, process in needed.items():
            try:
                gone = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            except psutil.Error:
                gone = True
            if gone:
                return f"Ray's {name} process died"
        return None

    return lost


def _is_of_ray(error: BaseException) -> bool:
    """Return whether Ray's logs may contain details of an error."""
    chain = [one for one in (error, error.__cause__) if one is not None]
    return any(
        kind.__module__.startswith("ray.") and not isinstance(root_cause(one), LoramError)
        for one in chain
        for kind in type(one).__mro__
    )


def _keep_logs(folder: Path) -> Path:
    """Move Ray's logs out of its session directory and remove the rest."""
    logs = folder / "logs"
    for session in (folder / _INNER).glob("session_*"):
        if not session.is_symlink() and (session / "logs").is_dir():
            with contextlib.suppress(OSError):
                (session / "logs").rename(logs)
    shutil.rmtree(folder / _INNER, ignore_errors=True)
    keep(folder)
    return logs
