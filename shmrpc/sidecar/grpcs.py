"""What both ends of a gRPC leg agree on: methods, metadata, errors. See docs/sidecar.md.

``/shmrpc.Sidecar/Unary`` and ``/Notify`` take and give one message; ``/Stream`` takes the arguments
and then the caller's messages, and gives messages of which the first byte says what they are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import grpc
import msgpack

from shmrpc.errors import STATUS_NAMES, Error, MethodNotFound, Overloaded, RemoteError
from shmrpc.metadata import unpack_metadata

from .raw import Reply, failure_reply, flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "CODES",
    "ITEM",
    "METHODS",
    "RESULT",
    "SERVICE",
    "as_is",
    "error_of",
    "from_grpc",
    "options",
    "place_of",
    "reply_of_error",
    "request_metadata",
    "to_grpc",
    "trailers_of",
]

SERVICE = "shmrpc.Sidecar"
METHODS = {name: f"/{SERVICE}/{name}" for name in ("Unary", "Notify", "Stream")}
ITEM, RESULT = b"\0", b"\1"
CODES = {code.value[0]: code for code in grpc.StatusCode}

_METADATA, _ERROR = "shmrpc-metadata-bin", "shmrpc-error-bin"
_HEADERS_MAX = 64 << 10  # gRPC's default of 8 KiB is too little for metadata and a traceback
_ERROR_MAX = 6000  # what is sent of an error that is longer: others may limit headers to 8 KiB
_SHORT = 1000
_PLAIN_KEY = re.compile(r"(?!grpc-|shmrpc-)[0-9a-z_.-]+")
_PLAIN_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_NOT_OURS = frozenset(("user-agent", "content-type", "te", "accept-encoding"))


def as_is(message: bytes) -> bytes:
    """Serialize and deserialize: messages are bytes."""
    return message


def options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """What channels and servers have in common."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes + 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _HEADERS_MAX),
        ("grpc.absolute_max_metadata_size", 2 * _HEADERS_MAX),
    ]


def place_of(address: str) -> tuple[str, bool]:
    """HOST:PORT, and whether TLS is spoken there."""
    scheme, _, place = address.partition("://")
    return place, scheme == "grpcs"


# ---- metadata ----


def to_grpc(metadata: Mapping[str, str | bytes]) -> list[tuple[str, str | bytes]]:
    """Metadata as gRPC's where that can express it, so that a mesh can read it; the rest packed."""
    plain: list[tuple[str, str | bytes]] = []
    others: dict[str, str | bytes] = {}
    for key, value in metadata.items():
        binary = key.endswith("-bin")
        fits = (
            isinstance(value, bytes)
            if binary
            else isinstance(value, str) and bool(_PLAIN_VALUE.fullmatch(value))
        )
        if fits and _PLAIN_KEY.fullmatch(key) and key not in _NOT_OURS:
            plain.append((key, value))
        else:
            others[key] = value
    if others:
        plain.append((_METADATA, msgpack.packb(others)))
    return plain


def from_grpc(entries: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str | bytes]:
    """The other way; a key that is there several times has its last value."""
    metadata: dict[str, str | bytes] = {}
    packed: dict[str, str | bytes] = {}
    for key, value in entries or ():
        if key == _METADATA and isinstance(value, bytes):
            packed = unpack_metadata(value)
        elif _PLAIN_KEY.fullmatch(key) and key not in _NOT_OURS:
            metadata[key] = value
    return {**metadata, **packed}


def request_metadata(
    method: str, packed: bytes, *, keywords: bool
) -> list[tuple[str, str | bytes]]:
    """What goes with a request: its metadata, and what shmrpc's own frame would say."""
    entries = to_grpc(unpack_metadata(packed)) if packed else []
    if _PLAIN_VALUE.fullmatch(method):
        entries.append(("shmrpc-method", method))
    else:
        entries.append(("shmrpc-method-bin", method.encode()))
    if keywords:
        entries.append(("shmrpc-keywords", "1"))
    return entries


# ---- errors ----


def trailers_of(reply: Reply, method: str) -> tuple[Any, str, bytes]:
    """The gRPC code and text of a failed reply, and the error's map for those who know it."""
    body = flat(reply.body)
    if not body:  # the upstream's core has said it by a number
        body = flat(failure_reply(_core_error(reply.status, method)).body)
    try:
        fields = msgpack.unpackb(body)
        text = str(fields.get("message", ""))
    except (ValueError, TypeError, AttributeError):
        fields, text = {"type": "ValueError", "message": "an error that is not readable"}, ""
    if len(body) > _ERROR_MAX:  # the traceback goes first, then the details
        fields.pop("traceback", None)
        if len(msgpack.packb(fields)) > _ERROR_MAX:
            fields = {key: str(fields.get(key, ""))[:_SHORT] for key in ("type", "message")}
        body = msgpack.packb(fields)
    code = CODES.get(reply.status, grpc.StatusCode.UNKNOWN)
    return code, text[:_SHORT], body


def _core_error(status: int, method: str) -> Error:
    code = STATUS_NAMES[status] if status < len(STATUS_NAMES) else "UNKNOWN"
    if code == "UNIMPLEMENTED":
        return MethodNotFound(f"there is no method {method!r}")
    if code == "RESOURCE_EXHAUSTED":
        return Overloaded(f"{method!r} was refused: there are as many calls as may be")
    return RemoteError(f"the call of {method!r} was ended", code=code)


def error_of(trailing: Iterable[tuple[str, str | bytes]] | None) -> bytes | None:
    """The error's map, if whoever failed knows of it."""
    for key, value in trailing or ():
        if key == _ERROR and isinstance(value, bytes):
            return value
    return None


def reply_of_error(status: int, text: str) -> Reply:
    """A plain gRPC server has failed a call: its status and its text, as an error that we know."""
    name = STATUS_NAMES[status] if status < len(STATUS_NAMES) else "UNKNOWN"
    return failure_reply(RemoteError(text, type="grpc.RpcError", code=name))
