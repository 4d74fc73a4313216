"""Start a Ray cluster of several nodes on this machine, on loopback, protected by a token.

    python cluster/local_cluster.py
    python cluster/local_cluster.py --workers 3 --cpus 2
    python cluster/local_cluster.py --autoscale 3

All ports listen on loopback only. The token is RAY_AUTH_TOKEN, or a new one. The command prints the
variables to set in other terminals and runs until Ctrl-C, which ends its nodes and no other Ray.
Nodes are processes that share the machine's cores. Their GPUs (--gpus) are only numbers, to try out
how work is placed. With --autoscale, worker nodes start when work waits for them and stop when they
are idle, as in a cloud.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

HOST = "127.0.0.1"
_HEAD = "ray.head.default"  # the name that Ray's provider of such nodes uses
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""If 0, Ray uses 127.0.0.1 as this machine's address and listens on no other."""
_RAY = """
import ray._private.ray_constants as constants
import ray._private.services as services
services.resolve_ip_for_localhost = lambda host: host  # its default is visible to other machines
constants.ENABLE_RAY_CLUSTER = True  # for this process, which may join a cluster on loopback
from ray.scripts.scripts import main
main()
"""
_ATTEMPTS = 3


class _NotStarted(SystemExit):
    """A node did not start, or is not known to the head."""


@dataclass(frozen=True)
class Local:
    """A running cluster.

    Attributes:
        folder: Directory of the session and the token.
        port: Port of the head node.
        dashboard: Address of the dashboard.
        environment: Environment variables that clients must set.
    """

    folder: Path
    port: int
    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def cluster(
    folder: Path,
    workers: int = 2,
    cpus: int = 1,
    gpus: int = 0,
    autoscale: int = 0,
    head_cpus: int = 1,
    port: int | None = None,
    dashboard_port: int | None = None,
    idle_minutes: float = 1.0,
) -> Iterator[Local]:
    """Return a context in which a cluster runs.

    Args:
        folder: Directory of the session, with a path of at most about 50 characters, as it contains
            sockets.
        workers: Number of nodes besides the head.
        cpus: Logical CPUs of each worker.
        gpus: Number of GPUs that each worker claims to have.
        autoscale: Maximum number of additional workers, started when work waits.
        head_cpus: Logical CPUs of the head.
        port: Port of the head. Default: a free one.
        dashboard_port: Port of the dashboard. Default: a free one.
        idle_minutes: Idle time in minutes after which an additional worker ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token.read_text(),
        _LOOPBACK: "0",
    }
    started = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if autoscale:
        started |= {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5",
        }
    worker = ["--num-cpus", str(cpus), "--num-gpus", str(gpus), "--node-ip-address", HOST]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for left in reversed(range(_ATTEMPTS)):
            local = Local(
                folder,
                port or free_port(),
                f"http://{HOST}:{dashboard_port or free_port()}",
                environment,
            )
            head = ["--num-cpus", str(head_cpus)]
            if autoscale:
                file = folder / "autoscaling.yaml"
                config = _autoscaling(local.port, head_cpus, cpus, gpus, autoscale, idle_minutes)
                file.write_text(yaml.safe_dump(config))
                head += ["--autoscaling-config", str(file)]
            try:
                _start_all(local, head, [worker] * workers, started, nodes)
                break
            except _NotStarted:  # a port that was free may be taken by now
                if not left:
                    raise
                _end(nodes, folder)
                nodes.clear()
        yield local
    finally:
        _end(nodes, folder)


def _start_all(
    local: Local,
    head: Sequence[str],
    workers: Sequence[Sequence[str]],
    environment: dict[str, str],
    nodes: list[subprocess.Popen[bytes]],
) -> None:
    """Start a cluster's head and its workers, appending each process to ``nodes``."""
    dashboard_port = int(local.dashboard.rpartition(":")[2])
    line = ["--head", "--port", str(local.port), "--dashboard-host", HOST, "--num-gpus", "0"]
    line += ["--dashboard-port", str(dashboard_port), "--temp-dir", str(local.folder / "ray")]
    line += ["--ray-client-server-port", str(free_port()), "--node-ip-address", HOST]
    log = local.folder / "head.log"
    nodes.append(_start([*line, *head], environment, log))
    for port in (local.port, dashboard_port):
        _wait_until(lambda port=port: _listens(port), nodes[0], log)
    for number, worker in enumerate(workers):  # two at a time may choose the same sockets
        log = local.folder / f"worker-{number}.log"
        nodes.append(_start(["--address", f"{HOST}:{local.port}", *worker], environment, log))
        _wait_until(lambda: _alive(local) == len(nodes), nodes[-1], log)


