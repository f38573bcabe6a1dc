"""Byte streams with asyncio's faces: tests run over its own Unix sockets as well."""

import asyncio
import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys

import pytest
from conftest import LOOPS, address_of, in_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmrpc
from shmrpc import aio
from shmrpc.bytestream import connect_bytes

# Where a test runs: what carries the bytes, in which loop.
OURS = [("shm", "asyncio"), ("shm", "uvloop"), ("unix", "asyncio"), ("tcp", "uvloop")]
PEER = """
import asyncio, sys
from shmrpc import aio

async def main():
    reader, writer = await aio.open_connection(sys.argv[1])
    writer.write(b"hello")
    await writer.drain()
    await reader.read()

asyncio.run(main())
"""


class Unix:
    """asyncio's own."""

    def __init__(self, directory):
        self.path = f"{directory}/plain.sock"

    async def create_server(self, factory):
        return await asyncio.get_running_loop().create_unix_server(factory, self.path)

    async def create_connection(self, factory):
        return await asyncio.get_running_loop().create_unix_connection(factory, self.path)

    async def start_server(self, callback, **options):
        return await asyncio.start_unix_server(callback, self.path, **options)

    async def open(self, **options):
        return await asyncio.open_unix_connection(self.path, **options)


class Shmrpc:
    def __init__(self, transport, directory):
        self.address = address_of(transport, directory)

    def started(self, server):
        (self.address,) = server.addresses
        return server

    async def create_server(self, factory):
        return self.started(await aio.create_server(factory, self.address))

    async def create_connection(self, factory):
        return await aio.create_connection(factory, self.address)

    async def start_server(self, callback, **options):
        return self.started(await aio.start_server(callback, self.address, **options))

    async def open(self, **options):
        return await aio.open_connection(self.address, **options)


@pytest.fixture(params=[("asyncio's", "asyncio"), *OURS], ids="-".join)
def place(request):
    return request.param


@pytest.fixture
def net(place, directory):
    return Unix(directory) if place[0] == "asyncio's" else Shmrpc(place[0], directory)


@pytest.fixture
def run(place, no_leaks):
    return lambda main: in_loop(LOOPS[place[1]](), main)


class Recorder(asyncio.Protocol):
    """Writes down what happens to it."""

    keep_open = False

    def __init__(self):
        self.events = []
        self.received = bytearray()
        self.changed = asyncio.Event()

    def note(self, event):
        self.events.append(event)
        self.changed.set()

    async def until(self, condition):
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def names(self):
        return [event[0] if isinstance(event, tuple) else event for event in self.events]

    def connection_made(self, transport):
        self.transport = transport
        self.note("made")

    def data_received(self, data):
        self.received += data
        self.changed.set()

    def eof_received(self):
        self.note("eof")
        return self.keep_open

    def pause_writing(self):
        self.note("pause")

    def resume_writing(self):
        self.note("resume")

    def connection_lost(self, error):
        self.note(("lost", error))


class Open(Recorder):
    keep_open = True


class Buffered(asyncio.BufferedProtocol, Recorder):
    def __init__(self):
        super().__init__()
        self.buffer = bytearray(1000)

    def get_buffer(self, hint):
        return self.buffer

    def buffer_updated(self, count):
        self.data_received(self.buffer[:count])


class Pair:
    """A connection: the protocols of both its ends."""

    def __init__(self, server, there, here):
        self.server, self.there, self.here = server, there, here

    async def close(self):
        self.server.close()
        for protocol in (self.there, self.here):
            if "lost" not in protocol.names():
                protocol.transport.abort()
            await protocol.until(lambda protocol=protocol: "lost" in protocol.names())
        await self.server.wait_closed()


@contextlib.asynccontextmanager
async def connected(net, there=Recorder, here=Recorder):
    made = []

    def factory():
        made.append(there())
        return made[0]

    server = await net.create_server(factory)
    _, protocol = await net.create_connection(here)
    while not made or not made[0].events:
        await asyncio.sleep(0)
    pair = Pair(server, made[0], protocol)
    try:
        yield pair
    finally:
        await pair.close()


# ---- both: asyncio's and ours ----


