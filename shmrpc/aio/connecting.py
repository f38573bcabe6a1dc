"""``aio.connect``: a client, or several as one."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from shmrpc.codec import Codec, MsgpackCodec
from shmrpc.lending import MEMORY_BYTES
from shmrpc.link import check_waiting, terms_of
from shmrpc.poller import Wait, check_timeout
from shmrpc.pool import check_connections

from .client import Client
from .pool import Pool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable
    from types import TracebackType

    from shmrpc.interceptors import AsyncInterceptor
    from shmrpc.segments import Backing

__all__ = ["Connecting", "connect"]

C = TypeVar("C", bound="Client | Pool")


class Connecting(Generic[C]):
    """What ``connect`` returns: await it, or use it as an asynchronous context manager."""

    def __init__(self, make: Callable[[], Awaitable[C]]) -> None:
        self._make = make
        self._client: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._make().__await__()

    async def __aenter__(self) -> C:
        self._client = await self._make()
        return self._client

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._client is not None:
            await self._client.close()


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
    interceptors: Iterable[AsyncInterceptor] = (),
    retries: int = 0,
    connections: None = None,
) -> Connecting[Client]: ...
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
    interceptors: Iterable[AsyncInterceptor] = (),
    retries: int = 0,
    connections: int,
) -> Connecting[Pool]: ...
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
    interceptors: Iterable[AsyncInterceptor] = (),
    retries: int = 0,
    connections: int | None = None,
) -> Connecting[Client] | Connecting[Pool]:
    """Connect to a server, when the result is awaited or entered by ``async with``.

    Parameters and errors are those of ``shmrpc.connect``; interceptors are asynchronous ones.
    """
    check_timeout(timeout)
    terms = terms_of(
        [address] if fallback is None else [address, fallback],
        max_message_bytes=max_message_bytes,
        max_memory_bytes=max_memory_bytes,
        backing=backing,
        allow_uids=allow_uids,
        trust_uids=trust_uids,
    )
    check_waiting(wait, spin_budget)
    around = list(interceptors)

    async def make() -> Client:
        client = Client(
            terms,
            codec if codec is not None else MsgpackCodec(),
            timeout,
            wait=wait,
            spin_budget=spin_budget,
            interceptors=around,
            retries=retries,
        )
        try:
            await client.connect_first()
        except BaseException:
            await client.close()
            raise
        return client

    if connections is None:
        return Connecting(make)
    count = check_connections(connections)

    async def make_all() -> Pool:
        made = await asyncio.gather(*[make() for _ in range(count)], return_exceptions=True)
        clients = [client for client in made if isinstance(client, Client)]
        for failure in made:
            if isinstance(failure, BaseException):
                await asyncio.gather(*[client.close() for client in clients])
                raise failure
        # Or the first worker of a server would get the first connection of every client.
        random.shuffle(clients)
        return Pool(clients, address)

    return Connecting(make_all)
