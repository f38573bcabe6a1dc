"""What one connection knows of its calls: pure state, no I/O, no waiting, no C.

Somebody reads frames and tells the session (``poller.Poller`` does, holding its lock); threads or
tasks that wait for a stream look at its ``Stream`` and are woken to look again.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "NOT_SENT",
    "PYTHON_INDEX",
    "WINDOW_BYTES",
    "WINDOW_MESSAGES",
    "Body",
    "Pending",
    "Run",
    "Session",
    "Stream",
    "Waiting",
]

# What a sender of items may have under way beyond what the receiver has taken: so much is buffered
# for a reader that stops, and about half of it fits into a ring.
WINDOW_MESSAGES = 512
WINDOW_BYTES = 256 << 10

# Where a request lies that has not been sent: one number, see the core's shmrpc_outcome_of.
NOT_SENT = ((1 << 64) - 1,)

PYTHON_INDEX = 65535  # the core's SHMRPC_PYTHON_INDEX

_CREDIT = struct.Struct("<II")
_CREDIT_MAX = 0xFFFF_FFFF


class Sized(Protocol):
    """A body with buffers beside it."""

    def __len__(self) -> int:
        """What it counts for in a stream's credit."""


Body: TypeAlias = "bytes | Sized"


class Pending(Protocol):
    """A call of ours that waits for its reply."""

    def replied(self, status: int, metadata: bytes, body: Body) -> Callable[[], None] | None:
        """Take the reply. What has to run other people's code is returned, to be run later.

        In that case the call stays registered, and is its own to unregister.
        """

    def lost(self, error: int) -> Callable[[], None] | None:
        """Learn that the connection ended, with this errno; as ``replied``."""


class Waiting(Protocol):
    """Who waits for a stream."""

    def wake(self) -> None:
        """Make them look again. Must not wait, nor take the poller's lock."""


class Run:
    """Items of a stream that came together."""

    __slots__ = ("data", "ends", "next", "received_bytes", "received_messages")

    def __init__(self, data: Body, ends: Sequence[int]) -> None:
        self.data = data
        self.ends = ends  # where each item ends
        self.next: Run | None = None
        self.received_messages = self.received_bytes = 0  # of the stream, up to the end of these


class Runs:
    """What came and was not taken: a queue in which one thread appends and one takes.

    Appending the last run again changes nothing, so that it can be repeated after an interruption.
    """

    __slots__ = ("_taken", "last")

    def __init__(self) -> None:
        self._taken = self.last = Run(b"", ())

    def __bool__(self) -> bool:
        return self._taken.next is not None

    def append(self, run: Run) -> None:
        """Only for who reads the connection."""
        if run is not self.last:
            self.last.next = run
            self.last = run

    def popleft(self) -> tuple[Body, Sequence[int]]:
        """The next run's data and ends; IndexError if there is none now."""
        run = self._taken.next
        if run is None:
            raise IndexError
        self._taken = run
        data, run.data = run.data, b""
        return data, run.ends

    def clear(self) -> None:
        """Take all there is."""
        while self:
            self.popleft()


