"""One client connection as the core sees it: a poller with one conn, and the slots of threads.

A ``Link`` lives as long as its connection; after a loss the client makes a new one. Its C memory
is freed with the last slot, so a thread that still waits in C keeps what it waits on.
"""

from __future__ import annotations

import errno
import os
import select
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

from . import handshake, rendezvous
from ._native import ffi, lib
from .errors import ConnectError, ConnectionLost, ProtocolError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .address import Address
    from .codec import Codec

__all__ = [
    "FOREVER",
    "Link",
    "Slot",
    "Wait",
    "check_options",
    "check_timeout",
    "forget_descriptors",
    "make_name",
    "nanoseconds_until",
    "new_poller",
]

Wait = Literal["auto", "spin", "block"]
WAIT_MODES: dict[str, int] = {"auto": 0, "spin": 1, "block": 2}
OUTCOMES = ("unknown", "not_sent", "not_started")


def check_options(
    max_message_bytes: int, backing: str, wait: str, spin_budget: float | None
) -> None:
    """Refuse options that make no sense, with a ``ValueError`` that names what is allowed."""
    if not 1024 <= max_message_bytes <= handshake.MESSAGE_BYTES_MAX:
        most = handshake.MESSAGE_BYTES_MAX
        msg = f"max_message_bytes must be from 1024 to {most}, not {max_message_bytes}"
        raise ValueError(msg)
    if backing not in ("auto", "shm", "memfd"):
        msg = f"backing must be 'auto', 'shm' or 'memfd', not {backing!r}"
        raise ValueError(msg)
    if wait not in WAIT_MODES:
        msg = f"wait must be 'auto', 'spin' or 'block', not {wait!r}"
        raise ValueError(msg)
    if spin_budget is not None and not 0 < spin_budget <= 1:
        msg = f"spin_budget must be between 0 and 1 second, not {spin_budget!r}"
        raise ValueError(msg)


def check_timeout(timeout: Any) -> float:
    """Refuse a timeout that is no number of seconds from 0 on."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        msg = f"timeout must be seconds from 0 on, not {timeout!r}"
        raise ValueError(msg)
    return timeout


def nanoseconds_until(deadline: float) -> int:
    """What is left until a ``time.monotonic()`` deadline; -1 if that is ``FOREVER``."""
    if deadline > _SECONDS_MAX:
        return -1
    return max(0, int((deadline - time.monotonic()) * 1e9))


FOREVER = float("inf")
_SECONDS_MAX = 9e9  # the core counts nanoseconds in 64 bits


def make_name(method: str) -> Any:
    """A method's name as the core wants it; ``ValueError`` if it is empty or too long."""
    text = method.encode()
    if not 0 < len(text) <= lib.SHMRPC_METHOD_MAX:
        msg = f"method name {method!r}: 1 to {lib.SHMRPC_METHOD_MAX} bytes of UTF-8 are allowed"
        raise ValueError(msg)
    return ffi.new("shmrpc_name *", {"bytes": len(text), "text": text})


def describe_peer(address: Address, pid: int) -> str:
    """The peer as errors name it."""
    return f"{address} (pid {pid})" if pid >= 0 else str(address)


def new_poller(workers: int, max_concurrency: int, wait: Wait, spin_budget: float | None) -> Any:
    """A poller that frees itself; ``ConnectError`` when the process has no descriptors left."""
    budget_ns = int(spin_budget * 1e9) if spin_budget is not None else 0
    poller = lib.shmrpc_poller_new(workers, max_concurrency, WAIT_MODES[wait], budget_ns)
    if poller == ffi.NULL:
        msg = f"can't wait for connections: {os.strerror(ffi.errno)} (ulimit -n)"
        raise ConnectError(msg)
    return ffi.gc(poller, lib.shmrpc_poller_free)


def forget_descriptors(poller: Any) -> None:
    """In a forked child: give up the parent's poller.

    Its descriptors are closed, so that the parent's death can still be noticed by its peers; its
    memory stays as it is, because its locks may be held by threads that the child does not have.
    """
    ffi.gc(poller, None)
    count = 1 << 18
    fds = ffi.new("int[]", count)
    for fd in fds[0 : lib.shmrpc_poller_fds(poller, fds, count)]:
        os.close(fd)


