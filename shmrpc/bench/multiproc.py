"""`multiprocessing`: a Pipe with msgpack on both sides, and a pair of Queues, which pickle."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .codec import pack, unpack
from .contenders import UnsupportedError
from .lifetime import end_with_parent
from .work import answer, answered

if TYPE_CHECKING:
    from collections.abc import Callable

_FAREWELL_S = 3.0


def _one_client(clients: int) -> None:
    if clients > 1:
        raise UnsupportedError("it is between two processes")


@dataclass(frozen=True)
class _PipeService:
    """Answers one connection at a time."""

    listener: Listener
    address: str

    def serve(self) -> None:
        while True:
            connection = self.listener.accept()
            try:
                while True:
                    connection.send_bytes(pack(answer(unpack(connection.recv_bytes()))))
            except (EOFError, ConnectionError):
                connection.close()

    def close(self) -> None:
        self.listener.close()


class _PipeConnection:
    """One call at a time: a pipe blocks where both sides write, so no calls are pipelined."""

    def __init__(self, connection: Any) -> None:
        self._send: Callable[[bytes], None] = connection.send_bytes
        self._receive: Callable[[], bytes] = connection.recv_bytes
        self.close: Callable[[], None] = connection.close

    def echo(self, payload: bytes) -> bytes:
        self._send(pack(payload))
        reply: bytes = unpack(self._receive())
        return reply


@dataclass(frozen=True)
class _Pipe:
    """`multiprocessing.Pipe`, through Listener and Client because neither side forks the other."""

    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _PipeService:
        _one_client(clients)
        listener = Listener(str(Path(directory, "socket")), "AF_UNIX")
        return _PipeService(listener, str(listener.address))

    def connect(self, address: str) -> _PipeConnection:
        return _PipeConnection(Client(address, "AF_UNIX"))


def _answer_queue(parent: int, cpus: list[int], requests: Any, replies: Any) -> None:
    """Be the server's process: answer until None comes; "answered" asks how many there were."""
    end_with_parent(parent)
    os.sched_setaffinity(0, cpus)
    while (request := requests.get()) is not None:
        replies.put(answered() if request == "answered" else answer(request))


class _QueueService:
    """Only says which CPUs the server may use: a Queue is inherited, so the client starts it."""

    def __init__(self) -> None:
        self.address = ",".join(map(str, sorted(os.sched_getaffinity(0))))

    def serve(self) -> None:
        while True:
            signal.pause()

    def close(self) -> None:
        """Nothing is held."""


class _QueueConnection:
    def __init__(self, cpus: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, self._replies = context.Queue(), context.Queue()
        queues = (self._requests, self._replies)
        arguments = (os.getpid(), cpus, *queues)
        self._server = context.Process(target=_answer_queue, args=arguments, daemon=True)
        self._server.start()
        self.server_pid = self._server.pid or 0
        self.begin = self._requests.put

    def echo(self, payload: bytes) -> bytes:
        self._requests.put(payload)
        reply: bytes = self._replies.get()
        return reply

    def finish(self, token: None) -> bytes:
        _ = token
        reply: bytes = self._replies.get()
        return reply

    def answered(self) -> int:
        self._requests.put("answered")
        count: int = self._replies.get()
        return count

    def close(self) -> None:
        self._requests.put(None)
        self._server.join(_FAREWELL_S)
        if self._server.is_alive():
            self._server.kill()
            self._server.join()
        for queue in (self._requests, self._replies):
            queue.close()
            queue.join_thread()


@dataclass(frozen=True)
class _Queue:
    thread_safe: bool = False

    def start(self, directory: str, clients: int) -> _QueueService:
        _ = directory
        _one_client(clients)
        return _QueueService()

    def connect(self, address: str) -> _QueueConnection:
        return _QueueConnection([int(cpu) for cpu in address.split(",")])


PIPE = _Pipe()
QUEUE = _Queue()
