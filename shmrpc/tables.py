"""pyarrow's tables, batches and arrays as an Arrow IPC stream whose bodies lie elsewhere.

Imported when the first one appears. The stream's metadata says where in the bodies each column
lies: it travels with the message and is copied before it is looked at; the bodies, which are the
columns' data, are one buffer and are not copied. A body is read where the stream would have it.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc

from .buffers import Unwritten

__all__ = ["KINDS", "make", "split"]

# Older ones run code that an extension type's metadata names (CVE-2023-47248).
_OLDEST = (14, 0, 1)
if tuple(int(part) for part in pa.__version__.split(".")[:3] if part.isdigit()) < _OLDEST:
    _msg = f"pyarrow {pa.__version__} is not safe to decode with: install 14.0.1 or newer"
    raise ImportError(_msg)

KINDS = (pa.Table, pa.RecordBatch, pa.Array, pa.ChunkedArray)
_TABLE, _BATCH, _ARRAY, _CHUNKED = range(4)

_CONTINUATION = 0xFFFF_FFFF
_PREFIX = struct.Struct("<II")  # before each message's metadata: the continuation, its length
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # kinds of messages


# ---- messages: the few fields of their metadata that are needed here ----


class _Message(NamedTuple):
    kind: int
    body_bytes: int
    compressed: bool


def _read_message(metadata: bytes) -> _Message:
    """Look into a message's flatbuffer. ValueError if there is nothing to be found."""
    try:
        message = _offset(metadata, 0)
        kind = _field(metadata, message, 1)
        header = _field(metadata, message, 2)
        length = _field(metadata, message, 3)
        if not kind or not header:
            raise ValueError
        number = _unpack("<B", metadata, kind)
        body_bytes = _unpack("<q", metadata, length) if length else 0
        records = _offset(metadata, header)
        if number == _DICTIONARY:
            data = _field(metadata, records, 1)
            if not data:
                raise ValueError
            records = _offset(metadata, data)
        compressed = number != _SCHEMA and bool(_field(metadata, records, 3))
    except (struct.error, ValueError):
        number, body_bytes, compressed = 0, 0, False
    if number not in {_SCHEMA, _DICTIONARY, _RECORDS} or body_bytes < 0:
        msg = "the metadata of an Arrow message is damaged"
        raise ValueError(msg)
    return _Message(number, body_bytes, compressed)


def _unpack(code: str, data: bytes, at: int) -> int:
    if at < 0:
        raise ValueError
    number: int = struct.unpack_from(code, data, at)[0]
    return number


def _offset(data: bytes, at: int) -> int:
    return at + _unpack("<I", data, at)


def _field(data: bytes, table: int, number: int) -> int:
    """Where a table has this field, 0 if it has not."""
    index = table - _unpack("<i", data, table)
    slot = 4 + 2 * number
    if slot >= _unpack("<H", data, index):
        return 0
    relative = _unpack("<H", data, index + slot)
    return table + relative if relative else 0


# ---- to the peer ----


class _Sink:
    """The file that pyarrow writes a stream to: bodies are remembered, not copied."""

    closed = False

    def __init__(self) -> None:
        self.heads = bytearray()  # metadata of the messages, each with its prefix
        self.pieces: list[memoryview] = []
        self.body_bytes = 0
        self._head = bytearray()
        self._left = 0  # of the body that is being written

    def write(self, piece: Any) -> int:
        view = memoryview(piece)
        size = view.nbytes
        while view:
            if self._left:
                part = view[: self._left]
                self.pieces.append(part)
                self._left -= part.nbytes
            else:
                part = view[: self._wanted()]
                self._head += part
                self._end_head()
            view = view[part.nbytes :]
        return size

    def _wanted(self) -> int:
        """How much of the prefix, or of the metadata after it, has not come."""
        have = len(self._head)
        if have < _PREFIX.size:
            return _PREFIX.size - have
        return _PREFIX.size + int(_PREFIX.unpack_from(self._head)[1]) - have

    def _end_head(self) -> None:
        if len(self._head) < _PREFIX.size or self._wanted():
            return
        head = bytes(self._head)
        self._head.clear()
        if len(head) == _PREFIX.size:
            return  # the end of the stream
        self._left = _read_message(head[_PREFIX.size :]).body_bytes
        self.body_bytes += self._left
        self.heads += head

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""


