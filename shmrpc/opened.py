"""What open calls of threads and of event loops have in common: what they know, and tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import DeadlineExceeded, MessageTooLarge, ProtocolError
from .metadata import unpack_metadata, unpack_reply_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .poller import Connection
    from .session import Stream

__all__ = ["Opened"]


class Opened:
    """A call of this method, over this stream."""

    method: str
    _connection: Connection
    _stream: Stream
    _observers: list[Callable[[BaseException | None], None]]

    @property
    def position(self) -> Sequence[int]:
        """Where its request lies, for what became of it."""
        return self._stream.position

    @position.setter
    def position(self, position: Sequence[int]) -> None:
        self._stream.position = position

    def observe(self, fn: Callable[[BaseException | None], None]) -> None:
        """Call this once when the call is over, with its error or None."""
        self._observers.append(fn)

    def _ended(self, error: BaseException | None) -> None:
        observers, self._observers = self._observers, []
        for observer in observers:
            observer(error)

    def reply_metadata(self) -> tuple[dict[str, str | bytes], dict[str, str | bytes]]:
        """Trailing and initial metadata, as far as they have come."""
        stream = self._stream
        packed = stream.reply[1] if stream.reply is not None else b""
        trailing, initial = unpack_reply_metadata(packed)
        return trailing, unpack_metadata(stream.initial) if stream.initial is not None else initial

    # ---- why it does not go on ----

    def _unpackable(self, item: object, error: Exception) -> Exception:
        kind = type(item).__qualname__
        msg = f"a message for {self.method!r} can't be sent: {error} (of type {kind})"
        return (TypeError if isinstance(error, TypeError) else ValueError)(msg)

    def _too_long(self) -> MessageTooLarge:
        peer, limit = self._connection.peer, self._connection.max_request_bytes
        msg = f"a message for {self.method!r} is longer than {peer} accepts"
        return MessageTooLarge(f"{msg} (max_message_bytes={limit})")

    def _past_deadline(self) -> DeadlineExceeded:
        peer = self._connection.peer
        return DeadlineExceeded(f"{self.method!r} on {peer} took longer than its timeout")

    def _overrun(self) -> ProtocolError:
        return ProtocolError(f"{self._connection.peer} sent more of {self.method!r} than it may")

    def _no_result_yet(self) -> TimeoutError:
        return TimeoutError(f"{self.method!r} has no result yet")

    def _streams_nothing(self) -> str:
        return (
            f"{self.method!r} on {self._connection.peer} returns one result and "
            "streams nothing: use call(), or open() and result()"
        )
