"""A poller whose only thread is an event loop's.

While traffic flows, the loop polls the connections once an iteration: it takes whole batches, and
spins for a moment when nothing else is ready to run. When it is quiet, the poller asks to be woken
through its descriptor, as any socket.
"""

from __future__ import annotations

import asyncio
import errno
import time
from asyncio import get_running_loop
from typing import TYPE_CHECKING, Any

from shmrpc._native import lib
from shmrpc.errors import Error
from shmrpc.poller import Connection, Poller, Slot, Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.address import Address
    from shmrpc.codec import Codec
    from shmrpc.handshake import Agreement
    from shmrpc.session import Waiting

__all__ = ["LoopPoller", "LoopWaiters", "check_loop", "poller_of"]

_EVENTS = lib.SHMRPC_EVENTS
_NOTHING = -errno.EAGAIN
_poll = lib.shmrpc_poll

# Longest spin in one iteration: with what an iteration costs besides, no timer and no other socket
# has to wait for more than twice that.
_SPIN_NS = 50_000
# Calls that may end without their task having let the loop run: each takes some microseconds.
_INLINE_MAX = 8
# Iterations in which something else was ready and nothing came, before the poller is armed.
_QUIET_MAX = 64
# On a loop that does not show what is ready: an iteration of this length had something else to do.
_BUSY_SECONDS = 30e-6


def check_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Refuse to be used from another event loop, or from none."""
    running = asyncio._get_running_loop()
    if running is not loop:
        where = "no event loop" if running is None else "another event loop"
        msg = f"{what} belongs to the event loop that made it, and was used from {where}"
        raise RuntimeError(msg)


def poller_of(connection: Connection) -> LoopPoller:
    """The loop's poller of an aio connection."""
    poller = connection.poller
    if not isinstance(poller, LoopPoller):
        raise TypeError
    return poller


