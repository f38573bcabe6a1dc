"""Connecting to a server: the client's side of a handshake, and the connection it makes."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from . import address as addresses
from . import handshake, rendezvous
from .errors import ConnectError
from .poller import WAIT_MODES, Connection, Poller, Wait

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from .codec import Codec
    from .segments import Backing

__all__ = ["check_waiting", "connect_link", "failure_of", "shake_hands", "terms_of"]

_POLL_MAX = (1 << 31) - 1  # milliseconds


def terms_of(
    texts: Iterable[str],
    *,
    max_message_bytes: int,
    max_memory_bytes: int,
    backing: Backing,
    allow_uids: Iterable[int],
    trust_uids: Iterable[int],
    allow_remote: bool = False,
) -> list[handshake.Terms]:
    """What may be agreed on at each of these addresses.

    ``ConnectError`` for what is no address, ValueError for options that make no sense.
    """
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
    allowed, trusted = frozenset(allow_uids), frozenset(trust_uids)
    if not trusted <= allowed:
        msg = f"trust_uids has {sorted(trusted - allowed)}, which allow_uids has not"
        raise ValueError(msg)
    return [
        handshake.Terms(
            addresses.parse(text),
            max_message_bytes,
            backing=backing,
            max_memory_bytes=max_memory_bytes,
            allow_uids=allowed,
            trust_uids=trusted,
            allow_remote=allow_remote,
        )
        for text in texts
    ]


def check_waiting(wait: str, spin_budget: float | None) -> None:
    """Refuse ways to wait that there are not, with a ``ValueError``."""
    if wait not in WAIT_MODES:
        msg = f"wait must be 'auto', 'spin' or 'block', not {wait!r}"
        raise ValueError(msg)
    if spin_budget is not None and not 0 < spin_budget <= 1:
        msg = f"spin_budget must be between 0 and 1 second, not {spin_budget!r}"
        raise ValueError(msg)


def failure_of(failures: list[ConnectError]) -> ConnectError:
    """What became of all the addresses that were tried, as one error.

    ``failures`` is empty after that: an error that its own traceback leads to would wait for the
    garbage collector.
    """
    error = failures[0]
    if len(failures) > 1:
        error = ConnectError("; ".join(str(failure) for failure in failures))
        error.__cause__ = failures[0]
    failures.clear()
    return error


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
