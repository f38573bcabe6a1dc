"""numpy arrays as a description and flat memory, and back. Imported when the first one appears.

What is described came from a peer: nothing of it is used before it was checked, and no description
makes a dtype whose items are, or hold, Python objects.
"""

from __future__ import annotations

import math
import re
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgpack
import numpy as np

from .buffers import Source, Unwritten

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Known",
    "freeze",
    "has_plain_memory",
    "is_number",
    "memory_of",
    "parse",
    "plan",
    "split",
    "view",
]

_U1 = np.dtype(np.uint8)
_KINDS = frozenset("biufcmMSUV")  # neither objects nor numpy's variable-length strings
_NUMBERS = frozenset("biufc")
_PLAIN = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[a-zA-Z]{1,2}\])?)")
_DEPTH_MAX = 16  # of dtypes in dtypes
_ITEM_MAX = 2**31 - 1  # numpy's own limit
_EMPTY_ITEMS_MAX = 1 << 24  # items without bytes: the message's length does not bound them

# What has been described and what has been parsed: the next array is often as the last.
_KNOWN_MAX = 512
_KNOWN_BYTES_MAX = 256
_described: dict[tuple[Any, tuple[int, ...], bool], bytes] = {}
Known: TypeAlias = tuple[Any, tuple[int, ...], Literal["C", "F"], int]
_parsed: dict[bytes, Known] = {}


# ---- dtypes ----


