"""Values to bodies and buffers and back: what arrives, what is copied, what is refused."""

import array
import collections
import contextlib
import gc
import mmap
import struct
import subprocess
import sys
import weakref
from typing import NamedTuple

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shmrpc import values
from shmrpc._native import ffi
from shmrpc.buffers import Buffer, Unwritten
from shmrpc.values import EXT_CODE, LARGE, NotPlain, decode, encode, may_hold_large, packer, unpack

SMALL = 64  # what counts as large where that is to be reached by nested values of any kind
relaxed = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def no_leaks():
    """Functions alone are tested here: nothing is open that might stay so."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(values, "LARGE", SMALL)


def transport(buffers):
    """What a peer would get: memory of its own, and read-only."""
    arrived = []
    for source in buffers:
        if isinstance(source, Unwritten):
            memory = bytearray(source.nbytes)
            source.write(memoryview(memory))
        else:
            assert source.format == "B"
            assert source.ndim == 1
            assert source.c_contiguous
            memory = bytearray(source)
        assert memory
        arrived.append(memoryview(memory))
    return arrived


def round_trip(value, **options):
    body, buffers = encode(value)
    return decode(body, transport(buffers), **options)


def address_of(view):
    """Where its first byte lies."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


# ---- bytes, and views of them ----


def expected(value):
    """What a value is once it has arrived."""
    if isinstance(value, (list, tuple)):
        return [expected(item) for item in value]
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    if isinstance(value, (bytearray, memoryview)):
        large = memoryview(value).nbytes >= values.LARGE
        return (memoryview, bytes(value)) if large else (bytes, bytes(value))
    if isinstance(value, Buffer):
        return (Buffer, bytes(value))
    return (type(value), value)


def arrived(value):
    if isinstance(value, list):
        return [arrived(item) for item in value]
    if isinstance(value, dict):
        return {key: arrived(item) for key, item in value.items()}
    if isinstance(value, memoryview):
        assert value.readonly
    if isinstance(value, (memoryview, Buffer)):
        return (type(value), bytes(value))
    return (type(value), value)


memories = st.binary(max_size=3 * SMALL)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | memories
    | memories.map(bytearray)
    | memories.map(memoryview)
    | memories.map(Buffer)
)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(0, 99) | memories, inner)
    ),
    max_leaves=30,
)


@pytest.mark.usefixtures("small")
@given(nested)
@relaxed
@example(b"x" * SMALL)
@example([{"a": (b"x" * SMALL, bytearray(SMALL), [memoryview(bytes(SMALL))])}])
def test_nested_values_arrive(value):
    body, buffers = encode(value)
    assert len(body) < SMALL or not isinstance(value, (bytes, bytearray))
    assert arrived(decode(body, transport(buffers))) == expected(value)


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, LARGE + 1, 70_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, Buffer, memoryview])
def test_large_memory_goes_beside_and_is_not_copied(kind, size):
    data = bytearray(b"x" * size)
    value = data if kind is bytearray else kind(data)
    body, buffers = encode([1, {"data": value}])
    if size < LARGE:
        assert not buffers
    else:
        assert len(body) < 50
        [source] = buffers
        assert address_of(source) == address_of(value.view if kind is Buffer else value)
    _, items = decode(body, transport(buffers))
    if kind in {bytes, Buffer}:
        assert type(items["data"]) is kind
    assert bytes(items["data"]) == bytes(data)


def test_what_arrives_lies_in_the_buffer_that_came():
    body, buffers = encode([memoryview(b"v" * LARGE), Buffer(b"b" * LARGE), b"c" * LARGE])
    came = transport(buffers)
    view, buffer, copy = decode(body, came)
    for memory in came:
        memory[0] = ord("!")
    assert bytes(view[:2]) == b"!v"
    assert bytes(buffer.view[:2]) == b"!b"
    assert copy == b"c" * LARGE


def test_bytes_that_the_transport_has_copied_are_not_copied_again():
    body, _ = encode(b"x" * LARGE)
    memory = b"x" * LARGE
    assert decode(body, [memoryview(memory)]) is memory


