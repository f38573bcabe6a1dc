"""Values with large or typed memory in them: arrays, tables, views, long bytes.

``encode`` makes of a value a body and a list of buffers, which are views of what the caller passed,
never copies; ``decode`` makes of both the value. The body is msgpack. Where a value of another kind
than msgpack's stands in it, an ExtType says which, and has its bytes if they are few, else the
number of the buffer that they are: ``_HEADER``, what describes it, then the bytes or the number.

Most messages have no buffers. ``packer`` packs those as fast as msgpack, and raises ``NotPlain`` at
a value that wants one; ``unpack`` is its counterpart. Long bytes it packs as msgpack does: whoever
has a long body asks ``may_hold_large``, and then had better ``encode``.

Neither numpy nor pyarrow is imported unless a value of theirs is sent or received.
"""

from __future__ import annotations

import functools
import itertools
import struct
import sys
from typing import TYPE_CHECKING, Any

import msgpack

from .buffers import Buffer, Source, Unwritten, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "EXT_CODE",
    "LARGE",
    "NOT_PLAIN",
    "Encoder",
    "NotPlain",
    "decode",
    "encode",
    "may_hold_large",
    "packer",
    "unpack",
    "unpack_extension",
]

EXT_CODE = 83  # of msgpack's extension types for applications
LARGE = 16 << 10  # bytes from which on memory travels beside the body

_BYTES, _VIEW, _BUFFER, _ARRAY, _SCALAR, _ARROW = range(6)
_BESIDE = 0x80  # added to the kind: it is the number of a buffer that ends the extension
_HEADER = struct.Struct("<BI")  # the kind, the length of what describes the value
_NUMBER = struct.Struct("<I")

_FORMATS = frozenset("cbBhHiIlLqQnNefd?")  # of memoryviews: the items that ``cast`` knows
_DEPTH_MAX = 512  # msgpack's own limit
_LEAVES = frozenset((int, float, str, bool, type(None)))
_DAMAGED = "a value in the message is described wrongly"

_new = tuple.__new__  # an ExtType without its checks, which take longer than all else here


class NotPlain(TypeError):
    """A value is one of those that ``encode`` is for."""


# What ``packer`` raises for those; the other one is msgpack's, for a short memoryview with gaps.
NOT_PLAIN = (NotPlain, BufferError)


@functools.cache
def _arrays() -> Any:
    """What knows numpy."""
    from . import arrays

    return arrays


@functools.cache
def _tables() -> Any:
    """What knows pyarrow."""
    from . import tables

    return tables


# ---- what needs no buffers ----


def packer() -> Callable[[Any], bytes]:
    """A new msgpack packer of values without buffers; ``NotPlain`` if one needs any."""
    pack: Callable[[Any], bytes] = msgpack.Packer(default=_PLAIN.default).pack
    return pack


def unpack(body: memoryview | bytes) -> Any:
    """Unpack one value without buffers. ValueError, or TypeError, if there is none."""
    return msgpack.unpackb(body, strict_map_key=False, ext_hook=unpack_extension)


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
    encoder = _Collector()
    body: bytes = msgpack.Packer(default=encoder.default).pack(encoder.lift(value, 0))
    return body, encoder.buffers


