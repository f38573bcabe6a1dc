"""What takes part in a comparison: the protocols to implement, and where each contender lives.

To add one: write a module with an object that is a `Contender` or an `AsyncContender`, whose server
passes every payload through `work.answer`, and `register` it.
"""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .measure import Flow

__all__ = [
    "AsyncConnection",
    "AsyncContender",
    "Connection",
    "Contender",
    "FlowConnection",
    "OwnServer",
    "PipelinedConnection",
    "Service",
    "UnsupportedError",
    "home_of",
    "load",
    "names",
    "register",
    "remove_files",
    "why_absent",
]

_HOMES = {
    "shm": "shmrpc.bench.rpc:SHM",
    "unix": "shmrpc.bench.rpc:UNIX",
    "tcp": "shmrpc.bench.rpc:TCP",
    "shm-aio": "shmrpc.bench.rpc_aio:SHM",
    "unix-aio": "shmrpc.bench.rpc_aio:UNIX",
    "shm-uvloop": "shmrpc.bench.rpc_aio:SHM_UVLOOP",
    "raw-uds": "shmrpc.bench.sockets:RAW_UDS",
    "raw-tcp": "shmrpc.bench.sockets:RAW_TCP",
    "asyncio": "shmrpc.bench.loops:ASYNCIO",
    "uvloop": "shmrpc.bench.loops:UVLOOP",
    "mp-pipe": "shmrpc.bench.multiproc:PIPE",
    "mp-queue": "shmrpc.bench.multiproc:QUEUE",
    "pyzmq": "shmrpc.bench.zeromq:SYNC",
    "pyzmq-aio": "shmrpc.bench.zeromq:AIO",
    "grpcio": "shmrpc.bench.grpc_unix:SYNC",
    "grpcio-aio": "shmrpc.bench.grpc_unix:AIO",
    "iceoryx2-poll": "shmrpc.bench.iceoryx:POLLING",
    "iceoryx2-event": "shmrpc.bench.iceoryx:EVENTS",
    "pynng": "shmrpc.bench.nng:NNG",
    "thriftpy2": "shmrpc.bench.thrift:THRIFT",
    "rpyc": "shmrpc.bench.rpyc_unix:RPYC",
}


class UnsupportedError(Exception):
    """A contender has no such thing: it is left out of the comparison, and nothing went wrong."""


class Service(Protocol):
    """The answering side, in a process of its own; made by `start`, already listening."""

    @property
    def address(self) -> str:
        """Where clients connect."""

    def serve(self) -> None:
        """Answer clients until SIGTERM ends it by `SystemExit`.

        Between clients it uses no CPU time: others are measured then.
        """

    def close(self) -> None:
        """Give everything back."""


class Connection(Protocol):
    """The calling side, in another process; made anew for every run."""

    @property
    def echo(self) -> Callable[[bytes], bytes]:
        """Send the value, wait for its copy and return it; both sides encode and decode it."""

    def close(self) -> None:
        """Hang up."""


@runtime_checkable
class PipelinedConnection(Connection, Protocol):
    """One with several calls under way in one thread; they are finished in the order they begin."""

    def begin(self, payload: bytes) -> Any:
        """Start a call, without waiting for its reply."""

    def finish(self, token: Any) -> bytes:
        """Wait for the reply of the call that `begin` gave this for."""


@runtime_checkable
class FlowConnection(Connection, Protocol):
    """One that can also move items in one direction; flows.py has the names."""

    def flow(self, direction: str, name: str) -> Flow:
        """Give what moves items that way."""


@runtime_checkable
class OwnServer(Protocol):
    """A connection whose server is another process than the one that the harness started."""

    server_pid: int

    def answered(self) -> int:
        """Say how many calls that process has answered."""


@runtime_checkable
class Contender(Protocol):
    """One way for two processes to call each other."""

    @property
    def thread_safe(self) -> bool:
        """Whether threads may share one connection; those who may not get a lock around it."""

    def start(self, directory: str, clients: int) -> Service:
        """Listen, in the server's process, for so many clients at a time.

        Files go into `directory`, and shared memory is named after it and "_": the harness removes
        both, also when the server is killed.
        """

    def connect(self, address: str) -> Connection:
        """Connect, in the client's process."""


class AsyncConnection(Protocol):
    """As `Connection`, awaitable; any number of tasks may call at a time."""

    async def echo(self, payload: bytes) -> bytes:
        """Send the value, wait for its copy and return it."""

    async def close(self) -> None:
        """Hang up."""


@runtime_checkable
class AsyncContender(Protocol):
    """One whose calls are awaited. Its server runs a loop of the same kind."""

    def start(self, directory: str, clients: int) -> Service:
        """Listen, in the server's process."""

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Make the loop that the client's side runs on."""

    async def connect_async(self, address: str) -> AsyncConnection:
        """Connect, in the client's process and loop."""


def register(name: str, home: str) -> None:
    """Add a contender: `home` is "module:object", importable wherever this process imports from."""
    _HOMES[name] = home


def home_of(name: str) -> str:
    """Give where a contender lives; raises KeyError for a name that nobody registered."""
    return _HOMES[name]


def names() -> list[str]:
    """Give the names of all contenders, also of those that can't take part here."""
    return list(_HOMES)


def load(home: str) -> Contender | AsyncContender:
    """Import a contender; raises ImportError where something that it needs is not installed."""
    module, _, attribute = home.partition(":")
    contender: Contender | AsyncContender = getattr(import_module(module), attribute)
    return contender


def remove_files(directory: str) -> None:
    """Remove a server's directory, and what a contender named after it in shared memory."""
    shutil.rmtree(directory, ignore_errors=True)
    for path in Path("/dev/shm").glob(f"{Path(directory).name}_*"):
        path.unlink(missing_ok=True)


def why_absent(name: str) -> str | None:
    """Say why a contender can't take part on this machine, or None if it can."""
    try:
        load(_HOMES[name])
    except (ImportError, OSError) as error:  # a native library that does not load is an OSError
        return str(error)
    return None
