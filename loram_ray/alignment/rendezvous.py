"""Where alignment's workers meet: at one address of a node, and not at all that it has.

Imports Ray Train, so import it where Ray is set up.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore  # type: ignore[attr-defined]


class OneAddressConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's process group, whose store listens at the first worker's address alone."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets up the workers."""
        return _OneAddressBackend


class _OneAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_at_one_address)
        super().on_start(worker_group, backend_config)


def listen_at_one_address() -> None:
    """Have stores of process groups in this process listen at the address that they are given.

    torch's own listen at all addresses, and take everybody's requests.
    """
    import_module("torch.distributed.rendezvous").TCPStore = _store  # type: ignore[attr-defined]


def _store(
    host_name: str,
    port: int,
    world_size: int | None = None,
    is_master: bool = False,
    timeout: timedelta = timedelta(minutes=30),  # noqa: B008 - torch's own default
    **options: Any,
) -> TCPStore:
    if is_master:
        family = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host_name, port), family=family)
        options["master_listen_fd"] = listener.detach()  # torch closes it
    return TCPStore(host_name, port, world_size, is_master, timeout, **options)