def test_bytes_go_both_ways(net, run):
    async def main():
        async def upper(reader, writer):
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await net.start_server(upper)
        reader, writer = await net.open()
        writer.writelines([b"one\n", bytearray(b"two\n"), memoryview(b"three\n")])
        assert [await reader.readline() for _ in range(3)] == [b"ONE\n", b"TWO\n", b"THREE\n"]
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(main())


@pytest.mark.parametrize("side", ["there", "here"])
def test_close_delivers_all_that_was_written(net, run, side):
    async def main():
        async with connected(net) as pair:
            writer, reader = getattr(pair, side), pair.here if side == "there" else pair.there
            data = random.Random(7).randbytes(3_000_000)
            writer.transport.write(data)
            writer.transport.close()
            assert writer.transport.is_closing()
            assert "lost" not in writer.events
            await reader.until(lambda: "lost" in reader.names())
            await writer.until(lambda: "lost" in writer.names())
            assert reader.received == data
            assert reader.events == ["made", "eof", ("lost", None)]
            assert writer.events[-1] == ("lost", None)

    run(main())


@pytest.mark.parametrize("side", ["there", "here"])
def test_half_close_leaves_the_other_half(net, run, side):
    async def main():
        async with connected(net, Open, Open) as pair:
            ended, other = getattr(pair, side), pair.here if side == "there" else pair.there
            assert ended.transport.can_write_eof()
            ended.transport.write(b"a" * 400_000)
            ended.transport.write_eof()
            with pytest.raises(RuntimeError):
                ended.transport.write(b"more")
            await other.until(lambda: "eof" in other.events)
            assert len(other.received) == 400_000
            data = random.Random(8).randbytes(2_000_000)  # much more than the credit
            other.transport.write(data)
            await ended.until(lambda: len(ended.received) == len(data))
            assert ended.received == data
            other.transport.write_eof()
            await ended.until(lambda: "eof" in ended.events)
            assert not ended.transport.is_closing()

    run(main())


def test_a_reader_that_pauses_stops_the_writer(net, run):
    async def main():
        async with connected(net) as pair:
            pair.there.transport.pause_reading()
            assert not pair.there.transport.is_reading()
            writer = pair.here.transport
            writer.set_write_buffer_limits(high=10_000, low=1000)
            assert writer.get_write_buffer_limits() == (1000, 10_000)
            sent = 0
            while "pause" not in pair.here.events:
                writer.write(b"x" * 20_000)
                sent += 20_000
                assert sent < 50_000_000
            assert writer.get_write_buffer_size() > 10_000
            assert not pair.there.received
            pair.there.transport.resume_reading()
            assert not pair.there.received, "delivered from within resume_reading()"
            await pair.here.until(lambda: "resume" in pair.here.events)
            await pair.there.until(lambda: len(pair.there.received) == sent)
            assert writer.get_write_buffer_size() == 0

    run(main())


def test_a_buffered_protocol_gets_the_same(net, run):
    async def main():
        async with connected(net, Buffered) as pair:
            data = random.Random(9).randbytes(300_000)
            pair.here.transport.write(data)
            await pair.there.until(lambda: len(pair.there.received) == len(data))
            assert pair.there.received == data

    run(main())


def test_protocols_can_be_exchanged(net, run):
    async def main():
        async with connected(net) as pair:
            second = Buffered()
            second.transport = pair.there.transport
            pair.there.transport.set_protocol(second)
            assert pair.there.transport.get_protocol() is second
            pair.here.transport.write(b"for the second")
            await second.until(lambda: second.received == b"for the second")
            assert not pair.there.received
            pair.there.transport.set_protocol(pair.there)

    run(main())


def test_abort_drops_what_was_not_sent(net, run):
    async def main():
        async with connected(net) as pair:
            pair.there.transport.pause_reading()
            pair.here.transport.write(b"x" * 5_000_000)
            pair.here.transport.abort()
            assert "lost" not in pair.here.names(), "called from within abort()"
            await pair.here.until(lambda: "lost" in pair.here.names())
            assert pair.here.events[-1] == ("lost", None)
            assert pair.here.transport.get_write_buffer_size() == 0
            pair.there.transport.resume_reading()
            await pair.there.until(lambda: "lost" in pair.there.names())
            assert len(pair.there.received) < 5_000_000

    run(main())