class Encoder:
    """What makes ExtTypes of values, for messages without buffers."""

    def beside(self, _source: Any, size: int) -> int:
        """The number of a buffer that is to travel beside the body."""
        msg = f"{size} bytes don't travel in the body of a message"
        raise NotPlain(msg)

    def memory_of(self, array: Any) -> Any:
        """A numpy array as ``beside`` wants it."""
        return _arrays().memory_of(array)

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
                return self._extension(_BYTES, b"", len(value), memoryview(value))
        elif isinstance(value, bytearray):
            if len(value) >= LARGE:
                return self._extension(_VIEW, b"", len(value), memoryview(value))
        elif isinstance(value, memoryview):
            if value.nbytes >= LARGE:
                return self._memory(value)
            if not value.c_contiguous:
                return value.tobytes()
        return value

    def default(self, value: Any) -> Any:
        """What msgpack packs instead of a value that is none of its own."""
        numpy = sys.modules.get("numpy")  # absent: then the value is none of its
        if numpy is not None:
            if isinstance(value, getattr(numpy, "ndarray", ())):
                return self._array(_ARRAY, value)
            if isinstance(value, getattr(numpy, "generic", ())):
                return self._scalar(value)
        if isinstance(value, Buffer):
            return self._extension(_BUFFER, b"", len(value), value.view)
        if _is_arrow(value):
            return self._arrow(value)
        try:
            view = memoryview(value)
        except TypeError:
            raise _unpackable(value) from None
        return self._memory(view)

    def _array(self, kind: int, value: Any) -> Any:
        described, array, fortran = _arrays().split(value)
        size = array.nbytes
        if size >= LARGE:
            number = self.beside(self.memory_of(array), size)
            data = _head(kind | _BESIDE, described) + _NUMBER.pack(number)
        else:
            data = _head(kind, described) + array.tobytes("F" if fortran else "C")
        return _new(msgpack.ExtType, (EXT_CODE, data))

    def _scalar(self, value: Any) -> Any:
        # As a float64, which is a float: numbers arrive as Python's.
        return value.item() if _arrays().is_number(value) else self._array(_SCALAR, value)

    def _arrow(self, value: Any) -> Any:
        try:
            tables = _tables()
        except ImportError as error:  # too old
            raise TypeError(str(error)) from None
        which, heads, source = tables.split(value)
        return self._extension(_ARROW, msgpack.packb([which, heads]), source.nbytes, source)

    def _memory(self, view: memoryview) -> Any:
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        code = view.format.lstrip("@")
        typed = code in _FORMATS and (view.ndim == 1 or (view.ndim and view.nbytes))
        described = b""
        if typed and (code != "B" or view.ndim != 1):
            described = msgpack.packb([code, view.shape])
        return self._extension(_VIEW, described, view.nbytes, flat(view))

    def _extension(self, kind: int, described: bytes, size: int, source: Source) -> Any:
        if size >= LARGE:
            kind |= _BESIDE
            data = _NUMBER.pack(self.beside(source, size))
        elif isinstance(source, Unwritten):
            room = bytearray(size)
            source.write(memoryview(room))
            data = bytes(room)
        else:
            data = bytes(source)
        return _new(
            msgpack.ExtType, (EXT_CODE, _HEADER.pack(kind, len(described)) + described + data)
        )


class _Collector(Encoder):
    """The buffers of one message, as they are found."""

    def __init__(self) -> None:
        self.buffers: list[Source] = []

    def beside(self, source: Source, _size: int) -> int:
        self.buffers.append(source)
        return len(self.buffers) - 1


_PLAIN = Encoder()


@functools.lru_cache(maxsize=512)
def _head(kind: int, described: bytes) -> bytes:
    """What an extension begins with: the next array is often as the last."""
    return _HEADER.pack(kind, len(described)) + described


def _check_depth(depth: int) -> None:
    if depth >= _DEPTH_MAX:
        msg = "recursion limit exceeded"
        raise ValueError(msg)


def _is_arrow(value: Any) -> bool:
    pyarrow = sys.modules.get("pyarrow")
    names = ("Table", "RecordBatch", "Array", "ChunkedArray")
    return pyarrow is not None and isinstance(
        value, tuple(getattr(pyarrow, name, ()) for name in names)
    )


