"""Calls that are passed on as they are: what travels between a listener and an upstream.

Bodies and metadata stay packed. Nothing here knows what they mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from shmrpc.errors import (
    STATUS_NUMBERS,
    Cancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    MessageTooLarge,
    MethodNotFound,
    Overloaded,
    ProtocolError,
    RemoteError,
)
from shmrpc.parcels import Parcel
from shmrpc.values import NotPlain, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmrpc.buffers import Source
    from shmrpc.session import Body

__all__ = ["RawCodec", "Reply", "Request", "failure_reply", "flat", "same", "seconds_left", "split"]

# How errors of our own travel: a caller makes the same error of them (outcomes.py).
_NAMES: list[tuple[type[Error], str]] = [
    (MessageTooLarge, "shmrpc.MessageTooLarge"),
    (Overloaded, "shmrpc.Overloaded"),
    (MethodNotFound, "shmrpc.MethodNotFound"),
    (DeadlineExceeded, "shmrpc.DeadlineExceeded"),
    (Cancelled, "shmrpc.Cancelled"),
]


class RawCodec:
    """Bytes in, bytes out: what a client packs as arguments is a tuple with the body in it."""

    def encoder(self) -> Callable[[Any], bytes]:
        """See ``Codec``."""
        return _unwrap

    @staticmethod
    def decode(data: memoryview | bytes) -> bytes:
        """See ``Codec``; the bytes are a copy."""
        return bytes(data)


def _unwrap(value: Any) -> bytes:
    return same(value[0] if type(value) is tuple else value)


def same(body: Any) -> bytes:
    """The body as it is: ``NotPlain`` for one with buffers, as encoders raise it."""
    if type(body) is Parcel:
        raise NotPlain
    packed: bytes = body
    return packed


def split(body: Any) -> tuple[bytes, Sequence[Source]]:
    """A body, and the buffers that go beside it."""
    return (bytes(body.body), body.buffers) if type(body) is Parcel else (body, ())


def flat(body: Any) -> bytes:
    """A body without buffers beside it, for gRPC, which has nothing that they could travel in."""
    if type(body) is not Parcel:
        packed: bytes = body
        return packed
    copies = [memoryview(bytes(buffer)) for buffer in body.buffers]  # nobody else writes to them
    try:
        return bytes(msgpack.packb(decode(bytes(body.body), copies, untrusted=True)))
    except (TypeError, ValueError) as error:
        msg = f"gRPC carries what MessagePack has, not arrays and tables: {error}"
        raise RemoteError(msg, type="TypeError", code="INVALID_ARGUMENT") from error


@dataclass
class Request:
    """One request, as it came."""

    method: str
    body: Body
    metadata: bytes = b""  # packed; empty: none
    keywords: bool = False  # the body has named arguments too
    deadline: float | None = None  # time.monotonic() seconds


@dataclass
class Reply:
    """One reply: a gRPC status number, packed metadata, and the result or the error's map."""

    status: int = 0
    metadata: bytes = b""
    body: Body = b""


def seconds_left(deadline: float | None) -> float | None:
    """What is left until a ``time.monotonic()`` deadline, not below 0; None if there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def failure_reply(error: BaseException) -> Reply:
    """What tells a caller of an error that happened on the way.

    A lost or missing upstream is a ``ConnectionLost`` with an outcome that the caller can trust:
    ``not_started`` is the best that it gets, because its request has been taken, here.
    """
    fields: dict[str, Any] = {"message": str(error)}
    code = error.code if isinstance(error, Error) else "INTERNAL"
    if isinstance(error, ConnectionLost):
        outcome = "unknown" if error.outcome == "unknown" else "not_started"
        fields.update(type="shmrpc.ConnectionLost", outcome=outcome)
    elif isinstance(error, ConnectError):
        fields.update(type="shmrpc.ConnectionLost", outcome="not_started")
    elif isinstance(error, ProtocolError):  # the upstream's, not our caller's
        code = "UNAVAILABLE"
        fields.update(type="shmrpc.ConnectionLost", outcome="unknown")
    elif isinstance(error, RemoteError):
        fields.update(type=error.type, message=error.message)
        if error.remote_traceback:
            fields["traceback"] = error.remote_traceback
        if error.details is not None:
            fields["details"] = error.details
    else:
        kind = type(error).__qualname__
        fields["type"] = next((name for own, name in _NAMES if isinstance(error, own)), kind)
    fields = {key: _encodable(value) for key, value in fields.items()}
    return Reply(STATUS_NUMBERS.get(code, 2), b"", msgpack.packb(fields))


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
