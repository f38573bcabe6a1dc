"""What can be said of a method: its kind, signature and docstring."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registry import Method

__all__ = ["describe_method"]

_TEXT_MAX = 4096
# By whether the caller sends a stream, and whether the method does.
_KINDS = {
    (False, False): "unary",
    (False, True): "server_streaming",
    (True, False): "client_streaming",
    (True, True): "bidirectional",
}


def describe_method(method: Method) -> dict[str, Any]:
    """A method as ``shmrpc.describe`` tells it: plain values, whatever its function is."""
    return {
        "name": method.name,
        "kind": _KINDS[method.requests, method.generator],
        "signature": _signature(method.function),
        "doc": _plain(inspect.getdoc(method.function) or ""),
        "requests": method.requests,
        "streams": method.generator,
        "idempotent": method.idempotent,
    }


def _signature(function: Any) -> str:
    try:
        return _plain(inspect.signature(function))
    except Exception:  # built-in functions tell none; a default's repr may raise anything
        return "(...)"


def _plain(text: object) -> str:
    """Text that can be sent, of a length that nobody minds."""
    return str(text)[:_TEXT_MAX].encode("utf-8", "replace").decode()
