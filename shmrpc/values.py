"""Values with large or typed memory in them: arrays, tables, views, long bytes.

``encode`` makes of a value a body and a list of buffers, which are views of what the caller passed,
never copies; ``decode`` makes of both the value. The body is msgpack. Where a value of another kind
than msgpack's stands in it, an ExtType says which, and has its bytes if they are few, else the
number of the buffer that they are. A message whose values are all msgpack's own, and short, is
what ``codec`` packs and needs none of this: ``packer`` refuses everything else with ``NotPlain``.

Neither numpy nor pyarrow is imported unless a value of theirs is sent or received.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any, cast

import msgpack

from .buffers import Buffer, Source, Unwritten, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["EXT_CODE", "LARGE", "NotPlain", "decode", "encode", "may_hold_large", "packer"]

EXT_CODE = 83  # of msgpack's extension types for applications
LARGE = 16 << 10  # bytes from which on memory travels beside the body

_BYTES, _VIEW, _BUFFER, _ARRAY, _SCALAR, _ARROW = range(6)

_FORMATS = frozenset("cbBhHiIlLqQnNefd?")  # of memoryviews: the items that ``cast`` knows
_DEPTH_MAX = 512  # msgpack's own limit
_LEAVES = frozenset((int, float, str, bool, type(None)))
_DAMAGED = "a value in the message is described wrongly"


class NotPlain(TypeError):
    """A value is one of those that ``encode`` is for."""


# ---- what needs none of this ----


def packer() -> Callable[[Any], bytes]:
    """A new msgpack packer, as fast as that, which raises ``NotPlain`` where it is not enough."""
    pack: Callable[[Any], bytes] = msgpack.Packer(default=_refuse).pack
    return pack


def _refuse(value: Any) -> Any:
    number = _number(value)
    if number is not None:
        return number
    if isinstance(value, Buffer) or _is_numpy(value) or _is_arrow(value) or _is_memory(value):
        msg = f"a value of type {_name(value)} does not travel in msgpack alone"
        raise NotPlain(msg)
    raise _unpackable(value)


def may_hold_large(body: bytes) -> bool:
    """Whether msgpack has something that looks like the beginning of ``LARGE`` bytes or more.

    No is certain, and found out quickly: then there is nothing that had better travel beside.
    """
    last = len(body) - LARGE  # where it would have to begin
    at = body.find(b"\xc5", 0, max(last, 0))  # with a length of 16 bit
    while at >= 0:
        if body[at + 1] >= LARGE >> 8:
            return True
        at = body.find(b"\xc5", at + 1, last)
    at = body.find(b"\xc6", 0, max(last, 0))  # of 32 bit
    while at >= 0:
        if len(body) - at > int.from_bytes(body[at + 1 : at + 5], "big") >= LARGE:
            return True
        at = body.find(b"\xc6", at + 1, last)
    return False


# ---- to the peer ----


def encode(value: Any) -> tuple[bytes, list[Source]]:
    """Pack one value: a body, and the buffers that it refers to by their numbers.

    Each buffer is a flat, contiguous memoryview (format ``B``) of what the caller passed, or
    ``Unwritten``; none is empty, and none is copied here. Objects that occur twice travel twice.
    Raises TypeError, ValueError, OverflowError or RecursionError for what can't be sent.
    """
    encoder = _Encoder()
    body: bytes = msgpack.Packer(default=encoder.default).pack(encoder.lift(value, 0))
    return body, encoder.buffers


class _Encoder:
    """The buffers of one message, as they are found."""

    def __init__(self) -> None:
        self.buffers: list[Source] = []

    def lift(self, value: Any, depth: int) -> Any:
        """The same value, with ExtTypes for long bytes: msgpack packs those without asking."""
        kind = type(value)
        if kind in _LEAVES:
            return value
        if isinstance(value, (list, tuple)):
            if kind is not msgpack.ExtType and not _LEAVES.issuperset(map(type, value)):
                _check_depth(depth)
                # Not in a comprehension, which takes a frame of its own at each level.
                return list(map(self.lift, value, itertools.repeat(depth + 1)))
        elif isinstance(value, dict):
            if not _LEAVES.issuperset(map(type, value.values())):
                _check_depth(depth)
                below = map(self.lift, value.values(), itertools.repeat(depth + 1))
                return dict(zip(value, below))  # noqa: B905 (as long as each other)
        elif isinstance(value, bytes):
            if len(value) >= LARGE:
                return self._extension(_BYTES, [], len(value), memoryview(value))
        elif isinstance(value, bytearray):
            if len(value) >= LARGE:
                return self._extension(_VIEW, [], len(value), memoryview(value))
        elif isinstance(value, memoryview):
            if value.nbytes >= LARGE:
                return self._memory(value)
            if not value.c_contiguous:
                return value.tobytes()
        return value

    def default(self, value: Any) -> Any:
        """What msgpack packs instead of a value that is none of its own."""
        number = _number(value)
        if number is not None:
            return number
        if isinstance(value, Buffer):
            return self._extension(_BUFFER, [], len(value), value.view)
        if _is_numpy(value):
            from . import arrays

            beside, size, source = arrays.split(value)
            kind = _SCALAR if isinstance(value, sys.modules["numpy"].generic) else _ARRAY
            return self._extension(kind, beside, size, source)
        if _is_arrow(value):
            return self._arrow(value)
        try:
            view = memoryview(value)
        except TypeError:
            raise _unpackable(value) from None
        return self._memory(view)

    def _arrow(self, value: Any) -> Any:
        try:
            from . import tables
        except ImportError as error:  # too old
            raise TypeError(str(error)) from None
        return self._extension(_ARROW, *tables.split(value))

    def _memory(self, view: memoryview) -> Any:
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        code = view.format.lstrip("@")
        typed = code in _FORMATS and (view.ndim == 1 or (view.ndim and view.nbytes))
        beside = [code, list(view.shape or ())] if typed and (code != "B" or view.ndim != 1) else []
        return self._extension(_VIEW, beside, view.nbytes, flat(view))

    def _extension(self, kind: int, beside: list[Any], size: int, source: Source) -> Any:
        where: int | bytes
        if size >= LARGE:
            where = len(self.buffers)
            self.buffers.append(source)
        elif isinstance(source, Unwritten):
            room = bytearray(size)
            source.write(memoryview(room))
            where = bytes(room)
        else:
            where = bytes(source)
        return msgpack.ExtType(EXT_CODE, msgpack.packb([kind, where, *beside]))


def _check_depth(depth: int) -> None:
    if depth >= _DEPTH_MAX:
        msg = "recursion limit exceeded"
        raise ValueError(msg)


def _number(value: Any) -> int | float | bool | None:
    """The number that a numpy scalar is: a float64, which is a float, arrives as one anyway."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, getattr(numpy, "generic", ())):
        from . import arrays

        if arrays.is_number(value):
            return cast("int | float | bool", cast("Any", value).item())
    return None


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # absent: then the value can't be an array
    return numpy is not None and isinstance(
        value, (getattr(numpy, "ndarray", ()), getattr(numpy, "generic", ()))
    )


