"""A look now and then at connections that have memory for values, for what nobody else does.

A segment of ours that nothing was in for a while goes back to the system. For a client whose
threads are all busy elsewhere we read what has come: the peer may want its own memory back. And
what did not fit into the ring when many values died together is sent.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from typing import Any, Protocol

from ._native import lib
from .errors import Error

__all__ = ["tend"]

QUIET = 5.0  # seconds after which memory that nothing is in goes back to the system


class Poller(Protocol):
    """What reads the connection, as far as it is of interest here."""

    c: Any

    def look(self, connection: Any, /) -> None:
        """Read what has come, if it may be that nobody else does."""


class Tended(Protocol):
    """A connection."""

    conn_id: int
    closed: bool
    tended: bool
    always_tended: bool  # memory comes and goes in the core, and we are not told

    @property
    def poller(self) -> Poller:
        """Its poller."""


class _Tender:
    """A thread that is there as long as there is memory, of ours or a peer's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tended: set[weakref.ref[Tended]] = set()
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = False

    def tend(self, connection: Tended) -> None:
        ends = self._ends
        with self._lock:
            connection.tended = True
            # In a finalizer: what takes no lock, as this queue does not.
            self._tended.add(weakref.ref(connection, lambda _: ends.put(None)))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="shmrpc-tender", daemon=True).start()

    def _run(self) -> None:
        while self._look_at_all():
            with contextlib.suppress(queue.Empty):
                self._ends.get(timeout=QUIET / 2)

    def _look_at_all(self) -> bool:
        """Whether there is anything left to look after."""
        # Not with our lock held: reading runs the callbacks of futures, which may do anything.
        done = [ref for ref in list(self._tended) if not _look(ref())]
        with self._lock:
            for ref in done:
                connection = ref()
                if connection is not None:
                    connection.tended = False
                self._tended.discard(ref)
            self._running = bool(self._tended)
            return self._running


def _look(connection: Tended | None) -> bool:
    """Whether it has any memory left."""
    if connection is None or connection.closed:
        return False
    poller = connection.poller
    left: int = lib.shmrpc_arena_trim(poller.c, connection.conn_id, int(QUIET * 1e9))
    if left > 0:
        with contextlib.suppress(Error):
            poller.look(connection)
    return left > 0 or connection.always_tended


_tender = _Tender()


def tend(connection: Tended) -> None:
    """Look after this connection from now on: it has got memory."""
    _tender.tend(connection)


def _after_fork_in_child() -> None:
    """Nothing of it is ours, the thread least of all."""
    global _tender  # noqa: PLW0603 - its lock may be held by a thread that is not here
    _tender = _Tender()


os.register_at_fork(after_in_child=_after_fork_in_child)