def _run(steps: handshake.Steps, sock: socket.socket, deadline: float) -> handshake.Agreement:
    """Drive a handshake to its end, or to the deadline."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        while True:
            next(steps)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                msg = "the server took the connection and did not answer in time"
                raise ConnectError(msg)
    except StopIteration as stop:
        agreement: handshake.Agreement = stop.value
        return agreement
    finally:
        steps.close()


class Slot:
    """What one thread uses for one call at a time: a C slot, its view and a packer."""

    __slots__ = ("__weakref__", "c", "link", "message", "pack", "view")

    def __init__(self, link: Link, codec: Codec) -> None:
        slot = lib.shmrpc_slot_new(link.poller, link.conn_id)
        if slot == ffi.NULL:
            msg = "no memory for another waiting thread"
            raise ConnectError(msg)
        self.c = ffi.gc(slot, lib.shmrpc_slot_free)
        self.link = link
        link.all_slots.add(self)
        self.message = lib.shmrpc_slot_message(slot)
        size = lib.shmrpc_slot_view_bytes(slot)
        self.view = memoryview(ffi.buffer(lib.shmrpc_slot_view(slot), size))
        self.pack: Callable[[Any], bytes] = codec.encoder()

    def body(self) -> memoryview:
        """The body of the message just received, wherever it lies."""
        return memoryview(ffi.buffer(self.message.body, self.message.body_bytes))

    def head(self) -> tuple[bytes, bytes]:
        """Copies of the method name and the metadata of the message just received."""
        message = self.message
        size = message.method_bytes + message.metadata_bytes
        if not size:
            return b"", b""
        head = bytes(ffi.buffer(message.head, size))
        return head[: message.method_bytes], head[message.method_bytes :]


class _Retired(list[Slot]):
    """The free slots of a link that nobody is to use any more: none, whoever gives one back."""

    def append(self, slot: Slot) -> None:
        """Keep nothing."""


_links: weakref.WeakSet[Link] = weakref.WeakSet()


class Link:
    """A live connection to a server."""

    def __init__(
        self,
        terms: handshake.Terms,
        timeout: float,
        *,
        wait: Wait = "auto",
        spin_budget: float | None = None,
    ) -> None:
        """Connect within ``timeout`` seconds; raises ``ConnectError``."""
        deadline = time.monotonic() + timeout
        sock = rendezvous.open_socket(terms.address, timeout)
        try:
            agreement = _run(handshake.client_side(sock, terms), sock, deadline)
        except ConnectError as error:
            sock.close()
            msg = f"can't connect to {terms.address}: {error}"
            raise ConnectError(msg) from error
        self.address = terms.address
        self.credentials = agreement.credentials
        self.peer_pid = agreement.peer_pid
        self.trusted = agreement.trusted
        self.max_request_bytes = agreement.peer_max_message_bytes
        try:
            self.poller = new_poller(0, 0, wait, spin_budget)
            self.conn_id = agreement.add(self.poller)
        except BaseException:
            agreement.close()
            raise
        self.slots: list[Slot] = []
        self.all_slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        _links.add(self)

    @property
    def peer(self) -> str:
        """The server as errors name it."""
        return describe_peer(self.address, self.peer_pid)

    def retire(self) -> None:
        """Keep no free slots: calls under way go on, and it hangs up when the last has ended.

        Descriptors and memory go with the last reference to the link.
        """
        free, self.slots = self.slots, _Retired()
        free.clear()

    def shutdown(self) -> None:
        """Hang up. Threads that wait get ``ConnectionLost``."""
        lib.shmrpc_conn_shutdown(self.poller, self.conn_id)
        self.retire()

    def lost(self, status: int, outcome: int, method: str) -> ConnectionLost | ProtocolError:
        """The error for a call that ended with this -errno."""
        if status == -_EPROTO:
            msg = f"{self.peer} broke the protocol during {method!r}; the connection is closed"
            return ProtocolError(msg)
        name = OUTCOMES[outcome]
        advice = {
            "not_sent": "it was not sent, calling again is safe",
            "not_started": "the server never started it, calling again is safe",
            "unknown": "it may have run",
        }[name]
        return ConnectionLost(f"lost {self.peer} during {method!r}: {advice}", name)


_EPROTO = errno.EPROTO


def _after_fork_in_child() -> None:
    for link in list(_links):
        # Their locks may be held by threads that the child does not have: never touch them again.
        for slot in list(link.all_slots):
            ffi.gc(slot.c, None)
        forget_descriptors(link.poller)
    _links.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