def _is_arrow(value: Any) -> bool:
    pyarrow = sys.modules.get("pyarrow")
    names = ("Table", "RecordBatch", "Array", "ChunkedArray")
    return pyarrow is not None and isinstance(
        value, tuple(getattr(pyarrow, name, ()) for name in names)
    )


def _is_memory(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _unpackable(value: Any) -> Exception:
    if isinstance(value, int):
        return OverflowError("Integer value out of range")
    msg = f"can not serialize {_name(value)!r} object"
    if hasattr(value, "__array__"):
        msg += ": send it as a numpy array (numpy.asarray)"
    elif hasattr(value, "__arrow_c_stream__"):
        msg += ": send it as a pyarrow table (pyarrow.table)"
    return TypeError(msg)


def _name(value: Any) -> str:
    return type(value).__name__


# ---- from the peer ----


def decode(
    body: memoryview | bytes, buffers: Sequence[memoryview] = (), *, untrusted: bool = False
) -> Any:
    """Unpack one value; ValueError if it is none, or if numpy or pyarrow is needed and missing.

    The body is copied as it is read. ``bytes`` are copied out of their buffer; everything else
    that has one is a read-only view, and keeps the memoryview that it was given. Each buffer
    belongs to exactly one value. With ``untrusted``, for buffers that are copies of what a peer
    sent whom we don't trust, also the offsets within Arrow data are checked.
    """
    decoder = _Decoder(buffers, untrusted=untrusted)
    try:
        value = msgpack.unpackb(body, strict_map_key=False, ext_hook=decoder.value)
    except ValueError:
        raise
    except (TypeError, OverflowError, RecursionError) as error:  # such as an array as a key
        raise ValueError(str(error)) from error
    if decoder.left:
        msg = f"{decoder.left} buffers of a message belong to no value"
        raise ValueError(msg)
    return value


class _Decoder:
    """The buffers of one message, as they are used."""

    def __init__(self, buffers: Sequence[memoryview], *, untrusted: bool) -> None:
        self._buffers: list[memoryview | None] = list(buffers)
        self._untrusted = untrusted
        self.left = len(self._buffers)

    def value(self, code: int, data: bytes) -> Any:
        """The value that an extension of the body stands for."""
        if code != EXT_CODE:
            return msgpack.ExtType(code, data)
        described = msgpack.unpackb(data, strict_map_key=False)
        if type(described) is not list or len(described) < 2:
            raise ValueError(_DAMAGED)
        kind, where, *beside = described
        if type(kind) is not int or type(where) not in {int, bytes}:
            raise ValueError(_DAMAGED)
        memory: memoryview | bytes = where if type(where) is bytes else self._take(where)
        if kind == _BYTES and not beside:
            return _bytes(memory)
        if kind == _BUFFER and not beside:
            return Buffer(memory)
        if kind == _VIEW and len(beside) in {0, 2}:
            return _view(memory, *beside)
        if kind in {_ARRAY, _SCALAR} and len(beside) == 3:
            return _array(kind, memory, *beside)
        if kind == _ARROW and len(beside) == 2:
            return self._arrow(memory, *beside)
        raise ValueError(_DAMAGED)

    def _take(self, number: int) -> memoryview:
        """A buffer, once: copying the same one out over and over would take memory without end."""
        buffer = self._buffers[number] if 0 <= number < len(self._buffers) else None
        if buffer is None:
            msg = f"a value has buffer {number}, which the message has not, or no more"
            raise ValueError(msg)
        self._buffers[number] = None
        self.left -= 1
        return buffer.toreadonly()

    def _arrow(self, memory: memoryview | bytes, which: Any, heads: Any) -> Any:
        try:
            from . import tables
        except ImportError as error:
            raise _missing("an Arrow value", "pyarrow", "arrow", error) from error
        return tables.make(which, heads, memory, untrusted=self._untrusted)


def _bytes(memory: memoryview | bytes) -> bytes:
    owner = memory.obj if isinstance(memory, memoryview) else memory
    if type(owner) is bytes and len(owner) == len(memory):
        return owner  # it was copied before, by the transport
    return bytes(memory)


def _view(memory: memoryview | bytes, code: Any = "B", shape: Any = None) -> memoryview:
    view = memoryview(memory)
    if shape is None:
        return view
    if code not in _FORMATS or type(shape) is not list:
        raise ValueError(_DAMAGED)
    try:
        items = view.cast(code)
        return items if list(items.shape or ()) == shape else view.cast(code, shape)
    except TypeError as error:
        raise ValueError(f"a memoryview is described wrongly: {error}") from error


def _array(kind: int, memory: memoryview | bytes, dtype: Any, shape: Any, fortran: Any) -> Any:
    try:
        from . import arrays
    except ImportError as error:
        raise _missing("a numpy array", "numpy", "numpy", error) from error
    array = arrays.make_array(dtype, shape, fortran, memory)
    if kind == _ARRAY:
        return array
    if array.ndim or array.nbytes >= LARGE:
        raise ValueError(_DAMAGED)
    return array[()]


def _missing(what: str, module: str, extra: str, error: ImportError) -> ValueError:
    return ValueError(
        f"{what} came, and {module} can't be imported here ({error}): pip install 'shmrpc[{extra}]'"
    )
