"""The floor: two bare rings and msgpack on both sides, and nothing of an RPC.

No call ids, methods, deadlines, threads, sleeping, errors or peers that may die: what any RPC over
these rings pays at least. The client hands its memory over by path; each run makes it anew.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from shmrpc._native import ffi, lib
from shmrpc.bench.codec import pack, unpack
from shmrpc.bench.contenders import UnsupportedError
from shmrpc.bench.work import answer

_RING_BYTES = 65536
_BUFFER_BYTES = 16384


class _Side:
    """One end of the two rings in a mapped file."""

    def __init__(self, path: str, side: int) -> None:
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), lib.shmrpc_bare_bytes(_RING_BYTES))
        self._keep = ffi.from_buffer(self._memory)
        self.bare = lib.shmrpc_bare_new(self._keep, _RING_BYTES, side)
        self.buffer = ffi.new("uint8_t[]", _BUFFER_BYTES)
        self.view = memoryview(ffi.buffer(self.buffer))

    def close(self) -> None:
        lib.shmrpc_bare_free(self.bare)
        self.view.release()


class _Service:
    """Echoes until an empty message, which is how a client says that it leaves."""

    def __init__(self, directory: str) -> None:
        self.address = str(Path(directory, "socket"))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address)
        self._listener.listen()

    def serve(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock:
                side = _Side(sock.recv(4096).decode(), 1)
                sock.send(b"x")
                self._echo(side.bare, side.buffer, side.view)
                side.close()

    def _echo(self, bare: Any, buffer: Any, view: memoryview) -> None:
        send, receive = lib.shmrpc_bare_send, lib.shmrpc_bare_receive
        while count := receive(bare, buffer, _BUFFER_BYTES):
            body = pack(answer(unpack(view[:count])))
            send(bare, body, len(body))

    def close(self) -> None:
        self._listener.close()


class _Connection:
    def __init__(self, address: str) -> None:
        descriptor, self._path = tempfile.mkstemp(dir="/dev/shm", prefix="rpc-bench-")
        os.ftruncate(descriptor, lib.shmrpc_bare_bytes(_RING_BYTES))
        os.close(descriptor)
        self._side = _Side(self._path, 0)
        self._bare, self._buffer, self._view = self._side.bare, self._side.buffer, self._side.view
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(address)
                sock.send(self._path.encode())
                sock.recv(1)
        finally:
            Path(self._path).unlink()

    def echo(self, payload: bytes) -> bytes:
        body = pack(payload)
        lib.shmrpc_bare_send(self._bare, body, len(body))
        count = lib.shmrpc_bare_receive(self._bare, self._buffer, _BUFFER_BYTES)
        reply: bytes = unpack(self._view[:count])
        return reply

    def close(self) -> None:
        lib.shmrpc_bare_send(self._bare, b"", 0)
        self._side.close()


class _Floor:
    thread_safe = False

    def start(self, directory: str, clients: int) -> _Service:
        if clients > 1:
            raise UnsupportedError("it is between two processes")
        return _Service(directory)

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


FLOOR = _Floor()
