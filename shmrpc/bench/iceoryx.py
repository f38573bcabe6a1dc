"""iceoryx2's request-response in Python: busy-polling, and sleeping on its events.

Payloads are msgpack, copied into and out of its shared memory as a Python program has to. A Unix
socket carries nothing but the clients' comings: between them the server does not poll.
"""

from __future__ import annotations

import ctypes
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import iceoryx2 as iox2

from .codec import pack, unpack
from .contenders import UnsupportedError
from .work import answer

if TYPE_CHECKING:
    from collections.abc import Callable

_Bytes = iox2.Slice[ctypes.c_uint8]
_INITIAL_BYTES = 4096  # it grows by itself
_GOODBYE = b"\0"  # shorter than any payload of ours
_AT_A_TIME = 64

iox2.set_log_level(iox2.LogLevel.Error)


def _new_node(directory: str) -> Any:
    """Make a node whose files lie in the harness's directory; its memory is named after that."""
    config = iox2.config.default()
    config.global_cfg.root_path = iox2.Path.new(f"{directory}/iox2")
    config.global_cfg.prefix = iox2.FileName.new(f"{Path(directory).name}_")
    builder = iox2.NodeBuilder.new().config(config)
    builder = builder.signal_handling_mode(iox2.SignalHandlingMode.Disabled)
    return builder.create(iox2.ServiceType.Ipc)


def _service(node: Any) -> Any:
    builder = node.service_builder(iox2.ServiceName.new("echo")).request_response(_Bytes, _Bytes)
    builder = builder.max_active_requests_per_client(_AT_A_TIME).max_response_buffer_size(1)
    builder = builder.max_borrowed_responses_per_pending_response(1).max_loaned_requests(1)
    # Its memory is written when it is made: with the default of 8 clients that takes a second.
    return builder.max_clients(1).max_servers(1).max_nodes(2).open_or_create()


def _event(node: Any, name: str) -> Any:
    return node.service_builder(iox2.ServiceName.new(name)).event().open_or_create()


def _read(payload: Any) -> bytes:
    return ctypes.string_at(payload.as_ptr(), payload.len())


def _write(uninit: Any, message: bytes) -> Any:
    ctypes.memmove(uninit.payload().as_ptr(), message, len(message))
    return uninit.assume_init()


class _Service:
    def __init__(self, directory: str, *, events: bool) -> None:
        self.address = directory
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{directory}/socket")
        self._listener.listen()
        self._node = _new_node(directory)
        self._service = _service(self._node)
        builder = self._service.server_builder().initial_max_slice_len(_INITIAL_BYTES)
        builder = builder.allocation_strategy(iox2.AllocationStrategy.PowerOfTwo)
        self._server = builder.create()
        self._wait: Callable[[], object] = int
        self._notify: Callable[[], object] = int
        if events:
            self._wait = _event(self._node, "called").listener_builder().create().blocking_wait
            self._notify = _event(self._node, "answered").notifier_builder().create().notify

    def serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                client.send(b"x")
                self._echo()

    def _echo(self) -> None:
        receive, wait, notify = self._server.receive, self._wait, self._notify
        while True:
            request = receive()
            if request is None:
                wait()
                continue
            message = _read(request.payload())
            if message == _GOODBYE:
                request.delete()
                return
            reply = pack(answer(unpack(message)))
            _write(request.loan_slice_uninit(len(reply)), reply).send()
            request.delete()
            notify()

    def close(self) -> None:
        self._listener.close()
        self._server.delete()


class _Connection:
    def __init__(self, directory: str, *, events: bool) -> None:
        self._node = _new_node(directory)
        self._service = _service(self._node)
        builder = self._service.client_builder().initial_max_slice_len(_INITIAL_BYTES)
        builder = builder.allocation_strategy(iox2.AllocationStrategy.PowerOfTwo)
        self._client = builder.create()
        self._wait: Callable[[], object] = int
        self._notify: Callable[[], object] = int
        if events:
            self._wait = _event(self._node, "answered").listener_builder().create().blocking_wait
            self._notify = _event(self._node, "called").notifier_builder().create().notify
        self._presence = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._presence.connect(f"{directory}/socket")
        self._presence.recv(1)

    def begin(self, payload: bytes) -> Any:
        message = pack(payload)
        pending = _write(self._client.loan_slice_uninit(len(message)), message).send()
        self._notify()
        return pending

    def finish(self, token: Any) -> bytes:
        receive, wait = token.receive, self._wait
        while (response := receive()) is None:
            wait()
        reply: bytes = unpack(_read(response.payload()))
        response.delete()
        token.delete()
        return reply

    def echo(self, payload: bytes) -> bytes:
        return self.finish(self.begin(payload))

    def close(self) -> None:
        _write(self._client.loan_slice_uninit(len(_GOODBYE)), _GOODBYE).send().delete()
        self._notify()
        self._presence.recv(1)  # the server has left its loop
        self._presence.close()
        self._client.delete()


@dataclass(frozen=True)
class _Iceoryx:
    events: bool
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _Service:
        if clients > 1:
            raise UnsupportedError("this harness runs it with one client")
        return _Service(directory, events=self.events)

    def connect(self, address: str) -> _Connection:
        return _Connection(address, events=self.events)


POLLING = _Iceoryx(events=False)
EVENTS = _Iceoryx(events=True)
