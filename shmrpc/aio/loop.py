"""A poller whose only thread is an event loop's.

While traffic flows, the loop polls the connections once an iteration: it takes whole batches, runs
what waits for them, and goes on so for a moment, spinning, when nothing else is ready to run. When
it is quiet, the poller asks to be woken through its descriptor, as any socket.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import time
from asyncio import get_running_loop
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgpack

from shmrpc._native import lib
from shmrpc.codec import MsgpackCodec
from shmrpc.errors import Error
from shmrpc.poller import BRIEF, Connection, Poller, Wait
from shmrpc.values import unpack_extension

from .pending import NO_VALUE, Pending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmrpc.address import Address
    from shmrpc.codec import Codec
    from shmrpc.handshake import Agreement
    from shmrpc.poller import Slot
    from shmrpc.session import Waiting

__all__ = ["LoopPoller", "LoopWaiters", "check_loop", "decoder_of", "poller_of"]

_EVENTS = lib.SHMRPC_EVENTS
_BATCH_BYTES: int = lib.SHMRPC_BATCH_BYTES
_NOTHING = -errno.EAGAIN
_poll = lib.shmrpc_poll
_publish = lib.shmrpc_publish

_REPLY = lib.SHMRPC_REPLY

# How long the poller may go on while nothing else is ready, before it looks whether that is so, and
# its longest spin: together what a timer or another socket may have to wait.
_TURN_SECONDS = 50e-6
_SPIN_NS = 40_000
# Iterations in which something else was ready and nothing came, before the poller is armed.
_QUIET_MAX = 64
# What is sent while a batch is taken reaches peers some messages at a time, because each time costs
# them. Not in batches of fewer messages: one side would wait while the other works, by turns. And
# not after a batch that took so long, in so many that follow: nothing waits for a handler that
# blocks the loop, and where each takes its time, that costs nothing that would show.
_TOGETHER_MIN = 16
_LONG_SECONDS = 1e-3
_LONG_BATCHES = 64
# On a loop that does not show what is ready, time away from us that means that something else was.
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


def decoder_of(codec: Codec) -> Callable[[memoryview | bytes], Any]:
    """Its ``decode``, without a Python call around msgpack where that is all."""
    if type(codec) is MsgpackCodec:
        return functools.partial(msgpack.unpackb, strict_map_key=False, ext_hook=unpack_extension)
    return codec.decode


class _NoUnpacker:
    """For codecs that decode each body by itself."""

    def unpack(self) -> Any:
        """There is nothing that could."""
        raise ValueError

    def tell(self) -> int:
        """Nowhere."""
        return 0

    def feed(self, _bodies: memoryview) -> None:
        """They are not for us."""


def _new_unpacker() -> Any:
    """One that makes of the bodies of a batch what ``_decode`` does, all shorter than it is."""
    return msgpack.Unpacker(
        strict_map_key=False,
        ext_hook=unpack_extension,
        max_buffer_size=4 * _BATCH_BYTES,
        max_str_len=_BATCH_BYTES,
        max_bin_len=_BATCH_BYTES,
        max_ext_len=_BATCH_BYTES,
        max_array_len=_BATCH_BYTES,
        max_map_len=_BATCH_BYTES,
    )


def _ignore(*_request: object) -> None:
    """Nobody is concerned."""


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LoopPoller(Poller):
    """See above. Everything runs in the loop's thread."""

    def __init__(
        self,
        codec: Codec,
        *,
        wait: Wait = "auto",
        spin_budget: float | None = None,
    ) -> None:
        super().__init__(codec, server=True, wait=wait, spin_budget=spin_budget)
        self.loop = get_running_loop()
        self.active = True
        self._requests: Callable[[Connection, Any, Any], Callable[[], None] | None] | None = None
        self._plain_requests: Callable[..., None] = _ignore
        self._cancels: Callable[[Connection, int], None] | None = None
        self._closes: Callable[[Connection], None] | None = None
        self._rooms: dict[int, LoopWaiters] = {}
        self._room_tellers: dict[int, Waiting] = {}
        self._after: list[Callable[[], None]] = []
        self._decode = decoder_of(codec)
        self._plain = type(codec) is MsgpackCodec
        self._renew_unpacker()
        # Where the batch begins in what the unpacker was fed, and where its bodies end.
        self._origin = self._bodies_end = 0
        self.scheduled = False  # a turn is due, or goes on
        self.in_turn = False
        self._quiet = 0
        self._long = 0  # so many batches may take long
        self._last_poll = 0.0
        self.open_batch(is_event=False)
        self._briefs: Iterator[tuple[Any, ...]] = iter(())  # that were not taken yet
        self._hidden = not hasattr(self.loop, "_ready")
        self._ready: Any = () if self._hidden else self.loop._ready  # type: ignore[attr-defined]
        self._fd = lib.shmrpc_poller_fd(self.c)
        self.loop.add_reader(self._fd, self._readable)

    def add(self, agreement: Agreement, address: Address) -> Connection:
        """Take a new connection in."""
        connection = super().add(agreement, address)
        self.schedule()
        return connection

    def serve_requests(
        self,
        requests: Callable[[Connection, Any, Any], Callable[[], None] | None],
        plain_requests: Callable[[Connection, int, int, int, int, Any, bytes | None], None],
        cancels: Callable[[Connection, int], None],
        closes: Callable[[Connection], None],
        *,
        reads_always: bool = False,
    ) -> None:
        """Give requests, cancellations and ends to these from now on.

        ``plain_requests`` is given those without metadata and streams, as connection, call id,
        deadline in nanoseconds, method, flags, value, and the body if that is no value. With
        ``reads_always`` replies are read however much waits to be sent: for who calls.
        """
        self._requests, self._cancels, self._closes = requests, cancels, closes
        self._plain_requests = plain_requests
        lib.shmrpc_poller_serve_events(self.c, reads_always)

    def close(self) -> None:
        """Poll no more, and let go of everything that leads back here.

        Descriptors go with the last reference to us: now, not when the garbage collector runs.
        """
        if self.active:
            self.active = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)
            for waiters in self._rooms.values():
                waiters.wake()
            self._rooms.clear()
            self._room_tellers.clear()
            self._requests = self._cancels = self._closes = None
            self._plain_requests = self.ended = _ignore
            self.connections.clear()
            _publish(self.c)  # in the middle of a batch perhaps
            self.end()

    def end(self) -> None:
        """Give up what the core has, once the loop does not watch the descriptor any more."""
        if not self.active:
            lib.shmrpc_poller_end(self.c)

    # ---- polling ----

    def schedule(self) -> None:
        """Poll in the loop's next iteration."""
        if not self.scheduled and self.active:
            self.scheduled = True
            self.loop.call_soon(self._iterate)

    def _readable(self) -> None:
        if not self.scheduled:
            self._iterate()

    def _iterate(self) -> None:
        """A turn, and what has to follow it."""
        if not self.active:
            return
        self.scheduled = self.in_turn = True  # who asks for a turn has it: this one polls again
        more = True
        try:
            more = self._take_turn()
        finally:  # also after an exception: it ends the loop for now, which may run again
            self.scheduled = self.in_turn = False
            if more:
                self.schedule()

    def _take_turn(self) -> bool:
        """Poll, run what that brings, and go on for a while unless something else wants to run.

        Returns whether there is to be another turn; else the loop watches the descriptor.
        """
        self._take_batch()  # nothing, unless an exception came between
        now = monotonic()
        busy = now - self._last_poll > _BUSY_SECONDS if self._hidden else bool(self._ready)
        turn_ends = now + (0.0 if self._hidden and busy else _TURN_SECONDS)
        while True:
            status = _poll(self._taker, 0 if busy else _SPIN_NS)
            if status > 0:
                self._begin_batch(status)
                if self._long or (status & 0xFFFF) < _TOGETHER_MIN:
                    self._long = max(0, self._long - 1)
                    _publish(self.c)  # from now on all that is sent, at once
                try:
                    self._take_batch()
                finally:
                    _publish(self.c)
            elif status == _EVENTS:
                self.dispatch()
            else:
                break
            self._quiet = 0
            before, now = now, monotonic()
            if now - before > _LONG_SECONDS:
                self._long = _LONG_BATCHES
            if self._ready or now >= turn_ends or not self.active:
                break
        if status == _NOTHING and self._quiet < _QUIET_MAX:
            self._quiet += 1
        elif status <= 0 and status != _EVENTS and lib.shmrpc_arm(self._taker):
            return False
        self._last_poll = now
        return True

    def _begin_batch(self, status: int) -> None:
        """Plain messages have come."""
        self._briefs = BRIEF.iter_unpack(self._batch_briefs[: (status & 0xFFFF) * BRIEF.size])
        if self._plain:
            self._origin += self._bodies_end  # of the last batch, all of which was taken
            self._bodies_end = status >> 16
            self._feed(self._batch[: self._bodies_end])

    def _renew_unpacker(self) -> None:
        unpacker: Any = _new_unpacker() if self._plain else _NoUnpacker()
        self._unpack, self._tell, self._feed = unpacker.unpack, unpacker.tell, unpacker.feed

    def _decode_alone(self, start: int, end: int, *, reply: bool) -> tuple[Any, Exception | None]:
        """A body that the unpacker did not find to be a value: what it is, or why it is none."""
        if self._plain:
            self._renew_unpacker()  # it may be anywhere, in a neighbour's body even
            self._feed(self._batch[end : self._bodies_end])
            self._origin = -end
        try:
            return self._decode(self._batch[start:end]), None
        except (ValueError, TypeError) as error:
            return NO_VALUE, error
        except Exception as error:
            if reply:
                raise
            return NO_VALUE, error

    def _take_batch(self) -> None:
        """Take the plain messages that have come, and run who waits for them."""
        connections, unpack, tell = self.connections, self._unpack, self._tell
        origin = self._origin
        # An attribute, because it outlives an exception (Ctrl-C) that ends the loop for now.
        for conn_id, call_id, deadline, method, kind, flags, start, end in self._briefs:
            error = value = None
            # All at once is faster than each by itself. But no body may reach into the next one,
            # which may be somebody else's.
            try:
                value = unpack()
                alone = tell() - origin != end
            except Exception:
                alone = True
            if alone:
                value, error = self._decode_alone(start, end, reply=kind == _REPLY)
                unpack, tell, origin = self._unpack, self._tell, self._origin
            connection = connections.get(conn_id)
            if connection is None:
                continue
            if kind != _REPLY:
                body = None if error is None else bytes(self._batch[start:end])
                self._plain_requests(connection, call_id, deadline, method, flags, value, body)
                continue
            calls = connection.session.calls
            pending = calls.get(call_id)
            if type(pending) is Pending:
                del calls[call_id]
                pending.value = value
                pending.error = error or 0
                pending.status = 0
                callback, context = pending.callback, pending.context
                if callback is not None and context is not None:
                    pending.callback = None
                    context.run(callback, pending)
            else:
                reply = bytes(self._batch[start:end])
                later = connection.session.replied(call_id, 0, b"", reply)
                if later is not None:
                    later()
                self._run_after()
            if connection.retired:
                connection.forget_if_done()

    def dispatch(self) -> None:
        """Take what the core has for us, tell those concerned, then run what they asked for."""
        super().dispatch()
        self._run_after()

    def _run_after(self) -> None:
        while self._after:
            after, self._after = self._after, []
            for run in after:
                run()

    def after_dispatch(self, run: Callable[[], None]) -> None:
        """Run this when all that is there has been taken: without the lock, in this iteration.

        For those that are told under the lock (``Waiting.wake``) and run other people's code.
        """
        self._after.append(run)

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

    async def room(self, connection: Connection, slot: Slot, deadline: float) -> bool:
        """Wait until all that was sent has left this process; False at the deadline."""
        return await self._wait_room(
            connection, lambda: bool(lib.shmrpc_want_room(slot.c)), deadline
        )

    async def blocks(self, connection: Connection, size: int, deadline: float) -> bool:
        """Wait until a buffer of this size may fit into the arena; False at the deadline."""
        if connection.closed or connection.retired:
            return True  # it will be seen what became of it
        slot = connection.slot()

        def wants() -> bool:
            return not connection.retired and bool(lib.shmrpc_want_blocks(slot.c, size))

        try:
            there = await self._wait_room(connection, wants, deadline)
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

    def look(self, _connection: Connection, /) -> None:
        """Nothing: the loop reads."""

    def wait(self, _slot: Slot, _deadline: float, /) -> bool:
        """Threads don't wait on it."""
        msg = "this connection belongs to an event loop"
        raise Error(msg)