def _describe(dtype: Any, depth: int = 0) -> Any:
    """A dtype as str, list and dict. TypeError for one whose items can't be copied as bytes."""
    if dtype.hasobject or dtype.kind not in _KINDS:
        msg = (
            f"a numpy array of dtype {dtype} holds Python objects, not their bytes: "
            "convert it (astype), or send a list"
        )
        raise TypeError(msg)
    if depth > _DEPTH_MAX:
        msg = f"a numpy dtype is nested deeper than {_DEPTH_MAX} levels"
        raise TypeError(msg)
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe(base, depth + 1), list(shape)]
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        return {
            "names": list(dtype.names),
            "formats": [_describe(field[0], depth + 1) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
        }
    text: str = dtype.str
    if np.dtype(text) != dtype:
        msg = (
            f"a numpy array of dtype {dtype} can't be described to the peer: send a view "
            f"of it as one of numpy's own dtypes, such as .view('u{dtype.itemsize}')"
        )
        raise TypeError(msg)
    return text


def _parse(description: Any, depth: int = 0) -> Any:
    """The dtype that was described; ValueError if none was."""
    if type(description) is str:
        return _parse_plain(description)
    if depth <= _DEPTH_MAX:
        if type(description) is list and len(description) == 2:
            return _parse_subarray(description[0], description[1], depth)
        if type(description) is dict:
            return _parse_fields(description, depth)
    msg = f"{str(description)[:80]!r} describes no numpy dtype"
    raise ValueError(msg)


def _parse_plain(text: str) -> Any:
    try:
        if not _PLAIN.fullmatch(text):
            raise ValueError
        return np.dtype(text)
    except (TypeError, ValueError):
        msg = f"{text[:80]!r} is no numpy dtype of items without objects"
        raise ValueError(msg) from None


def _parse_subarray(base: Any, shape: Any, depth: int) -> Any:
    dtype = _parse(base, depth + 1)
    if not _is_shape(shape) or math.prod(shape) * max(dtype.itemsize, 1) > _ITEM_MAX:
        msg = "the shape of a numpy dtype's subarray is none"
        raise ValueError(msg)
    return np.dtype((dtype, tuple(shape)))


def _parse_fields(description: dict[Any, Any], depth: int) -> Any:
    lists = [description.get(key) for key in ("names", "formats", "offsets", "titles")]
    itemsize = description.get("itemsize")
    msg = "the fields of a numpy dtype are described wrongly"
    if len(description) != 5 or not all(type(each) is list for each in lists):
        raise ValueError(msg)
    names, formats, offsets, titles = (list(each or ()) for each in lists)
    if (
        not len(names) == len(formats) == len(offsets) == len(titles)
        or type(itemsize) is not int
        or not 0 <= itemsize <= _ITEM_MAX
        or not all(type(name) is str for name in names)
        or not all(type(offset) is int and 0 <= offset <= itemsize for offset in offsets)
        or not all(title is None or type(title) is str for title in titles)
    ):
        raise ValueError(msg)
    dtypes = [_parse(each, depth + 1) for each in formats]
    fields = {"names": names, "formats": dtypes, "offsets": offsets, "itemsize": itemsize}
    if any(title is not None for title in titles):
        fields["titles"] = titles
    try:
        return np.dtype(fields)  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{msg}: {error}") from error


# ---- arrays ----


def is_number(scalar: Any) -> bool:
    """Whether ``item()`` of a numpy scalar is a Python int, float or bool."""
    dtype = scalar.dtype
    return dtype.kind in "biu" or (dtype.kind == "f" and dtype.itemsize <= 8)


def split(value: Any) -> tuple[bytes, Any, bool]:
    """An array (or scalar) as its packed description, itself, and whether in Fortran's order.

    TypeError if its items can't be sent.
    """
    if type(value) is not np.ndarray:
        if isinstance(value, np.ma.MaskedArray):
            msg = "a masked numpy array can't be sent as a whole: send its .data and its .mask"
            raise TypeError(msg)
        value = np.asarray(value)
    fortran = value.flags.fnc
    key = (value.dtype, value.shape, fortran)
    described = _described.get(key)
    if described is None:
        described = msgpack.packb([_describe(value.dtype), value.shape, fortran])
        if len(_described) >= _KNOWN_MAX:
            _described.clear()
        if len(described) <= _KNOWN_BYTES_MAX:
            _described[key] = described
    return described, value, fortran


def has_plain_memory(array: Any) -> bool:
    """Whether it has the buffer protocol as it is, in one piece."""
    return array.dtype.kind in _NUMBERS and bool(array.flags.c_contiguous)


def memory_of(array: Any) -> Source:
    """Where its items are. Those in neither C's nor Fortran's order are copied when written."""
    if not array.flags.forc:
        return Unwritten(array.nbytes, lambda target: _write(array, target))
    rows = array if array.flags.c_contiguous else array.T
    memory: memoryview = rows.reshape(-1).view(_U1).data
    return memory


def _write(array: Any, target: memoryview) -> None:
    np.copyto(np.ndarray(array.shape, array.dtype, target), array)


def parse(described: bytes) -> Known:
    """What was described, for ``view``; ValueError if no array was."""
    return _parsed.get(described) or _parse_array(described)


def view(known: Known, memory: memoryview | bytes) -> Any:
    """A read-only array over this memory, which it keeps; ValueError if it does not fit."""
    dtype, shape, order, nbytes = known
    if nbytes != len(memory):
        msg = f"a numpy array of shape {shape} and dtype {dtype} can't lie in {len(memory)} bytes"
        raise ValueError(msg)
    if not nbytes:
        return np.ndarray(shape, dtype, b"")
    # Not by np.ndarray(): that would know what the memoryview is a view of, which may be writable,
    # and could be made writable itself.
    array = np.frombuffer(memory, dtype)
    return array if len(shape) == 1 else array.reshape(shape, order=order)


def _parse_array(described: bytes) -> Known:
    parts = msgpack.unpackb(described, strict_map_key=False)
    if type(parts) is not list or len(parts) != 3:
        msg = "a numpy array is described wrongly"
        raise ValueError(msg)
    description, shape, fortran = parts
    dtype = _parse(description)
    if not _is_shape(shape) or type(fortran) is not bool:
        msg = "the shape of a numpy array is none"
        raise ValueError(msg)
    count = math.prod(shape)
    # What has no bytes is bounded by no length.
    if math.prod(filter(None, shape)) >= 1 << 62 or (
        not dtype.itemsize and count > _EMPTY_ITEMS_MAX
    ):
        msg = f"the shape of a numpy array is too big: {shape}"
        raise ValueError(msg)
    known: Known = (dtype, tuple(shape), "F" if fortran else "C", count * dtype.itemsize)
    if len(_parsed) >= _KNOWN_MAX:
        _parsed.clear()
    if len(described) <= _KNOWN_BYTES_MAX:
        _parsed[described] = known
    return known


# ---- arrays in memory that was lent ----

_lent: dict[int, weakref.ref[Any]] = {}  # by id


def plan(shape: Any, dtype: Any) -> tuple[int, Callable[[memoryview], Any]]:
    """How many bytes an array takes, and what makes a writable one over such memory.

    TypeError or ValueError for what is no shape, or no dtype that can be sent.
    """
    kind = np.dtype(dtype)
    _describe(kind)
    model = np.broadcast_to(np.zeros((), kind), shape)
    if not model.nbytes:
        return 0, lambda _: np.empty(model.shape, kind)

    def make(memory: memoryview) -> Any:
        array = np.ndarray(model.shape, kind, memory)
        key = id(array)
        _lent[key] = weakref.ref(array, lambda _: _lent.pop(key, None))
        return array

    return model.nbytes, make


def freeze(source: Any) -> None:
    """Make the array that ``plan`` made, and this is a view of, read-only: it is being sent."""
    owner: Any = source if isinstance(source, np.ndarray) else source.obj
    while isinstance(owner, np.ndarray):
        known = _lent.get(id(owner))
        if known is not None and owner is known():
            cast("Any", owner).flags.writeable = False
            return
        owner = owner.base


def _is_shape(shape: Any) -> bool:
    return (
        type(shape) is list
        and len(shape) <= 64
        and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    )
