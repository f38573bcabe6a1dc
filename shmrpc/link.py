"""Connecting to a server: the client's side of a handshake, and the connection it makes."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from . import handshake, rendezvous
from .errors import ConnectError
from .poller import WAIT_MODES, Connection, Poller, Wait

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from .codec import Codec

__all__ = ["check_options", "check_uids", "connect_link", "shake_hands"]

_POLL_MAX = (1 << 31) - 1  # milliseconds


def check_options(
    max_message_bytes: int,
    backing: str,
    wait: str,
    spin_budget: float | None,
    max_memory_bytes: int,
) -> None:
    """Refuse options that make no sense, with a ``ValueError`` that names what is allowed."""
    if not 1024 <= max_message_bytes <= handshake.MESSAGE_BYTES_MAX:
        most = handshake.MESSAGE_BYTES_MAX
        msg = f"max_message_bytes must be from 1024 to {most}, not {max_message_bytes}"
        raise ValueError(msg)
    if not 0 <= max_memory_bytes < 1 << 63:
        msg = f"max_memory_bytes must be a number of bytes from 0 on, not {max_memory_bytes}"
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


def check_uids(allow: Iterable[int], trust: Iterable[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Both as sets; ValueError if some are to be trusted that may not connect."""
    allowed, trusted = frozenset(allow), frozenset(trust)
    if not trusted <= allowed:
        msg = f"trust_uids has {sorted(trusted - allowed)}, which allow_uids has not"
        raise ValueError(msg)
    return allowed, trusted


def _run(steps: handshake.Steps, sock: socket.socket, deadline: float) -> handshake.Agreement:
    """Drive a handshake to its end, or to the deadline."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        while True:
            next(steps)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(min(left * 1000, _POLL_MAX)):
                msg = "the server took the connection and did not answer in time"
                raise ConnectError(msg)
    except StopIteration as stop:
        agreement: handshake.Agreement = stop.value
        return agreement
    finally:
        steps.close()


def shake_hands(terms: handshake.Terms, timeout: float) -> handshake.Agreement:
    """Reach a server and agree within ``timeout`` seconds; raises ``ConnectError``."""
    deadline = time.monotonic() + timeout
    sock = rendezvous.open_socket(terms.address, timeout)
    try:
        return _run(handshake.client_side(sock, terms), sock, deadline)
    except ConnectError as error:
        sock.close()
        msg = f"can't connect to {terms.address}: {error}"
        raise ConnectError(msg) from error.__cause__


def connect_link(
    terms: handshake.Terms,
    codec: Codec,
    timeout: float,
    *,
    wait: Wait = "auto",
    spin_budget: float | None = None,
) -> Connection:
    """Connect within ``timeout`` seconds, on a poller of its own; raises ``ConnectError``."""
    agreement = shake_hands(terms, timeout)
    try:
        poller = Poller(codec, wait=wait, spin_budget=spin_budget)
        return poller.add(agreement, terms.address)
    except BaseException:
        agreement.close()
        raise
