"""``shmrpc.connect``: a client, or several as one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, overload

from .client import Client
from .lending import MEMORY_BYTES
from .pool import Pool, check_connections

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .codec import Codec
    from .interceptors import Interceptor
    from .poller import Wait
    from .segments import Backing

__all__ = ["connect"]


@overload
def connect(
    address: str,
    *,
    timeout: float = 5.0,
    fallback: str | None = None,
    max_message_bytes: int = 64 << 20,
    max_memory_bytes: int = MEMORY_BYTES,
    backing: Backing = "auto",
    allow_uids: Iterable[int] = (),
    trust_uids: Iterable[int] = (),
    wait: Wait = "auto",
    spin_budget: float | None = None,
    codec: Codec | None = None,
    interceptors: Iterable[Interceptor] = (),
    retries: int = 0,
    connections: None = None,
) -> Client: ...
@overload
def connect(
    address: str,
    *,
    timeout: float = 5.0,
    fallback: str | None = None,
    max_message_bytes: int = 64 << 20,
    max_memory_bytes: int = MEMORY_BYTES,
    backing: Backing = "auto",
    allow_uids: Iterable[int] = (),
    trust_uids: Iterable[int] = (),
    wait: Wait = "auto",
    spin_budget: float | None = None,
    codec: Codec | None = None,
    interceptors: Iterable[Interceptor] = (),
    retries: int = 0,
    connections: int,
) -> Pool: ...
def connect(
    address: str,
    *,
    timeout: float = 5.0,
    fallback: str | None = None,
    max_message_bytes: int = 64 << 20,
    max_memory_bytes: int = MEMORY_BYTES,
    backing: Backing = "auto",
    allow_uids: Iterable[int] = (),
    trust_uids: Iterable[int] = (),
    wait: Wait = "auto",
    spin_budget: float | None = None,
    codec: Codec | None = None,
    interceptors: Iterable[Interceptor] = (),
    retries: int = 0,
    connections: int | None = None,
) -> Client | Pool:
    """Connect to a server and return a client.

    ``address`` is a service's name such as ``"calc"``, or ``shm://``, ``unix://`` or ``tcp://``;
    ``fallback`` is tried when nobody can be reached there. ``timeout`` in seconds is for making
    the connection, now and whenever it has to be made again; calls have their own.
    ``max_message_bytes`` limits what the server may send. ``max_memory_bytes`` limits the shared
    memory that large values under way may take, in each direction: the smaller limit of both
    sides counts. ``backing`` is where our memory comes from: ``"shm"``, ``"memfd"`` or
    ``"auto"``. ``allow_uids`` are the other users' servers that
    may be talked to; ``trust_uids`` are those of them whose large values are used where they lie,
    as views that their sender could change meanwhile, instead of copies. ``wait`` is ``"auto"``,
    ``"spin"`` (lowest latency at any cost) or ``"block"``; ``spin_budget`` in seconds is how long
    ``"auto"`` spins at most.
    ``interceptors`` see every call, the first outermost (see ``shmrpc.interceptors``).
    ``retries`` is how often a call is repeated whose connection was lost before it started, or
    that may have run and is declared idempotent (see ``shmrpc.retries.Retries``).

    With ``connections`` so many are made, and each call goes to the one with the fewest calls under
    way: a ``Pool``, which uses several workers of a server at a time.

    Raises ``ConnectError``.
    """
    options: dict[str, Any] = {
        "timeout": timeout,
        "fallback": fallback,
        "max_message_bytes": max_message_bytes,
        "max_memory_bytes": max_memory_bytes,
        "backing": backing,
        "allow_uids": list(allow_uids),
        "trust_uids": list(trust_uids),
        "wait": wait,
        "spin_budget": spin_budget,
        "codec": codec,
        "interceptors": list(interceptors),
        "retries": retries,
    }
    if connections is None:
        return Client(address, **options)
    clients: list[Client] = []
    try:
        while len(clients) < check_connections(connections):
            clients.append(Client(address, **options))
    except BaseException:
        for client in clients:
            client.close()
        raise
    # Or the first worker of a server would get the first connection of every client.
    random.shuffle(clients)
    return Pool(clients, address)