def split(value: Any) -> tuple[int, bytes, Unwritten]:
    """One of ``KINDS``: which, its metadata, and its data.

    Slices are sent as far as they reach. ValueError or TypeError for what Arrow can't send.
    """
    sink = _Sink()
    options = pa.ipc.IpcWriteOptions(
        metadata_version=pa.ipc.MetadataVersion.V5, use_legacy_format=False, compression=None
    )
    which = next(number for number, kind in enumerate(KINDS) if isinstance(value, kind))
    table = value
    if which == _ARRAY:
        table = pa.record_batch([value], names=[""])
    elif which == _CHUNKED:
        table = pa.table([value], names=[""])
    try:
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write(table)
    except pa.ArrowException as error:
        msg = f"Arrow can't send this {type(value).__name__}: {error}"
        raise ValueError(msg) from error
    pieces = sink.pieces

    def write(target: memoryview) -> None:
        with pa.FixedSizeBufferWriter(pa.py_buffer(target)) as writer:
            for piece in pieces:
                writer.write(piece)

    return which, bytes(sink.heads), Unwritten(sink.body_bytes, write)


# ---- from the peer ----


class _Stream:
    """The file that pyarrow reads a stream from: metadata from one place, bodies from another."""

    closed = False

    def __init__(self, heads: bytes, bodies: memoryview) -> None:
        self._parts: list[memoryview] = []
        at = body_at = 0
        while at < len(heads):
            size = self._metadata_bytes(heads, at)
            end = at + _PREFIX.size + size
            message = _read_message(heads[at + _PREFIX.size : end])
            if message.compressed:
                msg = "an Arrow message is compressed: there is no limit to what it would become"
                raise ValueError(msg)
            self._parts.append(memoryview(heads)[at:end])
            if message.body_bytes:
                self._parts.append(bodies[body_at : body_at + message.body_bytes])
            at = end
            body_at += message.body_bytes
        if body_at != bodies.nbytes:
            msg = f"Arrow messages speak of {body_at} bytes of data, and {bodies.nbytes} came"
            raise ValueError(msg)
        self._parts.reverse()

    @staticmethod
    def _metadata_bytes(heads: bytes, at: int) -> int:
        if len(heads) - at >= _PREFIX.size:
            continuation, size = _PREFIX.unpack_from(heads, at)
            if continuation == _CONTINUATION and 0 < size <= len(heads) - at - _PREFIX.size:
                return int(size)
        msg = "an Arrow message is damaged"
        raise ValueError(msg)

    def read(self, size: int = -1) -> memoryview | bytes:
        """The next bytes, never across the end of a part: nothing has to be joined."""
        if not self._parts or not size:
            return b""
        part = self._parts.pop()
        if 0 <= size < part.nbytes:
            self._parts.append(part[size:])
            part = part[:size]
        return part

    def close(self) -> None:
        """Nothing is open."""


def make(which: Any, heads: Any, bodies: memoryview | bytes, *, untrusted: bool) -> Any:
    """The value over this memory, which it keeps; ValueError if it is none.

    Its structure is checked in any case. Where it is ``untrusted``, also every offset in its
    data, in a time that grows with it: that is of use only if nobody writes to it any more.
    """
    if which not in range(len(KINDS)) or type(which) is not int or type(heads) is not bytes:
        msg = "an Arrow value is described wrongly"
        raise ValueError(msg)
    try:
        stream = _Stream(heads, memoryview(bodies))
        with pa.ipc.open_stream(pa.PythonFile(stream, mode="r")) as reader:
            value = _unwrap(which, reader.schema, list(reader))
        value.validate(full=untrusted)
        return value
    except MemoryError:
        raise
    except Exception as error:  # Arrow's are of all kinds
        msg = f"an Arrow value is damaged: {error}"
        raise ValueError(msg) from error


def _unwrap(which: int, schema: Any, batches: list[Any]) -> Any:
    if which in {_BATCH, _ARRAY} and len(batches) != 1:
        msg = f"one record batch was to come, and {len(batches)} did"
        raise ValueError(msg)
    if which in {_ARRAY, _CHUNKED} and len(schema) != 1:
        msg = f"an array came with {len(schema)} columns"
        raise ValueError(msg)
    if which == _BATCH:
        return batches[0]
    if which == _ARRAY:
        return batches[0].column(0)
    table = pa.Table.from_batches(batches, schema)
    return table if which == _TABLE else table.column(0)
