"""numpy arrays as a description and flat memory, and back. Imported when the first one appears.

What is described came from a peer: nothing of it is used before it was checked, and no description
makes a dtype whose items are, or hold, Python objects.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from .buffers import Source, Unwritten

__all__ = ["describe", "is_number", "make_array", "parse", "split"]

_U1 = np.dtype(np.uint8)
_KINDS = frozenset("biufcmMSUV")  # neither objects nor numpy's variable-length strings
_PLAIN = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[a-zA-Z]{1,2}\])?)")
_DEPTH_MAX = 16  # of dtypes in dtypes
_ITEM_MAX = 2**31 - 1  # numpy's own limit
_EMPTY_ITEMS_MAX = 1 << 24  # items without bytes: the message's length does not bound them
_KNOWN_MAX = 512

# By dtype and by text, for those without fields.
_texts: dict[Any, str] = {}
_dtypes: dict[str, Any] = {}


# ---- dtypes ----


def describe(dtype: Any, depth: int = 0) -> Any:
    """A dtype as str, list and dict. TypeError for one whose items can't be copied as bytes."""
    text = _texts.get(dtype)
    if text is not None:
        return text
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
        return [describe(base, depth + 1), list(shape)]
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        return {
            "names": list(dtype.names),
            "formats": [describe(field[0], depth + 1) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
        }
    text = dtype.str
    if np.dtype(text) != dtype:
        msg = (
            f"a numpy array of dtype {dtype} can't be described to the peer: send a view "
            f"of it as one of numpy's own dtypes, such as .view('u{dtype.itemsize}')"
        )
        raise TypeError(msg)
    if len(_texts) >= _KNOWN_MAX:
        _texts.clear()
    _texts[dtype] = text
    return text


def parse(description: Any, depth: int = 0) -> Any:
    """The dtype that was described; ValueError if none was."""
    if type(description) is str:
        dtype = _dtypes.get(description)
        if dtype is None:
            dtype = _parse_plain(description)
        return dtype
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
        dtype = np.dtype(text)
    except (TypeError, ValueError):
        msg = f"{text[:80]!r} is no numpy dtype of items without objects"
        raise ValueError(msg) from None
    if len(_dtypes) >= _KNOWN_MAX:
        _dtypes.clear()
    _dtypes[text] = dtype
    return dtype


def _parse_subarray(base: Any, shape: Any, depth: int) -> Any:
    dtype = parse(base, depth + 1)
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
    dtypes = [parse(each, depth + 1) for each in formats]
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


def split(value: Any) -> tuple[list[Any], int, Source]:
    """An array (or scalar) as [dtype, shape, Fortran order], its bytes, and where they are.

    C and Fortran order are taken as they are; others are copied, when their memory is there.
    """
    if isinstance(value, np.ma.MaskedArray):
        msg = "a masked numpy array can't be sent as a whole: send its .data and its .mask"
        raise TypeError(msg)
    array = np.asarray(value)
    fortran = array.flags.fnc
    beside = [describe(array.dtype), list(array.shape), fortran]
    if not array.nbytes:
        return beside, 0, memoryview(b"")
    if not array.flags.forc:
        return beside, array.nbytes, Unwritten(array.nbytes, lambda target: _write(array, target))
    rows = (array.T if fortran else array).reshape(-1)
    return beside, array.nbytes, rows.view(_U1).data


def _write(array: Any, target: memoryview) -> None:
    np.copyto(np.ndarray(array.shape, array.dtype, target), array)


def make_array(description: Any, shape: Any, fortran: Any, memory: memoryview | bytes) -> Any:
    """A read-only array over this memory, which it keeps; ValueError if it does not fit."""
    dtype = parse(description)
    nbytes = len(memory)
    if not _is_shape(shape) or type(fortran) is not bool:
        msg = "the shape of a numpy array is none"
        raise ValueError(msg)
    count = math.prod(shape)
    if count * dtype.itemsize != nbytes or (not dtype.itemsize and count > _EMPTY_ITEMS_MAX):
        msg = f"a numpy array of shape {shape} and dtype {dtype} can't lie in {nbytes} bytes"
        raise ValueError(msg)
    # Made over a memoryview, an array would know what that is a view of, which may be writable,
    # and could be made so. Made by frombuffer, it knows the memoryview.
    under = np.frombuffer(memory, _U1) if nbytes else b""
    try:
        return np.ndarray(tuple(shape), dtype, under, order="F" if fortran else "C")
    except TypeError as error:
        raise ValueError(str(error)) from error


def _is_shape(shape: Any) -> bool:
    return (
        type(shape) is list
        and len(shape) <= 64
        and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    )
