"""What can go wrong, as exceptions. Each has a ``code``, the name of a gRPC status.

Messages say what happened, to which peer, and what the caller can do about it.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "STATUS_NAMES",
    "STATUS_NUMBERS",
    "Abort",
    "Cancelled",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Error",
    "ForkedError",
    "MessageTooLarge",
    "MethodNotFound",
    "Overloaded",
    "ProtocolError",
    "RemoteError",
]

STATUS_NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
STATUS_NUMBERS = {name: number for number, name in enumerate(STATUS_NAMES)}


class Error(Exception):
    """Base of everything that shmrpc raises on purpose."""

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.code: str = self.default_code


class ConnectError(Error):
    """There is no connection and none could be made, or a server could not take its address."""

    default_code = "UNAVAILABLE"


class ConnectionLost(Error):
    """The connection ended while the call was under way.

    ``outcome`` is what became of the call: ``"not_sent"`` and ``"not_started"`` mean that it has
    not run and can be repeated safely; ``"unknown"`` that it may have.
    """

    default_code = "UNAVAILABLE"

    def __init__(self, message: str = "", outcome: str = "unknown") -> None:
        super().__init__(message)
        self.outcome = outcome


class DeadlineExceeded(Error, TimeoutError):
    """The timeout passed before the reply came. The call may still run to its end."""

    default_code = "DEADLINE_EXCEEDED"


class Cancelled(Error):
    """The call was cancelled, by its caller or because one side is closing."""

    default_code = "CANCELLED"


class MethodNotFound(Error):
    """The peer has no method of that name."""

    default_code = "UNIMPLEMENTED"


class Overloaded(Error):
    """The server refused the call without starting it: it has ``max_concurrency`` already."""

    default_code = "RESOURCE_EXHAUSTED"


class MessageTooLarge(Error):
    """A request or reply is longer than the receiver's ``max_message_bytes``. Nothing was sent."""

    default_code = "RESOURCE_EXHAUSTED"


class ProtocolError(Error):
    """The peer sent what the protocol does not allow; that one connection was closed."""

    default_code = "INTERNAL"


class ForkedError(Error):
    """The object was made before a fork and belongs to the parent; connect anew in the child."""

    default_code = "FAILED_PRECONDITION"


class RemoteError(Error):
    """The handler raised. ``type`` and ``message`` are those of its exception.

    ``remote_traceback`` is the handler's traceback as text, or ``""`` where the server does not
    show it (to peers of another uid, by default). ``details`` is what ``Abort`` was given.
    """

    def __init__(
        self,
        message: str = "",
        *,
        type: str = "RemoteError",  # noqa: A002 - the attribute's public name
        code: str = "UNKNOWN",
        remote_traceback: str = "",
        details: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.code = code
        self.remote_traceback = remote_traceback
        self.details = details

    def __str__(self) -> str:
        text = f"{self.type}: {self.message}"
        if self.remote_traceback:
            text += f"\n\nRemote traceback:\n{self.remote_traceback.rstrip()}"
        return text


class Abort(RemoteError):
    """Raise it in a handler to end the call with a gRPC status of your choice.

    The caller sees a ``RemoteError`` with this code, message and details (anything msgpack
    carries). Raises ``ValueError`` if ``code`` is not the name of a gRPC error status.
    """

    def __init__(self, code: str, message: str = "", details: Any = None) -> None:
        if code not in STATUS_NUMBERS or code == "OK":
            msg = f"{code!r} is not a gRPC error status; one of {', '.join(STATUS_NAMES[1:])}"
            raise ValueError(msg)
        super().__init__(message, type="Abort", code=code, details=details)