class LoopWaiters:
    """The tasks that wait for one thing."""

    __slots__ = ("_futures", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures: list[asyncio.Future[None]] = []

    def wake(self) -> None:
        """Make them look again."""
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)

    async def wait(self, ready: Callable[[], bool], deadline: float) -> bool:
        """Wait until ``ready()``; False at the deadline (``time.monotonic()``)."""
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            future = self._loop.create_future()
            self._futures.append(future)
            timer = None
            if left != float("inf"):
                timer = self._loop.call_later(left, _expire, future)
            try:
                await future
            finally:
                if timer is not None:
                    timer.cancel()
                if future in self._futures:
                    self._futures.remove(future)
        return True


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LoopPoller(Poller):
    """See above. Everything runs in the loop's thread."""

    def __init__(
        self,
        codec: Codec,
        *,
        server: bool = False,
        wait: Wait = "auto",
        spin_budget: float | None = None,
    ) -> None:
        super().__init__(codec, server=server, wait=wait, spin_budget=spin_budget)
        self.loop = get_running_loop()
        self.active = True
        self._requests: Callable[[Connection, Any, Any], Callable[[], None] | None] | None = None
        self._cancels: Callable[[Connection, int], None] | None = None
        self._closes: Callable[[Connection], None] | None = None
        self._rooms: dict[int, LoopWaiters] = {}
        self._room_tellers: dict[int, Waiting] = {}
        self._after: list[Callable[[], None]] = []
        self._slot: Slot | None = None
        self._poll_slot = self._taker
        self._scheduled = False
        self._inline = 0
        self._quiet = 0
        self._last_poll = 0.0
        self._ready: Any = getattr(self.loop, "_ready", None)
        self._fd = lib.shmrpc_poller_fd(self.c)
        self.loop.add_reader(self._fd, self._readable)

    def add(self, agreement: Agreement, address: Address) -> Connection:
        """Take a new connection in."""
        connection = super().add(agreement, address)
        self.schedule()
        return connection

    def poll_for(self, slot: Slot) -> None:
        """Expect replies on this slot's connection: a client's only one."""
        self._slot = slot
        self._poll_slot = slot.c

    def serve_requests(
        self,
        requests: Callable[[Connection, Any, Any], Callable[[], None] | None],
        cancels: Callable[[Connection, int], None],
        closes: Callable[[Connection], None],
    ) -> None:
        """Give requests, cancellations and ends to these from now on."""
        self._requests, self._cancels, self._closes = requests, cancels, closes
        lib.shmrpc_poller_serve_events(self.c)

    def close(self) -> None:
        """Poll no more."""
        if self.active:
            self.active = False
            self._slot = None
            self._poll_slot = self._taker
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)
            for waiters in self._rooms.values():
                waiters.wake()
            self._rooms.clear()

    # ---- polling ----

    def schedule(self) -> None:
        """Poll in the loop's next iteration."""
        if not self._scheduled and self.active:
            self._scheduled = True
            self.loop.call_soon(self._iterate)

    def _readable(self) -> None:
        if not self._scheduled:
            self._iterate()

    def _iterate(self) -> None:
        self._scheduled = False
        if not self.active:
            return
        self._inline = 0
        status = _poll(self._poll_slot, 0 if self._others_ready() else _SPIN_NS)
        if status == _EVENTS:
            self._quiet = 0
            self.dispatch()
        elif status < 0 and self._quiet < _QUIET_MAX:
            self._quiet += 1
        elif lib.shmrpc_arm(self._poll_slot):
            return
        self._last_poll = time.monotonic()
        self.schedule()

    def _others_ready(self) -> bool:
        """Whether other callbacks than ours wait to run."""
        if self._ready is not None:
            return len(self._ready) > self._scheduled
        return time.monotonic() - self._last_poll > _BUSY_SECONDS

    def dispatch(self) -> None:
        """Take what the core has for us, tell those concerned, then run what they asked for."""
        super().dispatch()
        while self._after:
            after, self._after = self._after, []
            for run in after:
                run()

    def after_dispatch(self, run: Callable[[], None]) -> None:
        """Run this when all that is there has been taken: without the lock, in this iteration.

        For those that are told under the lock (``Waiting.wake``) and run other people's code.
        """
        self._after.append(run)

    def poll_inline(self) -> None:
        """Look for replies at once, if nothing else is ready: a task need not be suspended then.

        The loop gets its turn after a bounded number of that, so that others are not delayed.
        """
        if self._inline >= _INLINE_MAX or (
            self._ready is not None and len(self._ready) > self._scheduled
        ):
            self.schedule()
            return
        self._inline += 1
        if _poll(self._poll_slot, _SPIN_NS // 2) == _EVENTS:
            self.dispatch()
        self.schedule()

    # ---- what comes ----

    def _interrupted(self, _later: list[Callable[[], None]]) -> None:
        """The loop is about to end; no other thread can do its work."""
        self._message.kind = 0

    def _take_request(
        self, connection: Connection, message: Any, later: list[Callable[[], None]]
    ) -> None:
        if self._requests is not None:
            run = self._requests(connection, message, self._body(connection))
            if run is not None:
                later.append(run)

    def _take_cancel(
        self, connection: Connection, call_id: int, later: list[Callable[[], None]]
    ) -> None:
        super()._take_cancel(connection, call_id, later)
        if self._cancels is not None:
            cancels = self._cancels
            later.append(lambda: cancels(connection, call_id))

    def _take_room(self, connection: Connection) -> None:
        waiters = self._rooms.pop(connection.conn_id, None)
        if waiters is not None:
            waiters.wake()
        teller = self._room_tellers.pop(connection.conn_id, None)
        if teller is not None:
            teller.wake()

    def _take_end(self, connection: Connection, later: list[Callable[[], None]]) -> None:
        self._take_room(connection)
        if self._closes is not None:
            closes = self._closes
            later.append(lambda: closes(connection))

    def look(self) -> None:
        """Take what has come, now."""
        if _poll(self._poll_slot, 0) == _EVENTS:
            self.dispatch()
        self.schedule()

    async def room(self, connection: Connection, slot: Slot, deadline: float) -> bool:
        """Wait until all that was sent has left this process; False at the deadline."""
        return await self._wait_room(
            connection, lambda: bool(lib.shmrpc_want_room(slot.c)), deadline
        )

    async def blocks(self, connection: Connection, size: int, deadline: float) -> bool:
        """Wait until a buffer of this size may fit into the arena; False at the deadline."""
        slot = connection.slot()
        try:
            there = await self._wait_room(
                connection, lambda: bool(lib.shmrpc_want_blocks(slot.c, size)), deadline
            )
        finally:
            connection.slots.append(slot)
            # The core tells us no more, now that one of us knows: the others ask again.
            self._take_room(connection)
        return there

    async def _wait_room(
        self, connection: Connection, wants: Callable[[], bool], deadline: float
    ) -> bool:
        while self.active and not connection.closed and wants():
            waiters = self._rooms.setdefault(connection.conn_id, LoopWaiters(self.loop))
            self.schedule()

            def gone(waiters: LoopWaiters = waiters) -> bool:
                return self._rooms.get(connection.conn_id) is not waiters

            if not await waiters.wait(gone, deadline):
                return False
        return True

    def tell_room(self, connection: Connection, waiting: Waiting) -> bool:
        """Wake this when all that was sent has left this process; False if it has already."""
        slot = connection.slot()
        waits = not connection.closed and bool(lib.shmrpc_want_room(slot.c))
        connection.slots.append(slot)
        if waits:
            self._room_tellers[connection.conn_id] = waiting
            self.schedule()
        return waits

    def wait(self, _slot: Slot, _deadline: float, /) -> bool:
        """Threads don't wait on it."""
        msg = "this connection belongs to an event loop"
        raise Error(msg)
