"""numpy arrays and pyarrow tables: what arrives, and what is refused."""

import contextlib
import gc
import struct
import subprocess
import sys
import weakref

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_values import (
    bodies_of,
    damaged,
    extension,
    no_leaks,
    round_trip,
    small,
    survives,
    transport,
)

from shmrpc.buffers import Unwritten
from shmrpc.values import LARGE, NotPlain, decode, encode, packer, unpack

__all__ = ["no_leaks", "small"]

relaxed = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def assert_same(came, sent):
    assert type(came) is np.ndarray
    assert not came.flags.writeable
    with pytest.raises(ValueError):
        came.flags.writeable = True
    assert (came.dtype, came.shape) == (sent.dtype, sent.shape)
    if sent.flags.forc:
        assert came.flags.f_contiguous == sent.flags.f_contiguous
    assert came.tobytes() == sent.tobytes() or sent.dtype.names is not None
    np.testing.assert_array_equal(came, np.asarray(sent))


# ---- numpy: round trips ----


dtypes = (
    hnp.scalar_dtypes()
    | hnp.unicode_string_dtypes(max_len=5)
    | hnp.byte_string_dtypes(max_len=5)
    | hnp.nested_dtypes(max_itemsize=100)
    | st.sampled_from(["<f2", ">f8", "<f16", ">c16", "<M8[25s]", "<m8", "|V7", "?", ">i2"])
)
indices = st.sampled_from(
    [..., np.s_[::2], np.s_[::-1], np.s_[1:], (..., 0), (..., np.s_[::2]), (None, ...)]
)


