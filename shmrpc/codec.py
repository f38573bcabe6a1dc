"""Values to bytes and back. msgpack's types by default, never pickle.

A codec is any object with the two methods of ``Codec``; client and server have to use the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from . import values

if TYPE_CHECKING:
    from collections.abc import Callable

    from .buffers import Source

__all__ = [
    "PACKING_ERRORS",
    "Codec",
    "MsgpackCodec",
    "explain_arguments",
    "pack_lifted",
    "pack_split",
]

# What an encoder raises for a value that it can't pack. Anything else, such as what a signal
# handler raised meanwhile, is not about the value.
PACKING_ERRORS = (TypeError, ValueError, OverflowError, RecursionError)


class Codec(Protocol):
    """How values travel. ``decode`` may be used by many threads, an encoder by one at a time."""

    def encoder(self) -> Callable[[Any], bytes]:
        """Return a new function that packs one value; it raises TypeError or ValueError."""

    def decode(self, data: memoryview | bytes) -> Any:
        """Unpack one value; ValueError or TypeError if the bytes are none.

        It has to copy what it keeps: the bytes belong to a buffer that is used again.
        """


class MsgpackCodec:
    """None, bool, int (64 bit), float, str, bytes, list/tuple, dict; tuples arrive as lists.

    Also memoryviews and what else has a buffer, numpy arrays, Arrow tables: see ``values``. Those
    with 16 KiB or more travel beside the message, which ``encoder`` refuses with ``NotPlain``.

    Map keys may be of any type that is hashable. Thread-safe.
    """

    @staticmethod
    def decode(data: memoryview | bytes) -> Any:
        """Unpack one value."""
        return values.unpack(data)

    def encoder(self) -> Callable[[Any], bytes]:
        """Return a packer of its own: packing re-uses its buffer."""
        return values.packer()


def pack_split(
    codec: Codec,
    pack: Callable[[Any], bytes],
    value: Any,
    lifted: Callable[[Any], bytes] | None = None,
) -> tuple[bytes, list[Source]]:
    """Pack a value with this encoder of the codec: a body, and the buffers that go beside it.

    ``lifted`` is the second one of a slot's packers (``attaching``), for what has buffers.
    """
    try:
        body = pack(value)
        if len(body) < values.LARGE or type(codec) is not MsgpackCodec:
            return body, []
        if not values.may_hold_large(body):
            return body, []
    except values.NOT_PLAIN:
        pass
    return values.encode(value) if lifted is None else pack_lifted(lifted, value)


def pack_lifted(lifted: Callable[[Any], bytes], value: Any) -> tuple[bytes, list[Source]]:
    """Pack a value with buffers for a slot, and what of them could not be attached at once."""
    try:
        return lifted(value), []
    except values.NotPlain:
        return values.encode(value)


def explain_arguments(
    codec: Codec, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception:
    """Say which argument could not be packed, after packing all of them failed with ``error``."""
    for label, value in [*enumerate(args, 1), *kwargs.items()]:
        try:
            pack_split(codec, codec.encoder(), value)
        except PACKING_ERRORS as reason:
            kind = type(value)
            msg = (
                f"argument {label!r} of {method!r} can't be sent: {reason} "
                f"(the value is of type {kind.__module__}.{kind.__qualname__})"
            )
            return (TypeError if isinstance(reason, TypeError) else ValueError)(msg)
    # Never `error` itself: raised from itself, it would keep its frames alive.
    msg = f"the arguments of {method!r} can't be sent: {error}"
    return (TypeError if isinstance(error, TypeError) else ValueError)(msg)
