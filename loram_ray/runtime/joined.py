"""Join a running Ray cluster, after checking that it answers."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from loram_ray.errors import LoramError, shortened
from loram_ray.runtime.embedded import HOST, keeping_signals, on_loopback
from loram_ray.runtime.watching import watched

_CONNECTING = 5.0  # seconds
_AWAY = 40.0
"""Seconds without an answer from the head node until the command ends; Ray exits after 60."""


@contextlib.contextmanager
def joined_ray(address: str, options: dict[str, Any]) -> Iterator[None]:
    """Connect to a running Ray cluster inside the block.

    Args:
        address: Cluster address: ``auto``, ``host:port``, or ``ray://host:port`` for Ray Client.
        options: Further arguments of ``ray.init``.

    Raises:
        LoramError: No cluster answers, or it rejects the token.
    """
    import ray

    endpoint = _address_of(address)
    with contextlib.ExitStack() as stack:
        if endpoint.startswith(f"{HOST}:"):
            stack.enter_context(on_loopback())
        try:
            with keeping_signals():
                ray.init(address=address, logging_level="ERROR", **options)
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(address, str(error)) from error
        stack.callback(ray.shutdown)
        stack.enter_context(watched(_away(endpoint), list, every=1.0))
        yield


def _no_cluster(address: str, why: str) -> LoramError:
    return LoramError(
        f"ray.address must be 'local' or a running cluster, got '{address}' ({shortened(why)}); "
        "start a cluster or use 'local'"
    )


def _address_of(address: str) -> str:
    """Return host and port of a cluster that answers.

    Raises:
        LoramError: No cluster answers.
    """
    from ray._private import services

    client = address.startswith("ray://")
    try:
        given = services.get_ray_address_from_environment(address, None)
        if given.startswith("ray://"):
            client, given = True, given.removeprefix("ray://")
        host, port = services.extract_ip_port(given)
    except (ConnectionError, ValueError, TypeError) as error:
        raise _no_cluster(address, str(error)) from error
    # Ray resolves loopback to the external address, on which our clusters do not listen.
    hosts = [services.resolve_ip_for_localhost(host), host]
    why = ""
    for candidate in dict.fromkeys(hosts):
        try:
            socket.create_connection((candidate, port), timeout=_CONNECTING).close()
        except (OSError, UnicodeError) as error:
            why = f"no answer from {candidate}:{port}: {error}"
            continue
        endpoint = f"{HOST if candidate == 'localhost' else candidate}:{port}"
        if not client:
            _require_head(address, endpoint)
        return endpoint
    raise _no_cluster(address, why)


def _require_head(address: str, endpoint: str) -> None:
    """Raise an error if the server is not the head of a cluster, or rejects the token."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(endpoint)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=_CONNECTING)
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise LoramError(
                f"the cluster at {endpoint} rejected the token; set RAY_AUTH_TOKEN to the "
                "cluster's token, or RAY_AUTH_TOKEN_PATH to a file with it"
            ) from error
        why = f"the server at {endpoint} is not the head of a Ray cluster: {code.name}"
        raise _no_cluster(address, why) from error
    finally:
        channel.close()


def _away(endpoint: str) -> Callable[[], str | None]:
    """Return a function that reports a head node that no longer answers, or None."""
    host, _, port = endpoint.rpartition(":")
    seen = time.monotonic()

    def lost() -> str | None:
        nonlocal seen
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=_CONNECTING).close()
            seen = time.monotonic()
        away = time.monotonic() - seen
        if away < _AWAY:
            return None
        return f"the head of the Ray cluster at {endpoint} has not answered for {away:.0f} s"

    return lost
