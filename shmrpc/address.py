"""Addresses: what ``"calc"``, ``"shm:///run/x.sock"``, ``"unix://..."``, ``"tcp://..."`` mean.

Pure: nothing here opens or creates anything.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from .errors import ConnectError

__all__ = ["Address", "parse", "rendezvous_directory"]

Transport = Literal["shm", "unix", "tcp"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")
_SOCKET_PATH_MAX = 107  # sun_path less its final zero


@dataclass(frozen=True)
class Address:
    """One place to listen at or connect to.

    ``path`` is the rendezvous socket of ``shm`` and ``unix``; ``host`` and ``port`` belong to
    ``tcp``. ``name`` is set for services that are found by name in the rendezvous directory.
    """

    transport: Transport
    path: str = ""
    host: str = ""
    port: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.transport == "tcp":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"tcp://{host}:{self.port}"
        if self.name:
            return f"shm://{self.name}"
        return f"{self.transport}://{self.path}"


def rendezvous_directory() -> str:
    """Where the sockets of named services lie: $SHMRPC_DIR, $XDG_RUNTIME_DIR/shmrpc or /tmp."""
    explicit = os.environ.get("SHMRPC_DIR")
    if explicit:
        return os.path.abspath(explicit)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return os.path.join(runtime, "shmrpc")
    return f"/tmp/shmrpc-{os.getuid()}"  # noqa: S108 - checked for owner and mode before use


def _parse_tcp(text: str, rest: str) -> Address:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/]+)):(\d{1,5})", rest)
    if match is None or int(match[3]) > 65535:
        msg = f"address {text!r}: expected tcp://HOST:PORT with a port from 0 to 65535"
        raise ConnectError(msg)
    return Address("tcp", host=match[1] or match[2], port=int(match[3]))


def parse(text: object) -> Address:
    """Understand an address; ``ConnectError`` says what is wrong with one that is none."""
    if not isinstance(text, str) or not text or not text.isprintable():
        msg = f"address {text!r}: expected a name such as 'calc', shm://, unix:// or tcp://"
        raise ConnectError(msg)
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "shm", text
    if scheme == "tcp":
        return _parse_tcp(text, rest)
    if scheme not in ("shm", "unix"):
        msg = f"address {text!r}: unknown scheme {scheme!r}; use shm, unix or tcp"
        raise ConnectError(msg)
    name = ""
    path = rest
    if not rest.startswith("/"):
        if scheme == "unix" or not _NAME.fullmatch(rest):
            msg = (
                f"address {text!r}: expected an absolute path"
                if scheme == "unix"
                else f"address {text!r}: a name has up to 64 letters, digits and _.@+-"
            )
            raise ConnectError(msg)
        name = rest
        path = os.path.join(rendezvous_directory(), f"{rest}.sock")
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        msg = f"address {text!r}: socket path {path!r} is longer than {_SOCKET_PATH_MAX} bytes"
        raise ConnectError(msg)
    return Address("shm" if scheme == "shm" else "unix", path=path, name=name)
