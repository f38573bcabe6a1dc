"""Contenders with a process between client and server: shmrpc's sidecar, and a plain proxy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shmrpc.bench.rpc import SHM
from shmrpc.bench.sockets import RAW_UDS
from shmrpc.bench.work import pattern

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.bench.contenders import Connection, Contender, Service

_ROOT = Path(__file__).resolve().parent.parent
_LARGE = pattern(1_000_000)


@dataclass(frozen=True)
class _Behind:
    """A service, and the process that stands before it."""

    address: str
    service: Service
    process: subprocess.Popen[bytes]

    def serve(self) -> None:
        self.service.serve()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.service.close()


@dataclass(frozen=True)
class _Between:
    """`command` starts the middleman between two addresses; it says a line when it is ready."""

    server: Contender
    command: Callable[[str, str], list[str]]
    template: str
    thread_safe: bool

    def start(self, directory: str, clients: int) -> _Behind:
        service = self.server.start(directory, clients)
        address = self.template.format(directory=directory)
        command = [sys.executable, "-m", *self.command(address, service.address)]
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if process.stdout is None or not process.stdout.readline():
            service.close()
            raise ConnectionError
        return _Behind(address, service, process)

    def connect(self, address: str) -> Connection:
        return self.server.connect(address)


class _LargeConnection:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.echo: Callable[[bytes], bytes] = partial(_echo_large, connection.echo)

    def close(self) -> None:
        self._connection.close()


def _echo_large(echo: Callable[[bytes], bytes], payload: bytes) -> bytes:
    """A call of 1 MB each way in the place of one with this payload."""
    return payload if echo(_LARGE) == _LARGE else b""


@dataclass(frozen=True)
class _Large:
    """Another contender with calls of 1 MB."""

    contender: Contender
    thread_safe: bool = True

    def start(self, directory: str, clients: int) -> Service:
        return self.contender.start(directory, clients)

    def connect(self, address: str) -> Connection:
        return _LargeConnection(self.contender.connect(address))


def _sidecar(listen: str, upstream: str) -> list[str]:
    return ["shmrpc.cli", "sidecar", "--listen", listen, "--upstream", upstream]


def _proxy(listen: str, upstream: str) -> list[str]:
    return ["benchmarks.uds_proxy", listen, upstream]


SIDECAR = _Between(SHM, _sidecar, "shm://{directory}/front", thread_safe=True)
UDS_PROXY = _Between(RAW_UDS, _proxy, "{directory}/front", thread_safe=False)
SHM_LARGE = _Large(SHM)
SIDECAR_LARGE = _Large(SIDECAR)