def test_writing_to_one_who_has_gone_loses_the_connection(net, run):
    async def main():
        async with connected(net, Recorder, Open) as pair:
            pair.there.transport.abort()
            await pair.here.until(lambda: "eof" in pair.here.events)
            while "lost" not in pair.here.names():
                pair.here.transport.write(b"x")
                await asyncio.sleep(0)
            _, error = pair.here.events[-1]
            assert isinstance(error, ConnectionError)
            pair.here.transport.write(b"ignored")

    run(main())


def test_an_error_of_a_protocol_ends_the_connection(net, run):
    async def main():
        class Failing(Recorder):
            def data_received(self, data):
                raise ZeroDivisionError

        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: reported.append(what))
        async with connected(net, Failing) as pair:
            pair.here.transport.write(b"x")
            await pair.here.until(lambda: "lost" in pair.here.names())
            await pair.there.until(lambda: "lost" in pair.there.names())
        assert [type(what["exception"]) for what in reported] == [ZeroDivisionError]

    run(main())


def test_bad_writes(net, run):
    async def main():
        async with connected(net) as pair:
            with pytest.raises(TypeError):
                pair.here.transport.write("text")
            with pytest.raises(ValueError):
                pair.here.transport.set_write_buffer_limits(high=1, low=2)
            pair.here.transport.write(b"")

    run(main())


def test_thirty_megabytes(net, run):
    async def main():
        data = random.Random(1).randbytes(1 << 20) * 30

        async def echo(reader, writer):
            while part := await reader.read(1 << 20):
                writer.write(part)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        async def send(writer):
            for start in range(0, len(data), 100_000):
                writer.write(data[start : start + 100_000])
                await writer.drain()
            writer.write_eof()

        server = await net.start_server(echo)
        reader, writer = await net.open()
        sending = asyncio.ensure_future(send(writer))
        assert await reader.read() == data
        await sending
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(main())


def test_a_read_can_be_cancelled(net, run):
    async def main():
        accepted = asyncio.get_running_loop().create_future()
        server = await net.start_server(lambda *streams: accepted.set_result(streams))
        reader, writer = await net.open()
        _, other = await accepted
        for text in (b"one", b"two"):
            reading = asyncio.ensure_future(reader.read(100))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            other.write(text)
            assert await reader.read(100) == text
        for stream in (other, writer):
            stream.close()
            await stream.wait_closed()
        server.close()
        await server.wait_closed()

    run(main())


def test_a_server_serves_until_it_is_closed(net, run):
    async def main():
        server = await net.create_server(Recorder)
        assert server.is_serving()
        assert server.get_loop() is asyncio.get_running_loop()
        assert len(server.sockets) == 1
        serving = asyncio.ensure_future(server.serve_forever())
        await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not server.is_serving()
        assert not server.sockets
        with pytest.raises((shmrpc.ConnectError, OSError)):
            await net.create_connection(Recorder)

    run(main())


# Steps of one side; the other side does its own at the same time.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 150_000)),
        st.tuples(st.just("small"), st.integers(1, 2000)),
        st.just(("pause", 0)),
        st.just(("resume", 0)),
        st.just(("yield", 0)),
    ),
    max_size=15,
)