def _autoscaling(
    port: int, head_cpus: int, cpus: int, gpus: int, most: int, idle_minutes: float
) -> dict[str, object]:
    """Return the configuration of Ray's autoscaler for nodes that are processes."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    return {
        "cluster_name": "loram-local",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{HOST}:{port}",
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,  # a lost node is replaced, SSH could not repair it
        },
        "auth": {},
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "worker_start_ray_commands": [],
        **{f"{name}_commands": [] for name in commands},
    }


def _start(
    arguments: Sequence[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a node with its own ports."""
    ports = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "runtime-env-agent",
        "metrics-export",
    )
    line = [sys.executable, "-c", _RAY, "start", *arguments, "--block", "--disable-usage-stats"]
    line += [f"--{name}-port={free_port()}" for name in ports]
    line += ["--min-worker-port=0", "--max-worker-port=0"]  # any free port
    with log.open("wb") as output:
        return subprocess.Popen(
            line, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def _alive(local: Local) -> int:
    """Return the number of alive nodes; requests beyond their resources are refused."""
    token = local.environment["RAY_AUTH_TOKEN"]
    request = urllib.request.Request(
        f"{local.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
        nodes = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
    return 0


def _wait_until(ready: Callable[[], bool], node: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and node.poll() is None:
        if ready():
            return
        time.sleep(0.2)
    raise _NotStarted(f"a node did not start; see {log}:\n{log.read_text()[-2000:]}")


def _end(nodes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """End the nodes and all processes that they started, and no others."""
    ours = {}
    for node in nodes:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(node.pid)
            ours.update({p.pid: p for p in (tree, *tree.children(recursive=True))})
    mark = str(folder / "ray")
    for process in psutil.process_iter():  # nodes that the autoscaler started
        with contextlib.suppress(psutil.Error):
            if any(mark in part for part in process.cmdline()) and process.pid != os.getpid():
                ours[process.pid] = process
    for node in nodes:
        node.terminate()
    _, left = psutil.wait_procs(list(ours.values()), timeout=10)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=None, help="nodes beside the head (2)")
    parser.add_argument("--cpus", type=int, default=1, help="logical CPUs of a worker")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that a worker says it has")
    parser.add_argument("--autoscale", type=int, default=0, help="workers that may come (0)")
    parser.add_argument("--port", type=int, help="of the head node")
    parser.add_argument("--dashboard-port", type=int, default=8265)
    parser.add_argument("--folder", type=Path, help="of the session; default: a temporary one")
    options = parser.parse_args()
    workers = options.workers if options.workers is not None else 0 if options.autoscale else 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory("-loram")))
        local = stack.enter_context(
            cluster(
                folder,
                workers,
                options.cpus,
                options.gpus,
                options.autoscale,
                port=options.port,
                dashboard_port=options.dashboard_port,
            )
        )
        print("A cluster runs until Ctrl-C. In other terminals:\n")
        print(f"    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={local.folder / 'token'}")
        print(f"    export {_LOOPBACK}=0    # it listens on loopback alone")
        print(
            f"    export RAY_ADDRESS={HOST}:{local.port} RAY_API_SERVER_ADDRESS={local.dashboard}"
        )
        print("    loram jobs list", flush=True)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            signal.pause()


if __name__ == "__main__":
    main()