def test_memory_is_pinned_as_long_as_there_is_a_view_of_it():
    class Block(bytearray):
        """Something that can be watched."""

    body, _ = encode([memoryview(bytes(LARGE))])
    block = Block(LARGE)
    gone = weakref.ref(block)
    [view] = decode(body, [memoryview(block)])
    part = view[5:10]
    del block, view
    assert gone() is not None
    part.release()
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("code", list("bBhHiIlLqQfd"))
def test_memoryviews_keep_their_items_and_shape(code):
    numbers = array.array(code, range(100)) * (LARGE // 100 + 1)
    view = memoryview(numbers)
    for each in (view, view.cast("B").cast(code, [20, len(numbers) // 20])):
        came = round_trip(each)
        assert (came.format, came.shape, came.tolist()) == (code, each.shape, each.tolist())


def test_other_memory_arrives_as_views():
    with mmap.mmap(-1, LARGE) as mapping:
        mapping[:3] = b"abc"
        assert bytes(round_trip(mapping)[:3]) == b"abc"
    assert round_trip(array.array("d", [1.5, 2.5])).tolist() == [1.5, 2.5]
    assert round_trip(array.array("d")).tolist() == []


def test_what_is_not_contiguous_is_copied():
    every_other = memoryview(bytes(range(256)) * (LARGE // 64))[::2]
    assert round_trip(every_other) == every_other
    assert round_trip([every_other[:10]]) == [bytes(range(0, 20, 2))]


def test_subclasses_are_what_msgpack_takes_them_for():
    class Name(str):
        __slots__ = ()

    class Point(NamedTuple):
        x: str
        y: bytes

    value = collections.OrderedDict(a=Point(Name("n"), b"x" * LARGE), b=msgpack.ExtType(5, b"e"))
    came = round_trip(value)
    assert came == {"a": ["n", b"x" * LARGE], "b": msgpack.ExtType(5, b"e")}


def test_a_buffer_wraps_and_releases():
    data = bytearray(b"abc")
    with Buffer(data) as buffer:
        assert (len(buffer), buffer.nbytes, bytes(buffer)) == (3, 3, b"abc")
        data[0] = ord("x")
        assert bytes(buffer.view) == b"xbc"
        if sys.version_info >= (3, 12):
            assert bytes(memoryview(buffer)) == b"xbc"
    data.append(0)  # nobody exports it any more
    with pytest.raises(ValueError, match="released"):
        buffer.view  # noqa: B018
    assert "released" in repr(buffer)
    with pytest.raises(TypeError):
        Buffer("text")
    with pytest.raises(ValueError, match="contiguous"):
        Buffer(memoryview(b"abcd")[::2])


# ---- what needs no buffers ----


def test_the_packer_of_plain_values_is_msgpack_and_refuses_the_rest():
    pack = packer()
    plain = [None, True, 1, 2.5, "text", b"bytes", bytearray(b"x"), [1, (2,)], {"k": 3}]
    assert pack(plain) == msgpack.packb(plain)
    assert unpack(pack([msgpack.ExtType(5, b"x")])) == [msgpack.ExtType(5, b"x")]
    [buffer] = unpack(pack([Buffer(b"few bytes")]))
    assert bytes(buffer) == b"few bytes"
    with pytest.raises(ValueError):
        unpack(encode([Buffer(bytes(LARGE))])[0])
    for value in (Buffer(bytes(LARGE)), array.array("b", bytes(LARGE))):
        with pytest.raises(NotPlain):
            pack([value])
        pack = packer()
    for value in ({1, 2}, object(), 2**64):
        with pytest.raises((TypeError, OverflowError)) as caught:
            pack([value])
        assert not isinstance(caught.value, NotPlain)
        with pytest.raises(caught.type, match=str(caught.value)):
            encode([value])
        pack = packer()


@pytest.mark.parametrize(
    "size", [LARGE, LARGE + 1, 65_535, 65_536, 1 << 20, pytest.param(40 << 20, id="40M")]
)
def test_large_bytes_are_seen_in_a_packed_body(size):
    for value in ([b"x" * size], [1, {"k": bytearray(size)}], ["y" * 100_000, b"x" * size]):
        assert may_hold_large(msgpack.packb(value))


def test_where_there_are_none_none_are_seen():
    for value in (
        [b"x" * (LARGE - 1)],
        [b"x" * 1000] * 1000,
        [*range(100)] * 1000,
        ["text \u00e4"] * 100_000,
        "x" * (1 << 20),
    ):
        assert not may_hold_large(msgpack.packb(value))


def test_a_value_in_itself_is_refused():
    circle = []
    circle.append([circle])
    with pytest.raises(ValueError, match="recursion"):
        encode(circle)
    deep = inner = []
    for _ in range(600):
        inner.append([])
        inner = inner[0]
    inner.append(bytearray(LARGE))
    with pytest.raises(ValueError, match="recursion"):
        encode(deep)


def test_plain_values_import_neither_numpy_nor_pyarrow():
    code = """
import sys
from shmrpc import Buffer
from shmrpc.values import decode, encode
body, buffers = encode([1, b"x" * 100000, Buffer(b"x"), {"a": memoryview(b"y" * 100000)}])
decode(body, buffers)
print({"numpy", "pyarrow"} & sys.modules.keys())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ---- hostile bytes ----


def extension(kind, described, where):
    """The body of one extension: in buffer ``where``, or of these bytes."""
    if not isinstance(where, bytes):
        kind, where = kind | 0x80, struct.pack("<I", where)
    described = msgpack.packb(described) if described is not None else b""
    data = struct.pack("<BI", kind, len(described)) + described + where
    return msgpack.packb(msgpack.ExtType(EXT_CODE, data))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\xc1")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x80\0\0\0")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x80\0\0\0\0")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x80\0\0\0\0\0\0\0")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x81\1\0\0\0\xc1\0\0\0\0")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x00\xff\xff\xff\xff")),
        msgpack.packb(msgpack.ExtType(EXT_CODE, b"\x00\1\0\0\0")),
        extension(0, None, 1),
        extension(0, None, 2**32 - 1),
        extension(0, None, 0) + b"\0",
        extension(0, [], 0),
        extension(2, [], 0),
        extension(1, [], 0),
        extension(1, 1, 0),
        extension(1, {"a": 1, "b": 2}, 0),
        extension(1, ["B"], 0),
        extension(1, ["O", [8]], 0),
        extension(1, ["P", [1]], 0),
        extension(1, [["d"], [1]], 0),
        extension(1, ["d", [2]], 0),
        extension(1, ["d", [-1]], 0),
        extension(1, ["d", [2**62, 2**62]], 0),
        extension(1, ["d", ["x", 1]], 0),
        extension(1, ["d", 1], 0),
        extension(1, ["d", [1]], b"123"),
        extension(3, None, 0),
        extension(3, [], 0),
        extension(4, ["<i4", [2], False], 0),
        extension(5, None, 0),
        extension(5, [0], 0),
        extension(6, None, 0),
        extension(0x7F, None, 0),
    ],
)
def test_what_is_described_wrongly_is_refused(body):
    with pytest.raises(ValueError):
        decode(body, [memoryview(bytes(8))])


def test_each_buffer_is_used_once():
    reference = msgpack.unpackb(extension(0, None, 0))
    memory = memoryview(bytes(LARGE))
    with pytest.raises(ValueError, match="buffer 0"):
        decode(msgpack.packb([reference, reference]), [memory])
    with pytest.raises(ValueError, match="1 buffers of a message belong to no value"):
        decode(msgpack.packb([reference]), [memory, memory])
    with pytest.raises(ValueError, match="buffer 0"):
        decode(msgpack.packb([reference]), [])


def damaged(bodies):
    """One of these bodies, with some of its bytes replaced, cut out or put in."""

    @st.composite
    def damage(draw):
        body, sizes = draw(st.sampled_from(bodies))
        body = bytearray(body)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(body)))
            length = draw(st.integers(0, 3))
            body[at : at + length] = draw(st.binary(max_size=3))
        return bytes(body), sizes

    return damage()


def survives(case):
    """Decoding gives a value or ValueError; looking at all of the value crashes nothing."""
    body, sizes = case
    try:
        value = decode(body, [memoryview(bytes(size)) for size in sizes], untrusted=True)
    except ValueError:
        return
    with contextlib.suppress(Exception):  # such as dates that have no name
        repr(value)


def bodies_of(*cases):
    packed = [encode(case) for case in cases]
    return [(body, [source.nbytes for source in buffers]) for body, buffers in packed]


plain_bodies = bodies_of(
    [1, "text", {"k": b"x" * LARGE}],
    [memoryview(array.array("d", [1.0] * LARGE)), Buffer(b"x"), bytearray(LARGE)],
)


@given(damaged(plain_bodies))
@relaxed
def test_damaged_bodies_are_refused(case):
    survives(case)


@given(st.binary(max_size=200), st.lists(st.integers(0, 100), max_size=3))
@relaxed
def test_any_bytes_are_refused_or_decoded(data, sizes):
    survives((data, sizes))
    survives((msgpack.packb(msgpack.ExtType(EXT_CODE, data)), sizes))