@pytest.mark.parametrize("transport,loop", OURS)
@settings(
    max_examples=12,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(here=STEPS, there=STEPS, first=st.booleans())
def test_whatever_is_written_arrives_whole_and_in_order(
    directory, transport, loop, here, there, first
):
    async def play(steps, protocol, byte):
        written = bytearray()
        for name, count in steps:
            if name == "write":
                data = random.Random(count).randbytes(count)
                protocol.transport.write(data)
                written += data
            elif name == "small":
                for _ in range(count):
                    protocol.transport.write(byte)
                written += byte * count
            elif name == "pause":
                protocol.transport.pause_reading()
            elif name == "resume":
                protocol.transport.resume_reading()
            else:
                await asyncio.sleep(0)
        protocol.transport.resume_reading()
        protocol.transport.write_eof()
        return written

    async def main():
        async with connected(Shmrpc(transport, directory), Open, Open) as pair:
            ends = [(here, pair.here, b"h"), (there, pair.there, b"t")]
            sent = await asyncio.gather(*(play(*end) for end in (ends if first else ends[::-1])))
            sent_here, sent_there = sent if first else sent[::-1]
            for protocol in (pair.here, pair.there):
                await protocol.until(lambda protocol=protocol: "eof" in protocol.events)
            assert pair.there.received == sent_here
            assert pair.here.received == sent_there

    in_loop(LOOPS[loop](), main())


class Fitful(Open):
    """It pauses now and then while it is given something."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(3)

    def data_received(self, data):
        super().data_received(data)
        if self.random.random() < 0.2:
            self.transport.pause_reading()
            if self.random.random() < 0.5:
                self.transport.resume_reading()
            else:
                asyncio.get_running_loop().call_soon(self.transport.resume_reading)


class FitfulBuffered(Buffered, Fitful):
    keep_open = True


@pytest.mark.parametrize("reader", [Fitful, FitfulBuffered])
def test_pauses_between_short_and_long_writes(net, run, reader):
    """Those that come while others wait don't overtake them."""

    async def main():
        async with connected(net, reader, Open) as pair:
            seed = random.randrange(1 << 32)
            print("seed", seed)
            rng = random.Random(seed)
            sent = bytearray()
            for _ in range(60):
                for _ in range(rng.randrange(6)):
                    data = rng.randbytes(rng.choice([1, 100, 1000, 8191, 8192, 8193, 70_000]))
                    pair.here.transport.write(data)
                    sent += data
                await asyncio.sleep(0)
            await pair.there.until(lambda: len(pair.there.received) >= len(sent))
            assert pair.there.received == sent

    run(main())


# ---- ours alone ----


only_ours = pytest.mark.parametrize("place", OURS, ids="-".join, indirect=True)


@pytest.fixture
def ours(place, directory):
    return Shmrpc(place[0], directory)


@only_ours
def test_extra_info(ours, run):
    async def main():
        async with connected(ours) as pair:
            transport = pair.there.transport
            sock = transport.get_extra_info("socket")
            assert sock.fileno() >= 0
            assert transport.get_extra_info("sockname") == sock.getsockname()
            assert transport.get_extra_info("peername") == sock.getpeername()
            assert transport.get_extra_info("peercred").pid == os.getpid()
            assert transport.get_extra_info("sslcontext", "none") == "none"
            family = socket.AF_INET if ours.address.startswith("tcp") else socket.AF_UNIX
            assert sock.family == family
            transport.abort()
            assert sock.fileno() == -1
            assert transport.get_extra_info("socket", "gone") in {"gone", sock}

    run(main())


@only_ours
def test_a_write_after_the_end_that_came_too_late_loses_the_connection(ours, run):
    class Late(Open):
        def eof_received(self):
            self.transport.write(b"one last word")  # and no more, which would see that it is gone
            return super().eof_received()

    async def main():
        async with connected(ours, Recorder, Late) as pair:
            pair.there.transport.close()
            await pair.here.until(lambda: "lost" in pair.here.names())

    run(main())


@only_ours
def test_a_peer_that_is_killed_has_hung_up(ours, run):
    async def main():
        streams = asyncio.get_running_loop().create_future()
        server = await ours.start_server(lambda *both: streams.set_result(both))
        process = subprocess.Popen([sys.executable, "-c", PEER, ours.address])
        reader, writer = await streams
        assert await reader.readexactly(5) == b"hello"
        os.kill(process.pid, signal.SIGKILL)
        assert await reader.read() == b""
        await asyncio.to_thread(process.wait)
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"x")
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(main())


@only_ours
def test_a_server_of_calls_serves_no_byte_streams(service, place, run):
    running = service(place[0])

    async def main():
        with pytest.raises(shmrpc.ConnectError, match="serves calls and no byte streams"):
            await aio.open_connection(running.addresses[0])

    run(main())


