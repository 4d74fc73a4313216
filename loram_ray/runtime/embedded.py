"""An embedded Ray: on loopback, in a folder of its own, with nothing left of it in the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loram_ray.errors import LoramError, root_of
from loram_ray.runtime import interruption
from loram_ray.runtime.scratch import keep, remove_abandoned, scratch, temporary_directory
from loram_ray.runtime.watching import watched

HOST = "127.0.0.1"
_PREFIX = "loram-ray-"
_MARK = "LORAM_RAY_SESSION"
"""Environment variable that names a session's folder in all of its processes."""
_INNER = "r"
"""Ray's own folder inside the session's: Ray lets everybody write to it."""
_LONGEST_PARENT = 22
"""Characters of the folder's parent: a socket's path has at most 107, and 85 are Ray's and ours."""
_ENDING = 5.0  # seconds that Ray's processes have to end by themselves
_ON_LOOPBACK = {
    # Ray then takes 127.0.0.1 for this machine's address, and listens on nothing else; otherwise it
    # takes even "127.0.0.1" for the address that other machines see.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def authenticate() -> None:
    """Give an embedded Ray a token of its own, unless the user has chosen otherwise.

    Other users of the machine cannot connect without.

    Raises:
        LoramError: Ray has been imported already, which is when it reads whether there is a token.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "ray._raylet" in sys.modules:
        raise LoramError(
            "RAY_AUTH_MODE must be set before Ray is imported; set it to token, and RAY_AUTH_TOKEN "
            "to a secret, or import ray after the first stage has run"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def embedded_ray(cpus: int, options: dict[str, Any]) -> Iterator[None]:
    """Have an embedded Ray inside the block.

    Its logs stay if a worker or Ray itself failed; the exception has a note that says where.

    Args:
        cpus: logical CPUs.
        options: more arguments of ``ray.init``.
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
    """Remove the temporary folders of workers that ended with Ray."""
    try:
        yield
    finally:
        remove_abandoned("loram-", temporary_directory())


@contextlib.contextmanager
def _ended(folder: Path) -> Iterator[None]:
    """End Ray after the block, and whatever process of its session is left."""
    import ray

    try:
        yield
    finally:
        current = interruption.current()
        lost = current is not None and current.ending is not None and current.ending.code == 1
        if lost:  # to whom Ray would talk is gone
            interruption.end_processes(_processes_of(folder))
        else:
            ray.shutdown()
            interruption.end_processes(_processes_of(folder), _ENDING)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for this machine's address inside the block."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def keeping_signals() -> Iterator[None]:
    """Have Ray take no signal that this process handles or ignores, while it starts or joins."""
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
    """Where the session's folder can be: sockets are in it, whose paths must be short."""
    usual = temporary_directory()
    for folder in (usual, Path("/tmp")):
        if len(str(folder)) <= _LONGEST_PARENT and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise LoramError(
        f"TMPDIR must be at most {_LONGEST_PARENT} characters long for Ray's sockets, got {usual}, "
        "and /tmp cannot be written; set it to a shorter one"
    )


def _processes_of(folder: Path) -> list[Any]:
    """The processes of a session, wherever they are in the tree, as psutil's."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(_MARK) == str(folder):
                found.append(process)
    return found


def _lost_process(folder: Path) -> Callable[[], str | None]:
    """A function that says which process, that Ray cannot do without, is gone."""
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
    """Whether Ray's logs may say more about an error."""
    chain = [one for one in (error, error.__cause__) if one is not None]
    return any(
        kind.__module__.startswith("ray.") and not isinstance(root_of(one), LoramError)
        for one in chain
        for kind in type(one).__mro__
    )


def _keep_logs(folder: Path) -> Path:
    """Move Ray's logs to where they stay, and remove the rest."""
    logs = folder / "logs"
    for session in (folder / _INNER).glob("session_*"):
        if not session.is_symlink() and (session / "logs").is_dir():
            with contextlib.suppress(OSError):
                (session / "logs").rename(logs)
    shutil.rmtree(folder / _INNER, ignore_errors=True)
    keep(folder)
    return logs