def _unpackable(value: Any) -> Exception:
    if isinstance(value, int):
        return OverflowError("Integer value out of range")
    msg = f"can not serialize {type(value).__name__!r} object"
    if hasattr(value, "__array__"):
        msg += ": send it as a numpy array (numpy.asarray)"
    elif hasattr(value, "__arrow_c_stream__"):
        msg += ": send it as a pyarrow table (pyarrow.table)"
    return TypeError(msg)


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
        start = 5 + data[1] if len(data) > 5 else 0  # of _HEADER, if it describes in a few bytes
        view = _views.get(data[:start])
        if view is None:
            return self._value(data)
        if data[0] & _BESIDE:
            return view(self._take(data[start:]))
        return view(data[start:])

    def _value(self, data: bytes) -> Any:
        if len(data) < _HEADER.size:
            raise ValueError(_DAMAGED)
        kind, size = _HEADER.unpack_from(data)
        start = _HEADER.size + size
        if start > len(data):
            raise ValueError(_DAMAGED)
        described = data[_HEADER.size : start]
        memory: memoryview | bytes = data[start:]
        if kind & _BESIDE:
            memory = self._take(data[start:])
            kind &= ~_BESIDE
        if kind == _ARRAY:
            return _array(data[:start], described, memory)
        if kind == _SCALAR:
            return _scalar(described, memory)
        if kind == _ARROW:
            return self._arrow(described, memory)
        if kind == _VIEW and described:
            return _view(memory, *_unpack_list(described, 2))
        if described or kind not in {_BYTES, _VIEW, _BUFFER}:
            raise ValueError(_DAMAGED)
        if kind == _BYTES:
            return _bytes(memory)
        return memoryview(memory) if kind == _VIEW else Buffer(memory)

    def _take(self, packed: bytes) -> memoryview:
        """A buffer, once: copying the same one out over and over would take memory without end."""
        if len(packed) != _NUMBER.size:
            raise ValueError(_DAMAGED)
        number: int = _NUMBER.unpack(packed)[0]
        buffers = self._buffers
        buffer = buffers[number] if number < len(buffers) else None
        if buffer is None:
            msg = f"a value has buffer {number}, which the message has not, or no more"
            raise ValueError(msg)
        buffers[number] = None
        self.left -= 1
        return buffer.toreadonly()

    def _arrow(self, described: bytes, memory: memoryview | bytes) -> Any:
        try:
            tables = _tables()
        except ImportError as error:
            raise _missing("an Arrow value", "pyarrow", "arrow", error) from error
        which, heads = _unpack_list(described, 2)
        return tables.make(which, heads, memory, untrusted=self._untrusted)


# How arrays begin, header and description, and what makes them of the rest: the next one is often
# as the last.
_VIEWS_MAX = 512
_HEAD_MAX = _HEADER.size + 255
_views: dict[bytes, Callable[[memoryview | bytes], Any]] = {}

unpack_extension = _Decoder((), untrusted=True).value
"""The ``ext_hook`` for messages without buffers, for who writes ``unpack`` out."""


def _unpack_list(described: bytes, length: int) -> list[Any]:
    items = msgpack.unpackb(described, strict_map_key=False)
    if type(items) is not list or len(items) != length:
        raise ValueError(_DAMAGED)
    return items


def _bytes(memory: memoryview | bytes) -> bytes:
    owner = memory.obj if isinstance(memory, memoryview) else memory
    if type(owner) is bytes and len(owner) == len(memory):
        return owner  # it was copied before, by the transport
    return bytes(memory)


def _view(memory: memoryview | bytes, code: Any, shape: Any) -> Any:
    if code not in _FORMATS or type(shape) is not list:
        raise ValueError(_DAMAGED)
    try:
        view = memoryview(memory).cast(code)
        if list(view.shape or ()) != shape:
            view = view.cast("B").cast(code, shape)
        return view
    except TypeError as error:
        raise ValueError(f"a memoryview is described wrongly: {error}") from error


def _array(head: bytes, described: bytes, memory: memoryview | bytes) -> Any:
    view = _described(described)
    if len(_views) >= _VIEWS_MAX:
        _views.clear()
    if len(head) <= _HEAD_MAX:
        _views[head] = view
    return view(memory)


def _described(described: bytes) -> Callable[[memoryview | bytes], Any]:
    try:
        arrays = _arrays()
    except ImportError as error:
        raise _missing("a numpy array", "numpy", "numpy", error) from error
    return functools.partial(arrays.view, arrays.parse(described))


def _scalar(described: bytes, memory: memoryview | bytes) -> Any:
    array = _described(described)(memory)
    if array.ndim or array.nbytes >= LARGE:
        raise ValueError(_DAMAGED)
    return array[()]


def _missing(what: str, module: str, extra: str, error: ImportError) -> ValueError:
    return ValueError(
        f"{what} came, and {module} can't be imported here ({error}): pip install 'shmrpc[{extra}]'"
    )
