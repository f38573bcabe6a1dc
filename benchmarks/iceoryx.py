"""iceoryx2's request-response: arrays are copied into shared memory once, and read where they lie.

Waiting on its events costs as much as a socket does, so both sides look for what they wait for, and
yield their CPU in between. A Unix socket says when a client comes and goes: the server looks only
while there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import socket
from typing import TYPE_CHECKING, Any

import iceoryx2
import numpy as np

from benchmarks.arrays import Source

if TYPE_CHECKING:
    from benchmarks.arrays import Flow, Work

_Bytes = iceoryx2.Slice[ctypes.c_uint8]
_FIRST_BYTES = 1 << 16  # memory grows from there
_LOOKS_BETWEEN = 1024  # looks for a request between two at whether the client is there


def _service(directory: str) -> tuple[Any, Any]:
    """Join the service whose files, and names of shared memory, come from this directory."""
    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    config = iceoryx2.config.default()
    config.global_cfg.root_path = iceoryx2.Path.new(f"{directory}/iceoryx2")
    config.global_cfg.prefix = iceoryx2.FileName.new(_prefix(directory))
    builder = iceoryx2.NodeBuilder.new().config(config)
    builder = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
    node = builder.create(iceoryx2.ServiceType.Ipc)
    factory = node.service_builder(iceoryx2.ServiceName.new("arrays"))
    return node, factory.request_response(_Bytes, _Bytes).open_or_create()


def _prefix(directory: str) -> str:
    return f"{os.path.basename(directory)}_"


def _memory(payload: Any) -> Any:
    return np.frombuffer(payload.as_memory_view(), np.int64)


def _fill(uninitialised: Any, array: Any) -> Any:
    ctypes.memmove(uninitialised.payload_ptr, array.ctypes.data, array.nbytes)
    return uninitialised.assume_init()


class _Service:
    def __init__(self, directory: str) -> None:
        self.address = directory
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{directory}/presence")
        self._listener.listen()
        self._node, self._factory = _service(directory)
        builder = self._factory.server_builder().initial_max_slice_len(_FIRST_BYTES)
        self._server = builder.allocation_strategy(iceoryx2.AllocationStrategy.PowerOfTwo).create()

    def serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._answer(client)
            client.close()

    def _answer(self, client: socket.socket) -> None:
        looks = 0
        while True:
            request = self._server.receive()
            if request is None:
                os.sched_yield()
                looks += 1
                if looks % _LOOKS_BETWEEN == 0:
                    with contextlib.suppress(BlockingIOError):
                        client.recv(1)
                        return
                continue
            array = _memory(request.payload())
            array.sum()
            _fill(request.loan_slice_uninit(array.nbytes), array).send()
            del array
            request.delete()

    def close(self) -> None:
        self._listener.close()
        self._server.delete()
        del self._factory, self._node
        for name in glob.glob(f"/dev/shm/{_prefix(self.address)}*"):  # it leaves one of its own
            os.unlink(name)


class _Connection:
    def __init__(self, directory: str) -> None:
        self._node, self._factory = _service(directory)
        builder = self._factory.client_builder().initial_max_slice_len(_FIRST_BYTES)
        self._client = builder.allocation_strategy(iceoryx2.AllocationStrategy.PowerOfTwo).create()
        self._presence = socket.socket(socket.AF_UNIX)
        self._presence.connect(f"{directory}/presence")

    def work(self, name: str, nbytes: int) -> Work:
        if name != "echo":
            msg = f"what iceoryx2 does here is to echo, not to {name}"
            raise ValueError(msg)
        source = Source(np.zeros(nbytes // 8, np.int64))
        client = self._client

        def echo() -> None:
            request = client.loan_slice_uninit(nbytes)
            pending = _fill(request, source.write()).send()
            response = pending.receive()
            while response is None:
                os.sched_yield()
                response = pending.receive()
            source.compare(_memory(response.payload()))
            response.delete()
            pending.delete()

        return echo

    def flow(self, direction: str) -> Flow:
        msg = f"iceoryx2 is measured by requests and responses, not by streams {direction}"
        raise ValueError(msg)

    def close(self) -> None:
        self._presence.close()
        self._client.delete()


class _Iceoryx:
    def start(self, directory: str) -> _Service:
        return _Service(directory)

    def connect(self, address: str) -> _Connection:
        return _Connection(address)


ICEORYX2 = _Iceoryx()
