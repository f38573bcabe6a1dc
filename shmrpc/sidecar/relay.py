"""Where requests come in over shm, unix and tcp, and are passed on by the thread that read them.

A call about which there is nothing to decide, of a method that the thread has passed on before,
stays in the core (csrc/forward.c): Python has told it which way that goes. All others come here.
"""

from __future__ import annotations

import errno
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc._native import ffi, lib
from shmrpc.errors import Cancelled, Error
from shmrpc.server import Server

from .passing import PassingWorker
from .raw import RawCodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.acceptor import Acceptor
    from shmrpc.poller import Poller, Slot

    from .counts import Cell
    from .endpoint import NativeEndpoint, OwnEndpoint
    from .passing import Over
    from .routes import Route, Table
    from .service import Sidecar

__all__ = ["RelayServer"]

T = TypeVar("T")

_WORKERS = 256  # calls that are passed on at a time: each waits in a thread
_MAX_CONCURRENCY = 4096
_WAYS_MAX = 256  # of each thread: callers may invent any number of methods
_UNIMPLEMENTED = 12

_pass = lib.shmrpc_pass
_MESSAGE, _STREAM = lib.SHMRPC_MESSAGE, lib.SHMRPC_FLAG_STREAM
_ESTALE = -errno.ESTALE


class _RelayWorker(PassingWorker):
    """A worker that passes on what is not its server's own."""

    def __init__(self, host: RelayServer, poller: Poller) -> None:
        super().__init__(host, poller)
        self._sidecar = host.sidecar
        self._cells: dict[str, Cell] = {}
        self.table: Table | None = None  # in use now: its upstreams stay
        self.route: Route | None = None
        self._own: OwnEndpoint | None = None  # in use now, of the caller's own
        self._ways: dict[bytes, Slot] = {}  # the slot by which the core passes each method on
        self._since = ffi.new("uint64_t *")
        host.sidecar.workers.add(self)

    def end(self) -> None:
        """See ``Worker``."""
        sidecar = self._sidecar
        sidecar.workers.discard(self)
        self._clear_ways()
        sidecar.counts.end(self._cells)
        super().end()

    def _serve(self) -> None:
        slot, message = self._slot, self._message
        status = _pass(slot)
        while status != lib.SHMRPC_STOPPED:
            if status == lib.SHMRPC_PASSING:
                self._relay_further()
            elif status >= 0 or status == _MESSAGE:
                if message.method < 0:
                    self._relay(perf_counter_ns())
                else:
                    self._run_message()
            elif status == _ESTALE:
                self._clear_ways()
            else:
                self._special(status)
            status = _pass(slot)

    def _cell(self, prefix: str) -> Cell:
        cell = self._cells.get(prefix)
        if cell is None:
            cell = self._cells[prefix] = self._sidecar.counts.cell(prefix)
        return cell

    def _report(self, error: BaseException, args: Any, result: Any) -> None:
        """Of our own methods, too: one asks the upstream, which may be missing."""
        if isinstance(error, Error):
            self._refuse(error)
        else:
            super()._report(error, args, result)

    # ---- the ways of the core ----

    def _clear_ways(self) -> None:
        lib.shmrpc_ways_clear(self._slot)
        for slot in set(self._ways.values()):
            slot.connection.slots.append(slot)
        self._ways.clear()

    def _add_way(self, name: bytes, route: Route, leg: NativeEndpoint, epoch: int) -> None:
        """Let the core pass this method on from now on, by itself."""
        if len(self._ways) >= _WAYS_MAX:
            self._clear_ways()
        slot = next((s for s in self._ways.values() if leg.is_current(s.connection)), None)
        if slot is None:
            try:
                slot = leg.client()._slot()
            except Error:  # lost just now; the next call finds out
                return
        tally = self._cell(route.prefix).c
        size = len(name)
        if not lib.shmrpc_way_add(self._slot, name, size, slot.c, route.timeout_ns, tally, epoch):
            self._ways[name] = slot
        elif slot not in self._ways.values():
            slot.connection.slots.append(slot)

    def _relay_further(self) -> None:
        """A call that the core has passed on did not end as most do."""
        result = lib.shmrpc_passing(self._slot, self._since)
        slot = self._ways[bytes(ffi.buffer(self._message.head, self._message.method_bytes))]
        others = set(self._ways.values()) - {slot}
        lib.shmrpc_ways_clear(self._slot)
        self._ways.clear()
        for other in others:
            other.connection.slots.append(other)
        self._relay(self._since[0], slot, result)

    # ---- passing on ----

    def _relay(self, start: int, call: Slot | None = None, result: int = 0) -> None:
        """Pass the message on. It may have been sent on ``call`` already, with this result."""
        epoch = lib.shmrpc_ways_epoch(self._poller.c)  # before the table that it belongs to
        while self.table is not self._sidecar.table:
            self.table = self._sidecar.table
        code, route = 0, None
        try:
            message = self._message
            name = bytes(ffi.buffer(message.head, message.method_bytes))
            self.route = route = self.table.find(name)
            leg = route.direct
            plain = message.kind == lib.SHMRPC_REQUEST and not message.flags & _STREAM
            if leg is not None and leg.native and plain:
                own = self._of_caller(leg)
                code = self._reply_with(
                    own.forward(self._slot, name, route.timeout_ns, call, result)
                )
                if own is leg and code != _UNIMPLEMENTED and name not in self._ways:
                    self._add_way(name, route, leg, epoch)
            else:
                code = self._pass_on()
        except BaseException as error:
            code = self._refuse(error)
            if not isinstance(error, Exception):
                raise
        finally:
            if self._own is not None:
                self._own.leave()
            self._own = self.table = self.route = None
            self._cell(route.prefix if route else "-").count(code, perf_counter_ns() - start)

    def _of_caller(self, leg: NativeEndpoint) -> NativeEndpoint:
        """The leg to take: of a caller that serves, its own."""
        if not lib.shmrpc_caller_serves(self._slot):
            return leg
        connection = self._poller.connection(self._message.conn_id)
        if connection is None:
            return leg  # there is nobody to call back any more
        if self._own is not None:
            self._own.leave()
        self._own = leg.of(connection)
        return self._own

    def _carry(
        self,
        method: str,
        attempt: Callable[[Any, float | None], T],
        deadline: float | None,
        *,
        repeatable: bool = True,
    ) -> tuple[T, Over]:
        def of_caller(leg: Any, timeout: float | None) -> T:
            return attempt(self._of_caller(leg) if leg.native else leg, timeout)

        if self.route is None:
            raise Cancelled
        return self.route.carry(
            method, of_caller, uid=self._uid(), deadline=deadline, repeatable=repeatable
        )

    def _uid(self) -> int:
        connection = self._poller.connection(self._message.conn_id)
        return connection.credentials.uid if connection is not None else -1


class RelayServer(Server):
    """A server whose methods are elsewhere."""

    def __init__(self, sidecar: Sidecar, address: str, **options: Any) -> None:
        super().__init__(address, workers=_WORKERS, max_concurrency=_MAX_CONCURRENCY, **options)
        self.sidecar = sidecar
        self.registry.admits_others = True
        self.registry.add(sidecar.describe, "shmrpc.describe", idempotent=True)

    def _listen(self) -> tuple[Poller, Acceptor]:
        poller, acceptor = super()._listen()
        poller.codec = RawCodec()  # of connections: what calls them back has it packed
        return poller, acceptor

    def renew_ways(self) -> None:
        """What the workers' ways lead to has changed."""
        poller = self._poller
        if poller is not None:
            lib.shmrpc_ways_renew(poller.c)

    @property
    def goes_old_ways(self) -> bool:
        """Whether calls are under way as it was before the last change."""
        poller = self._poller
        return poller is not None and lib.shmrpc_ways_stale(poller.c) > 0

    def _run_worker(self, poller: Poller) -> None:
        worker = _RelayWorker(self, poller)
        del poller
        worker.run()
