"""The byte streams of one event loop: they share a poller, which goes with the last of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from shmrpc._native import lib
from shmrpc.bytestream import METHOD, Flow, Wire, byte_terms, refuse
from shmrpc.codec import MsgpackCodec
from shmrpc.errors import ConnectError
from shmrpc.link import shake_hands
from shmrpc.poller import BRIEF, check_timeout

from .loop import LoopPoller, LoopWaiters

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.address import Address
    from shmrpc.handshake import Agreement
    from shmrpc.poller import Connection

__all__ = ["Hub", "hub_of"]

_EVENTS, _ITEM, _REPLY = lib.SHMRPC_EVENTS, lib.SHMRPC_ITEM, lib.SHMRPC_REPLY
_arm, _poll = lib.shmrpc_arm, lib.shmrpc_poll
_briefs_in, _BRIEF_BYTES = BRIEF.iter_unpack, BRIEF.size

_ATTRIBUTE = "_shmrpc_hub"  # on the loop: what is kept anywhere else would outlive it


class _FlowPoller(LoopPoller):
    """It gives short items to their streams without anything between."""

    def __init__(self) -> None:
        super().__init__(MsgpackCodec())
        lib.shmrpc_poller_brief_items(self.c)

    def _take_turn(self) -> bool:
        # A loop that is busy looks at its descriptors anyway: that costs less than turns without
        # anything to take, and the peer, which has to ring, less than we would lose.
        if not self._torn and (self._ready or self.rests[0]):
            status = _poll(self._taker, 0)
            if status > 0:
                self._begin_batch(status)
                self._take_batch()
            elif status == _EVENTS:
                self.dispatch()
            if self._ready or self.rests[0] or not self.active:
                return not (self.active and _arm(self._taker))
        more = super()._take_turn()
        return more and not (self._ready and self.active and _arm(self._taker))

    def _begin_batch(self, status: int) -> None:
        self._briefs = _briefs_in(self._batch_briefs[: (status & 0xFFFF) * _BRIEF_BYTES])

    def _take_batch(self) -> None:
        # Fields as shmrpc_brief has them for items.
        for conn_id, call_id, last, count, kind, flags, start, end in self._briefs:
            connection = self.connections.get(conn_id)
            if connection is None:
                continue
            session = connection.session
            if kind == _ITEM:
                streams: dict[int, Any] = session.requests if flags else session.calls
                flow = streams.get(call_id)
                data = bytes(self._batch[start:end])
                if type(flow) is not Flow or not flow.came(data, count, last):
                    session.dropped += count
            elif kind == _REPLY:
                later = session.replied(call_id, 0, b"", bytes(self._batch[start:end]))
                if later is not None:
                    later()
            else:
                self._plain_requests(connection, call_id, 0, count, flags, None, None)
        if self._after:
            self._run_after()


class Hub:
    """Connections, accepted and made, until the last user leaves."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.poller = _FlowPoller()
        self.poller.add_method(METHOD, 0, fast=False)
        self.poller.serve_requests(
            self._take_request, self._take_plain, _ignore_cancel, self._forget
        )
        self._users = 0
        self._expected: dict[int, tuple[Connection, Callable[[Wire], None]]] = {}

    def enter(self) -> None:
        """Somebody uses it: to be followed by ``leave``."""
        self._users += 1

    def leave(self) -> None:
        """The last one closes the poller."""
        self._users -= 1
        if self._users == 0:
            delattr(self.loop, _ATTRIBUTE)
            self.poller.close()

    # ---- connections that are made ----

    async def connect(self, address: Address, timeout: float) -> Wire:
        """A byte stream to this address; ``ConnectError`` after ``timeout`` seconds at most."""
        until = time.monotonic() + check_timeout(timeout)
        shaking = self.loop.run_in_executor(None, shake_hands, byte_terms(address), timeout)
        try:
            agreement = await asyncio.shield(shaking)
        except asyncio.CancelledError:
            shaking.add_done_callback(_close_agreement)
            raise
        finally:
            del shaking  # it has the error, whose traceback has us
        try:
            connection = self.poller.add(agreement, address)
        except BaseException:
            agreement.close()
            raise
        waiters = LoopWaiters(self.loop)
        wire = Wire.open(connection, waiters)
        try:
            self.poller.schedule()
            if not await waiters.wait(wire.accepted, until):
                msg = f"can't connect to {connection.peer}: it did not answer in {timeout:g} s"
                raise ConnectError(msg)
            wire.check_accepted()
        except BaseException:
            wire.hang_up()
            raise
        return wire

    # ---- connections that are accepted ----

    def expect(self, agreement: Agreement, accepted: Callable[[Wire], None]) -> int:
        """Take a new connection in, whose peer will open a byte stream."""
        connection = self.poller.add(agreement, agreement.terms.address)
        self._expected[connection.conn_id] = connection, accepted
        return connection.conn_id

    def expect_no_more(self, conn_id: int) -> None:
        """Hang up on a peer that has opened none yet."""
        connection, _ = self._expected.pop(conn_id, (None, None))
        if connection is not None:
            connection.shutdown()

    def _take_request(
        self, connection: Connection, message: Any, _body: Any
    ) -> Callable[[], None] | None:
        """A request is there (the poller's lock is held)."""
        call_id = message.call_id
        if message.kind != lib.SHMRPC_REQUEST:
            return None
        expected = self._expected.get(connection.conn_id)
        is_stream = message.method == 0 and message.flags & lib.SHMRPC_FLAG_STREAM
        if expected is None or not is_stream:
            return lambda: refuse(connection, call_id)
        del self._expected[connection.conn_id]
        flow = Flow(LoopWaiters(self.loop), ended=bool(message.flags & lib.SHMRPC_FLAG_ENDED))
        flow.started = True
        connection.session.opened(call_id, flow)
        return lambda: expected[1](Wire(connection, flow, call_id, called=True))

    def _take_plain(
        self,
        connection: Connection,
        call_id: int,
        _deadline_ns: int,
        _index: int,
        _flags: int,
        _value: Any,
        _body: bytes | None,
    ) -> None:
        """A request is there that is no stream."""
        refuse(connection, call_id)

    def _forget(self, connection: Connection) -> None:
        self._expected.pop(connection.conn_id, None)


def hub_of(loop: asyncio.AbstractEventLoop) -> Hub:
    """The hub of this loop, which runs."""
    hub: Hub | None = getattr(loop, _ATTRIBUTE, None)
    if hub is None:
        hub = Hub(loop)
        setattr(loop, _ATTRIBUTE, hub)
    return hub


def _ignore_cancel(_connection: Connection, _call_id: int) -> None:
    """The stream has been told."""


def _close_agreement(shaking: asyncio.Future[Agreement]) -> None:
    """The task that wanted it was cancelled meanwhile."""
    with contextlib.suppress(ConnectError, OSError, asyncio.CancelledError):
        shaking.result().close()