def any_array(dtype, shape, fill):
    """An array of any dtype, from bytes."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    items = (fill * (count // max(len(fill), 1) + 1))[:count].ljust(count, b"\0")
    if dtype.kind == "b":
        items = bytes(byte & 1 for byte in items)
    return np.ndarray(shape, dtype, bytearray(items))


@pytest.mark.usefixtures("small")
@given(
    dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0), indices, st.booleans(), st.data()
)
@relaxed
def test_arrays_of_any_dtype_shape_and_order_arrive(dtype, shape, index, fortran, data):
    if np.dtype(dtype).kind == "U":
        array = data.draw(hnp.arrays(dtype, shape))
    elif np.dtype(dtype).kind in "biufcmMSV" and np.dtype(dtype).names is None:
        array = any_array(dtype, shape, data.draw(st.binary(min_size=1, max_size=64)))
    else:
        array = np.zeros(shape, dtype)
    if fortran:
        array = np.asfortranarray(array).reshape(shape, order="F")
    with contextlib.suppress(IndexError):
        array = array[index]
    assert_same(round_trip([np.asarray(array)])[0], np.asarray(array))


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("a", "<i4"), ("b", ">f8", (2, 3)), ("c", "U3"), ("d", [("x", "M8[ns]")])]),
        np.dtype([("a", "u1"), ("b", "f8")], align=True),
        np.dtype({"names": ["x", "y"], "formats": ["i2", "i2"], "offsets": [6, 0], "itemsize": 9}),
        np.dtype({"names": ["lo", "all"], "formats": ["u1", "u4"], "offsets": [0, 0]}),
        np.dtype([(("a title", "name"), "i4"), ("other", "i4")]),
        np.dtype([("", "i4"), ("", "f4")]),
    ],
    ids=["nested", "aligned", "offsets", "overlapping", "titles", "unnamed"],
)
def test_structured_dtypes_arrive_as_they_are(dtype):
    array = np.frombuffer(bytes(i % 100 for i in range(dtype.itemsize * 1000)), dtype)
    came = round_trip(array)
    assert (came.dtype, came.dtype.fields) == (dtype, dtype.fields)
    assert came.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.empty((0, 3), "f4"),
        np.empty((5, 0, 2), "M8[us]"),
        np.array(7, "i8"),
        np.array("2020-01-01", "M8[D]"),
        np.array(["", "\u20ac", "x"]),
        np.array([b"", b"abc"]),
        np.empty(3, "V0"),
        np.zeros((2, 3), []),
        np.ma.getdata(np.ma.array([1, 2])),
        np.rec.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.arange(10)[::-1],
        np.broadcast_to(np.arange(3), (4, 3)),
        np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_small_and_odd_arrays_arrive(array):
    body, buffers = encode(array)
    assert not buffers
    assert_same(decode(body, buffers), np.asarray(array))


# ---- numpy: copies ----


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "dtype", ["f8", ">i4", "M8[ns]", "?", "U5", "S3", [("a", "i4"), ("b", "f8")]]
)
def test_contiguous_arrays_are_not_copied(order, dtype):
    array = np.zeros((100, 50, 20), dtype, order=order)
    _, [source] = encode(array)
    assert np.shares_memory(np.frombuffer(source, "u1"), array)
    assert source.nbytes == array.nbytes
    assert_same(round_trip(array), array)


@pytest.mark.parametrize("index", [np.s_[::2], np.s_[:, ::-1], np.s_[:, 1:-1]])
def test_others_are_copied_where_they_are_to_lie(index):
    array = np.random.default_rng(5).random((300, 400))[index]
    body, [source] = encode({"a": array})
    assert isinstance(source, Unwritten)
    target = np.zeros(array.shape)
    source.write(memoryview(target).cast("B"))
    np.testing.assert_array_equal(target, array)
    assert_same(decode(body, [memoryview(target).cast("B")])["a"], array)


def test_an_array_is_a_view_of_what_came_and_pins_it():
    body, _ = encode(np.arange(10_000))
    block = np.zeros(80_000, "u1")
    gone = weakref.ref(block)
    array = decode(body, [block.data])
    block[0] = 9
    assert array[0] == 9
    part = array.reshape(100, 100)[5:, ::3]
    del block, array
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


def test_arrays_may_be_anywhere_beside_other_large_values():
    array = np.arange(10_000.0)
    came = round_trip({"deep": [{"array": array, "same": (array, b"b" * LARGE)}], "n": 1})
    np.testing.assert_array_equal(came["deep"][0]["array"], array)
    np.testing.assert_array_equal(came["deep"][0]["same"][0], array)
    assert came["deep"][0]["same"][1] == b"b" * LARGE


def test_others_can_wrap_what_arrives():
    array = round_trip(np.arange(10_000, dtype="i4"))
    view = memoryview(array)
    assert (view.format, view.readonly) == ("i", True)
    assert pa.array(array).to_pylist()[:3] == [0, 1, 2]
    again = np.from_dlpack(array)
    assert np.shares_memory(again, array)


# ---- numpy: scalars ----


def test_numpy_numbers_arrive_as_numbers_in_plain_messages():
    numbers = [np.int8(-3), np.uint64(2**64 - 1), np.float32(0.5), np.float16(2), np.bool_(True)]
    assert msgpack.unpackb(packer()(numbers)) == [-3, 2**64 - 1, 0.5, 2.0, True]
    came = round_trip([*numbers, np.float64(1.5)])
    assert came == [-3, 2**64 - 1, 0.5, 2.0, True, 1.5]
    assert [type(number) for number in came] == [int, int, float, float, bool, float]


@pytest.mark.parametrize(
    "scalar",
    [
        np.datetime64("2024-02-29T12:00", "ms"),
        np.timedelta64(3, "h"),
        np.datetime64("NaT"),
        np.complex64(1 - 2j),
        np.longdouble("1.5"),
        np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")])[0],
    ],
    ids=lambda scalar: str(scalar.dtype),
)
def test_other_numpy_scalars_arrive_as_they_are(scalar):
    [came] = round_trip([scalar])
    assert (type(came), came.dtype) == (type(scalar), scalar.dtype)
    assert came == scalar or np.isnat(scalar)


# ---- numpy: refusals ----


@pytest.mark.parametrize(
    "value, message",
    [
        (np.array([object()]), "dtype object holds Python objects"),
        (np.array([(1, {})], [("a", "i4"), ("b", "O")])[["b"]], "holds Python objects"),
        (np.ma.masked_array([1, 2], [0, 1]), r"its \.data and its \.mask"),
    ],
    ids=["objects", "field of objects", "masked"],
)
def test_what_can_not_be_sent_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        encode([value])


# numpy 2 has strings of any length, "T", which are not in this list.
TYPE_CODES = np.typecodes["All"] + "T" * hasattr(getattr(np, "dtypes", np), "StringDType")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("code", TYPE_CODES)
def test_each_type_that_numpy_has_arrives_as_it_is_or_is_refused(code):
    array = np.array([1, 0, 1], "i1").astype("M8[s]" if code == "M" else code)
    refusal = {"O": "holds Python objects", "T": "convert it"}.get(code)
    if refusal is None:
        assert_same(round_trip([array])[0], array)
    else:
        with pytest.raises(TypeError, match=refusal):
            encode(array)


def test_small_arrays_are_plain_and_large_ones_are_not():
    for value in (np.arange(3), np.datetime64(1, "s"), pa.array([1]), pa.table({"a": [1]})):
        [came] = unpack(packer()([value]))
        assert type(came) is type(value)
        assert came == value if np.isscalar(value) else list(came) == list(value)
    for value in (np.arange(LARGE), np.arange(LARGE)[::2], pa.array(range(LARGE))):
        with pytest.raises(NotPlain):
            packer()([value])


def array_extension(dtype="<i4", shape=(2,), fortran=False, where=0, kind=3):
    described = [dtype, list(shape), fortran]
    return extension(kind, described, where)


FIELDS = {"names": ["a"], "formats": ["<i4"], "offsets": [0], "titles": [None], "itemsize": 8}


@pytest.mark.parametrize(
    "body",
    [
        array_extension(dtype="O"),
        array_extension(dtype="|O"),
        array_extension(dtype="|O8"),
        array_extension(dtype="O8"),
        array_extension(dtype="<i4,O"),
        array_extension(dtype="T"),
        array_extension(dtype="|T16", shape=(1,)),
        array_extension(dtype="object"),
        array_extension(dtype="float32"),
        array_extension(dtype="<i3"),
        array_extension(dtype="<f99999999999999999999"),
        array_extension(dtype="<M8[xx]", shape=(1,)),
        array_extension(dtype="<i4\n"),
        array_extension(dtype=b"<i4"),
        array_extension(dtype=7),
        array_extension(dtype=None),
        array_extension(dtype=["<i4"]),
        array_extension(dtype=["<i4", 2]),
        array_extension(dtype=["<i4", [-2]]),
        array_extension(dtype=["<i4", [2**40, 2**40]]),
        array_extension(dtype=["O", [1]]),
        array_extension(dtype={}),
        array_extension(dtype=FIELDS, shape=(2,)),
        array_extension(dtype={**FIELDS, "formats": ["O"]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "formats": []}, shape=(1,)),
        array_extension(dtype={**FIELDS, "offsets": [5]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "offsets": [-1]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "offsets": [2**62]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "names": [1]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "titles": [[1]]}, shape=(1,)),
        array_extension(dtype={**FIELDS, "itemsize": 2**40}, shape=(0,)),
        array_extension(dtype={**FIELDS, "itemsize": 8.0}, shape=(1,)),
        array_extension(dtype={**FIELDS, "more": 1}, shape=(1,)),
        array_extension(dtype={"names": ["a", "a"], "formats": ["<i2"] * 2, "offsets": [0, 2],
                               "titles": [None] * 2, "itemsize": 8}, shape=(1,)),
        array_extension(shape=(3,)),
        array_extension(shape=(1,)),
        array_extension(shape=(-2,)),
        array_extension(shape=(-1, -2)),
        array_extension(shape=(2**62, 4)),
        array_extension(shape=(2**32, 2**32, 2)),
        array_extension(shape=(2.0,)),
        array_extension(shape=(True, 2)),
        array_extension(shape=(1,) * 65 + (2,)),
        array_extension(shape=("2",)),
        array_extension(fortran=None),
        array_extension(fortran="F"),
        array_extension(where=b""),
        array_extension(dtype="|V0", shape=(1 << 40,), where=b""),
        array_extension(dtype="<f8", shape=(0, 2**62, 2**62), where=b""),
        array_extension(kind=4),
        b"\x81" + array_extension() + b"\1",
    ],
)  # fmt: skip
def test_arrays_that_are_described_wrongly_are_refused(body):
    with pytest.raises(ValueError):
        decode(body, [memoryview(bytes(8))])


def test_a_dtype_of_endless_depth_is_refused():
    dtype = "<i4"
    for _ in range(300):
        dtype = [dtype, [1]]
    with pytest.raises(ValueError, match="no numpy dtype"):
        decode(array_extension(dtype=dtype), [memoryview(bytes(8))])
    deep = np.dtype("<i4")
    for _ in range(20):
        deep = np.dtype([("a", deep)])
    with pytest.raises(TypeError, match="nested deeper"):
        encode(np.zeros(3, deep))


array_bodies = bodies_of(
    [np.arange(10_000)],
    np.zeros((50, 60), order="F"),
    np.zeros(500, [("a", "<i4"), ("b", ">f8", (2, 3)), ("c", "U3"), ("d", [("x", "M8[ns]")])]),
    [np.array([1.0, 2.0]), np.datetime64(1, "s")],
)


@given(damaged(array_bodies))
@relaxed
def test_damaged_arrays_are_refused(case):
    survives(case)


# ---- pyarrow ----


def columns(count):
    strings = [None if n % 3 == 0 else "text" * (n % 5) for n in range(count)]
    return {
        "ints": pa.array(range(count)),
        "strings": pa.array(strings),
        "large strings": pa.array(strings, pa.large_string()),
        "views": pa.array(strings, pa.string_view()),
        "bools": pa.array([n % 3 == 1 for n in range(count)]),
        "times": pa.array(range(count), pa.timestamp("ns", "UTC")),
        "categories": pa.array(strings).dictionary_encode(),
        "lists": pa.array([[n] * (n % 4) for n in range(count)]),
        "structs": pa.array([{"a": n, "b": str(n)} for n in range(count)]),
        "maps": pa.array([[("k", n)] for n in range(count)], pa.map_(pa.string(), pa.int64())),
        "nulls": pa.nulls(count),
        "decimals": pa.array(range(count), pa.int64()).cast(pa.decimal128(30, 2)),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([count], pa.int32()), pa.array([7])),
    }


def assert_same_table(came, sent):
    assert type(came) is type(sent)
    assert came.equals(sent)
    came.validate(full=True)


@pytest.mark.parametrize("count", [1, 20, 5000])
@pytest.mark.parametrize("kind", ["table", "batch", "array", "chunked"])
def test_arrow_values_arrive(kind, count):
    data = columns(count)
    if kind == "table":
        table = pa.table(data).replace_schema_metadata({"who": "me"})
        came = round_trip(table, untrusted=True)
        assert_same_table(came, table)
        assert came.schema.metadata == {b"who": b"me"}
    elif kind == "batch":
        assert_same_table(round_trip(pa.record_batch(data)), pa.record_batch(data))
    elif kind == "array":
        for array in data.values():
            assert_same_table(round_trip([array])[0], array)
    else:
        for array in data.values():
            chunked = pa.chunked_array([array, array.slice(count // 2), array.slice(0, 0)])
            came = round_trip(chunked)
            assert_same_table(came, chunked)


def test_empty_arrow_values_arrive():
    for value in (
        pa.table({"a": pa.array([], pa.int32())}),
        pa.table({}),
        pa.chunked_array([], pa.string()),
        pa.array([], pa.int8()),
        pa.record_batch({"a": pa.array([], pa.string())}),
    ):
        assert_same_table(round_trip(value), value)


def test_arrow_data_is_not_copied():
    table = pa.table({"a": np.arange(100_000), "b": [str(n) for n in range(100_000)]})
    body, [source] = encode(table)
    assert isinstance(source, Unwritten)
    before = pa.total_allocated_bytes()
    block = np.zeros(source.nbytes, "u1")
    source.write(block.data)
    came = decode(body, [block.data])
    assert pa.total_allocated_bytes() - before < 100_000
    first = block.ctypes.data
    for column in came.columns:
        for buffer in filter(None, column.chunk(0).buffers()):
            assert first <= buffer.address < first + block.nbytes
            assert not buffer.is_mutable
    assert came.equals(table)
    gone = weakref.ref(block)
    part = came.column("a").slice(5, 10)
    del came, block, column, buffer
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


def test_slices_are_sent_as_far_as_they_reach():
    table = pa.table(columns(5000))
    part = table.slice(4000, 10)
    body, buffers = encode(part)
    assert not buffers
    assert len(body) < LARGE
    assert_same_table(round_trip(part), part)


def test_an_unknown_extension_type_arrives_by_its_name():
    array = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}']))
    assert_same_table(round_trip(array), array)


arrow_bodies = bodies_of(
    pa.table({"a": range(5000), "s": ["text"] * 5000}),
    pa.record_batch({"d": pa.array(["x", None, "y"]).dictionary_encode(), "l": [[1], None, []]}),
    [pa.array(["a", "bc"]), pa.chunked_array([[1], [2, 3]])],
)


@given(damaged(arrow_bodies))
@relaxed
def test_damaged_arrow_values_are_refused(case):
    survives(case)


def arrow_extension(value, change):
    """The body of an Arrow value, with its metadata changed."""
    _, data = msgpack.unpackb(encode(value)[0])
    kind, size = struct.unpack_from("<BI", data)
    which, heads = msgpack.unpackb(data[5 : 5 + size])
    where, which, heads = change(data[5 + size :], which, heads)
    return extension(kind, [which, heads], where)


@pytest.mark.parametrize(
    "change",
    [
        lambda where, which, heads: (where, 9, heads),
        lambda where, which, heads: (where, True, heads),
        lambda where, which, heads: (where, which, "text"),
        lambda where, which, heads: (where, which, b""),
        lambda where, which, heads: (where, which, heads[:-1]),
        lambda where, which, heads: (where, which, heads[:100]),
        lambda where, which, heads: (where, which, heads + heads),
        lambda where, which, heads: (where, which, heads.replace(b"\xff" * 4, b"\xfe" * 4)),
        lambda where, which, heads: (where[:-8], which, heads),
        lambda where, which, heads: (where + bytes(8), which, heads),
        lambda where, which, heads: (b"", which, heads),
    ],
)
def test_arrow_values_that_are_described_wrongly_are_refused(change):
    body = arrow_extension(pa.array([1, 2, 3]), change)
    with pytest.raises(ValueError):
        decode(body)


def test_compressed_arrow_data_is_refused():
    table = pa.table({"a": ["x" * 1000] * 1000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write(table)
    heads, bodies = b"", b""
    for message in pa.ipc.MessageReader.open_stream(sink.getvalue()):
        metadata = message.metadata.to_pybytes()
        metadata += bytes(-len(metadata) % 8)
        heads += b"\xff" * 4 + len(metadata).to_bytes(4, "little") + metadata
        bodies += message.body.to_pybytes() if message.body else b""
    with pytest.raises(ValueError, match="compressed"):
        decode(extension(5, [0, heads], bodies))


def test_offsets_beyond_the_data_are_found_where_the_peer_is_not_trusted():
    array = pa.array(["abc", "defg", "hi"])
    body = arrow_extension(
        array, lambda where, which, heads: (where.replace(b"\3\0\0\0", b"\xff\0\0\7"), which, heads)
    )
    with pytest.raises(ValueError, match="damaged"):
        decode(body, untrusted=True)


# ---- where they are missing ----


@pytest.mark.parametrize("module", ["numpy", "pyarrow"])
def test_what_is_missing_is_named(module):
    value = np.arange(3) if module == "numpy" else pa.array([1])
    body, _ = encode(value)
    code = f"""
import sys
sys.modules[{module!r}] = None
from shmrpc.values import decode
try:
    decode({body!r})
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'shmrpc[" in run.stdout
    assert module in run.stdout


def test_transported_buffers_need_no_alignment():
    body, buffers = encode(np.arange(10_000.0))
    [memory] = transport(buffers)
    odd = bytearray(memory.nbytes + 1)
    odd[1:] = memory
    array = decode(body, [memoryview(odd)[1:]])
    assert array.sum() == np.arange(10_000.0).sum()