@only_ours
def test_a_server_of_byte_streams_serves_no_calls(ours, run):
    async def main():
        server = await ours.create_server(Recorder)
        async with aio.connect(ours.address) as client:
            with pytest.raises(shmrpc.MethodNotFound):
                await client.call("anything")
        async with aio.connect(ours.address) as client:
            server.close()
            with pytest.raises(shmrpc.Error):
                await client.call("anything", timeout=0.2)
        await server.wait_closed()

    run(main())


@only_ours
def test_an_address_has_one_server(ours, run):
    async def main():
        if ours.address.startswith("tcp"):
            ours.address = "tcp://127.0.0.1:0"
        server = await ours.create_server(Recorder)
        with pytest.raises(shmrpc.ConnectError):
            await aio.create_server(Recorder, ours.address)
        server.close()
        await server.wait_closed()
        again = await aio.create_server(Recorder, ours.address, start_serving=False)
        assert not again.is_serving()
        async with again:
            await again.start_serving()
            transport, _ = await ours.create_connection(Recorder)
            transport.close()
            again.close_clients()

    run(main())


def test_connecting_can_be_cancelled(directory, no_leaks):
    async def main():
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(f"{directory}/silent.sock")
            silent.listen()
            address = f"shm://{directory}/silent.sock"
            connecting = asyncio.ensure_future(aio.open_connection(address, timeout=1))
            await asyncio.sleep(0.01)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            with pytest.raises(shmrpc.ConnectError):
                await aio.open_connection(address, timeout=0.1)

    in_loop(LOOPS["uvloop"](), main())


def test_a_transport_that_is_dropped_warns(directory, no_leaks):
    async def main():
        address = address_of("shm", directory)
        server = await aio.create_server(Recorder, address)
        transport, protocol = await aio.create_connection(Recorder, address)
        with pytest.warns(ResourceWarning, match="unclosed transport"):
            transport.__del__()
        transport.abort()
        await protocol.until(lambda: "lost" in protocol.names())
        server.close()
        await server.wait_closed()

    in_loop(asyncio.new_event_loop(), main())


@only_ours
def test_threads_have_byte_streams_too(ours, run):
    data = random.Random(5).randbytes(1_000_000)

    def talk():
        stream = connect_bytes(ours.address)
        with pytest.raises(TimeoutError):
            stream.receive(1, timeout=0.01)
        assert not stream.readable()
        stream.send_all(data[:500_000], timeout=5)
        stream.send_all(data[500_000:], timeout=5)
        stream.send_eof()
        received = b""
        while part := stream.receive(10_000, timeout=5):
            assert len(part) <= 10_000
            received += part
        assert stream.readable()
        stream.close()
        stream.close()
        with pytest.raises(OSError, match="closed"):
            stream.receive(1)
        return received

    async def main():
        async def echo(reader, writer):
            writer.write(await reader.read())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await ours.start_server(echo)
        assert await asyncio.to_thread(talk) == data
        server.close()
        await server.wait_closed()

    run(main())


@only_ours
@pytest.mark.parametrize("size", [1, 8000])
def test_who_sends_more_than_it_may_is_cut_off(ours, run, size):
    """Short writes, to one who does not read them."""

    def send():
        stream = connect_bytes(ours.address)
        flow = stream._wire.stream
        flow.granted_messages = flow.granted_bytes = 1 << 60
        with contextlib.suppress(OSError):  # it may be seen while sending
            for _ in range(1000):
                stream.send_all(bytes(size), timeout=20)
        assert stream.receive(1, timeout=20) == b""
        stream.close()

    async def main():
        made = []

        class Paused(Recorder):
            def connection_made(self, transport):
                super().connection_made(transport)
                transport.pause_reading()
                made.append(self)

        server = await ours.create_server(Paused)
        sending = asyncio.ensure_future(asyncio.to_thread(send))
        while not made:
            await asyncio.sleep(0)
        (protocol,) = made
        await protocol.until(lambda: "lost" in protocol.names())
        assert protocol.events[-1][1].errno == errno.EPROTO
        assert not protocol.received
        await sending
        server.close()
        await server.wait_closed()

    run(main())