class Stream:
    """One stream as either side sees it: what came and was not taken, and what may be sent.

    Counters have one writer each, so that a reading and a consuming thread need no lock: the
    reader of the connection writes ``granted_*``, the sender ``sent_*``, the consumer ``taken_*``
    and ``returned_*``. What the reader does may be repeated with the same result.
    """

    # Both sides of a kind of stream have to agree on these.
    window_messages = WINDOW_MESSAGES
    window_bytes = WINDOW_BYTES
    due_messages = WINDOW_MESSAGES // 2  # when so much was taken, credit is given back
    due_bytes = WINDOW_BYTES // 2

    __slots__ = (
        "cancelled",
        "ended",
        "granted_bytes",
        "granted_messages",
        "initial",
        "lost_error",
        "outcome",
        "overrun",
        "position",
        "reply",
        "returned_bytes",
        "returned_messages",
        "runs",
        "sent_bytes",
        "sent_messages",
        "started",
        "taken_bytes",
        "taken_messages",
        "waiters",
    )

    def __init__(self, waiters: Waiting, *, ended: bool = False) -> None:
        self.waiters = waiters
        self.runs = Runs()
        self.started = False  # callee: a handler has it
        self.ended = ended  # no more items come
        self.cancelled = False  # callee: the caller has given up, or is gone
        self.overrun = False  # the peer sent more than it had credit for
        self.initial: bytes | None = None  # caller: metadata that came before everything else
        self.reply: tuple[int, bytes, Body] | None = None  # caller: status, metadata, body
        self.lost_error = 0  # errno that ended the connection
        self.position: Sequence[int] = NOT_SENT  # caller: of the request
        self.outcome = 0  # caller: what became of the call when the connection ended
        self.granted_messages, self.granted_bytes = self.window_messages, self.window_bytes
        self.sent_messages = self.sent_bytes = 0
        self.taken_messages = self.taken_bytes = 0
        self.returned_messages = self.returned_bytes = 0

    # ---- for the sender ----

    def may_send(self) -> bool:
        """Whether there is credit. One item may be larger than what is left of it."""
        return self.sent_messages < self.granted_messages and self.sent_bytes < self.granted_bytes

    def sent(self, size: int) -> None:
        """An item of this many bytes is about to be sent.

        Not afterwards: the credit for it may be back before the sending thread runs on.
        """
        self.sent_messages += 1
        self.sent_bytes += size

    def not_sent(self, size: int) -> None:
        """It was not, after all."""
        self.sent_messages -= 1
        self.sent_bytes -= size

    # ---- for the consumer ----

    def take(self) -> tuple[Body, Sequence[int]]:
        """Next items; IndexError if there are none now."""
        data, ends = self.runs.popleft()
        self.taken_messages += len(ends)
        self.taken_bytes += len(data)
        return data, ends

    def due_credit(self) -> bytes:
        """The body of a CREDIT frame to be sent now, or nothing."""
        messages = self.taken_messages - self.returned_messages
        size = min(self.taken_bytes - self.returned_bytes, _CREDIT_MAX)
        if messages < self.due_messages and size < self.due_bytes:
            return b""
        self.returned_messages += messages
        self.returned_bytes += size
        return _CREDIT.pack(messages, size)

    @property
    def over(self) -> bool:
        """Caller: whether nothing comes any more."""
        return self.reply is not None or self.lost_error != 0 or self.overrun

    @property
    def received_messages(self) -> int:
        """How many have come."""
        return self.runs.last.received_messages

    # ---- for who reads the connection ----

    def items(self, run: Run) -> bool:
        """Items have come. False if they are beyond the credit, and dropped."""
        before, ends = self.runs.last, run.ends
        if run is not before:
            last = len(run.data) - (ends[-2] if len(ends) > 1 else 0)
            run.received_messages = before.received_messages + len(ends)
            run.received_bytes = before.received_bytes + len(run.data)
            if (
                run.received_messages > self.window_messages + self.returned_messages
                or run.received_bytes - last >= self.window_bytes + self.returned_bytes
            ):
                self.overrun = True
        if self.ended or self.overrun:
            self.waiters.wake()
            return False
        self.runs.append(run)
        self.waiters.wake()
        return True

    def credited(self, body: bytes) -> tuple[int, int] | None:
        """What may be sent in all once the receiver has said this.

        None if that can't be: it never got what it gives back. Nobody could send beyond a window
        otherwise but into memory of its own.
        """
        if len(body) != _CREDIT.size:
            return None
        messages, size = _CREDIT.unpack(body)
        granted_messages = self.granted_messages + messages
        granted_bytes = self.granted_bytes + size
        if (
            granted_messages > self.sent_messages + self.window_messages
            or granted_bytes > self.sent_bytes + self.window_bytes
        ):
            return None
        return granted_messages, granted_bytes

    def grant(self, credit: tuple[int, int]) -> None:
        """So much may be sent in all."""
        self.granted_messages, self.granted_bytes = credit
        self.waiters.wake()

    def end(self) -> bool:
        """Callee: no more items come. False if that was so before."""
        before, self.ended = self.ended, True
        self.waiters.wake()
        return not before

    def begin(self, metadata: bytes) -> bool:
        """Caller: initial metadata has come. False if it had before."""
        before = self.initial
        if before is None:
            self.initial = metadata
        self.waiters.wake()
        return before is None

    def replied(self, status: int, metadata: bytes, body: Body) -> Callable[[], None] | None:
        """As ``Pending.replied``."""
        self.reply = (status, metadata, body)
        self.ended = True
        self.waiters.wake()
        return None

    def lost(self, error: int) -> None:
        """As ``Pending.lost``, and for a stream that the peer called."""
        self.lost_error = error
        # In this order: a thread that sees the end must not take it for a regular one.
        self.cancelled = True
        self.ended = True
        self.waiters.wake()

    def cancel(self) -> None:
        """Callee: the caller has given up."""
        self.cancelled = True
        self.ended = True
        self.waiters.wake()


class Session:
    """The calls of one connection, in both directions."""

    def __init__(self) -> None:
        self.calls: dict[int, Pending | Stream] = {}  # ours, by call id
        self.requests: dict[int, Stream] = {}  # the peer's streams
        self.dropped = 0  # frames that belong to no call
        # Gives a call id that was never used on this connection, and says that it is Python's.
        self.next_id = itertools.count((1 << 16) | PYTHON_INDEX, 1 << 16).__next__

    def stream_of(self, call_id: int, *, from_caller: bool, frames: int = 1) -> Stream | None:
        """The stream that frames belong to; counts them as dropped if there is none."""
        stream = self.requests.get(call_id) if from_caller else self.calls.get(call_id)
        if isinstance(stream, Stream):
            return stream
        self.dropped += frames
        return None

    def opened(self, call_id: int, stream: Stream) -> None:
        """The peer has called a stream. It may not use an id twice at a time."""
        if call_id in self.requests:
            self.dropped += 1
        else:
            self.requests[call_id] = stream

    def cancelled(self, call_id: int) -> None:
        """The peer has cancelled a stream, or it was dropped before it started."""
        stream = self.requests.get(call_id)
        if stream is not None:
            stream.cancel()
            if not stream.started:
                self.requests.pop(call_id, None)

    def replied(
        self, call_id: int, status: int, metadata: bytes, body: Body
    ) -> Callable[[], None] | None:
        """A call of ours is over."""
        pending = self.calls.get(call_id)
        if pending is None:
            self.dropped += 1
            return None
        later = pending.replied(status, metadata, body)
        if later is None:
            self.calls.pop(call_id, None)
        return later

    def lost(self, error: int) -> list[Callable[[], None]]:
        """The connection has ended: everybody learns it."""
        pending = list(self.calls.values()) + list(self.requests.values())
        later = [call.lost(error) for call in pending]
        self.calls.clear()  # not before: what became of them is known as long as there are some
        return [run for run in later if run is not None]
