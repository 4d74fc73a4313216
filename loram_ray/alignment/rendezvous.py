"""Bind the workers' process group to a single address of a node.

Imports Ray Train, so import this module only after Ray is set up.
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
    """Ray Train process group whose store listens only on the first worker's address."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Backend that sets up the workers."""
        return _OneAddressBackend


class _OneAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_at_one_address)
        super().on_start(worker_group, backend_config)


def listen_at_one_address() -> None:
    """Make process group stores in this process listen only on their given address.

    Torch's own store listens on all addresses and accepts requests from anyone.
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
