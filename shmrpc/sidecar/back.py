"""Calls in the other direction: a server calls a client that is behind the sidecar.

They come over the connection that the sidecar has made for this client alone, and go on over the
connection that the client has made to the sidecar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc._native import lib
from shmrpc.caller import Caller
from shmrpc.worker import InlineWorkers, Worker

from .calls import RawChannel
from .passing import PassingWorker
from .raw import seconds_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmrpc.poller import Connection, Poller, Slot
    from shmrpc.worker import Host

    from .calls import RawCall
    from .passing import Over
    from .raw import Request

__all__ = ["BackInline", "BackWorker"]

T = TypeVar("T")


class _RawCaller(RawChannel, Caller):
    """Calls a client with what is packed already."""


class _BackLeg:
    """The client, as a leg."""

    native = True

    def __init__(self, connection: Connection) -> None:
        caller = _RawCaller(connection)
        self.forward: Callable[..., Slot] = caller.forward
        self.notify: Callable[[Request, float | None], None] = caller.send_on
        self.open: Callable[..., RawCall] = caller.open_raw


class BackWorker(PassingWorker):
    """Passes on to a client what the server asks it."""

    def __init__(self, host: Host, poller: Poller, client: Connection) -> None:
        super().__init__(host, poller)
        self._leg = _BackLeg(client)

    def _serve(self) -> None:
        status = lib.shmrpc_next(self._slot)
        while status != lib.SHMRPC_STOPPED:
            if status >= 0:
                self._run_message()
            else:
                self._special(status)
            status = lib.shmrpc_next(self._slot)

    def _run_message(self) -> None:
        try:
            self._pass_on()
        except BaseException as error:
            self._refuse(error)
            if not isinstance(error, Exception):
                raise

    def _carry(
        self,
        method: str,  # noqa: ARG002 - goes where all do
        attempt: Callable[[Any, float | None], T],
        deadline: float | None,
        *,
        repeatable: bool = True,  # noqa: ARG002 - there is one client
    ) -> tuple[T, Over]:
        return attempt(self._leg, seconds_left(deadline)), _nothing

    def serve_queued(self, mine: list[Worker], done: Callable[[list[Worker]], None]) -> None:
        """In a thread of its own: a call that this one brings back may have to end before."""
        if lib.shmrpc_next_queued(self._slot) == lib.SHMRPC_MESSAGE:
            self._hand_over(mine, done, "shmrpc-sidecar-back")
        else:
            done(mine)


class BackInline(InlineWorkers):
    """Such workers for threads that wait on the sidecar's client."""

    def __init__(self, host: Host, poller: Poller, client: Connection) -> None:
        super().__init__(host, poller)
        self._client = client

    def _new(self, poller: Poller) -> Worker:
        return BackWorker(self._host, poller, self._client)


def _nothing(_error: BaseException | None) -> None:
    """Nobody counts those."""
