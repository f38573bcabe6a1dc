"""What takes part in a comparison: the protocols to implement, and where each contender lives.

To add one: write a module with an object that is a `Contender`, and name it in `_HOMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Flow

_HOMES = {
    "floor": "benchmarks.floor:FLOOR",
    "shm": "benchmarks.rpc:SHM",
    "unix": "benchmarks.rpc:UNIX",
    "tcp": "benchmarks.rpc:TCP",
    "raw-uds": "benchmarks.baselines:RAW_UDS",
    "raw-tcp": "benchmarks.baselines:RAW_TCP",
    "mp-pipe": "benchmarks.baselines:MP_PIPE",
    "sidecar": "benchmarks.middlemen:SIDECAR",
    "uds-proxy": "benchmarks.middlemen:UDS_PROXY",
    "shm 1 MB": "benchmarks.middlemen:SHM_LARGE",
    "sidecar 1 MB": "benchmarks.middlemen:SIDECAR_LARGE",
}


class Service(Protocol):
    """The answering side, in a process of its own; made by `Contender.start`, already listening."""

    @property
    def address(self) -> str:
        """Where clients connect."""

    def serve(self) -> None:
        """Answer each client until it leaves, then the next; SIGTERM ends it by `SystemExit`."""

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
class FlowConnection(Connection, Protocol):
    """One that can also move items in one direction; flows.py has the names."""

    def flow(self, direction: str, name: str) -> Flow:
        """Give what moves items that way."""


class Contender(Protocol):
    """One way for two processes to call each other."""

    @property
    def thread_safe(self) -> bool:
        """Whether threads may share one connection; those who may not get a lock around it."""

    def start(self, directory: str) -> Service:
        """Listen, in the server's process; files go into `directory`, which the harness removes."""

    def connect(self, address: str) -> Connection:
        """Connect, in the client's process."""


def load(name: str) -> Contender:
    """Import a contender; raises ImportError where something that it needs is not installed."""
    module, _, attribute = _HOMES[name].partition(":")
    return cast("Contender", getattr(import_module(module), attribute))


def why_absent(name: str) -> str | None:
    """Say why a contender can't take part on this machine, or None if it can."""
    try:
        load(name)
    except ImportError as error:
        return str(error)
    return None
