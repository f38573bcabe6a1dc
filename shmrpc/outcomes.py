"""How calls end that have no result: the errors for what the peer or the core says."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .codec import MsgpackCodec
from .errors import (
    STATUS_NAMES,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    MessageTooLarge,
    MethodNotFound,
    Overloaded,
    ProtocolError,
    RemoteError,
)

if TYPE_CHECKING:
    from .poller import Connection
    from .session import Body

__all__ = ["remote_error", "send_error"]


def remote_error(connection: Connection, method: str, status: int, body: Body) -> Error:
    """The error for a reply whose status is not OK."""
    code = STATUS_NAMES[status] if status < len(STATUS_NAMES) else "UNKNOWN"
    if not body:
        return _core_error(connection, method, code)
    try:
        fields = MsgpackCodec().decode(body)  # type: ignore[arg-type]
        error = RemoteError(
            str(fields["message"]),
            type=str(fields["type"]),
            code=code,
            remote_traceback=str(fields.get("traceback", "")),
            details=fields.get("details"),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        msg = f"{connection.peer} sent an error for {method!r} that is not readable"
        return ProtocolError(msg)
    if error.type == "shmrpc.MessageTooLarge":
        return MessageTooLarge(f"{connection.peer}: {error.message}")
    return error


def _core_error(connection: Connection, method: str, code: str) -> Error:
    """What an error without a body means: the peer's core sent it, no handler did."""
    peer = connection.peer
    if code == "UNIMPLEMENTED":
        return MethodNotFound(f"{peer} has no method {method!r}")
    if code == "RESOURCE_EXHAUSTED":
        return Overloaded(f"{peer} refused {method!r}: it has as many calls as it may take")
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(f"{method!r} on {peer} expired before it was started")
    if code == "CANCELLED":
        return Cancelled(f"{peer} ended {method!r}: it was cancelled, or the peer is stopping")
    if code == "UNAVAILABLE":
        connection.refuses = True
        msg = f"{peer} is stopping and did not start {method!r}: calling again is safe"
        return ConnectionLost(msg, "not_started")
    return RemoteError(f"{peer} ended {method!r}", code=code)


def send_error(connection: Connection, method: str, status: int) -> Exception:
    """The error for a request that the core did not send, or not wait for, by its -errno."""
    peer = connection.peer
    if status == -errno.ETIMEDOUT:
        return DeadlineExceeded(f"{method!r} on {peer} took longer than its timeout")
    if status == -errno.EMSGSIZE:
        return MessageTooLarge(
            f"the request of {method!r} is longer than {peer} accepts "
            f"(max_message_bytes={connection.max_request_bytes})"
        )
    if status == -errno.ENOMEM:
        return MemoryError(f"no memory to send the request of {method!r} to {peer}")
    return Error(f"waiting for {method!r} on {peer} failed: {os.strerror(-status)}")
