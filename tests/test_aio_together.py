"""Many clients in one loop: they share a poller, and nothing else. So do messages in a batch."""

import asyncio
import os
import random
import socket
from pathlib import Path

import pytest
from conftest import ASYNC_SERVICES, address_of

import shmrpc
from shmrpc import aio
from shmrpc.aio import loop as loops
from shmrpc.codec import MsgpackCodec


@pytest.fixture
def pair(run, transport, directory):
    """Runs ``main(server)`` with a server in the same loop."""

    def runs(main, **options):
        async def whole():
            server = aio.Server(address_of(transport, directory), **options)

            @server.method
            async def echo(value):
                return value

            @server.method
            async def ask():
                return await shmrpc.current_call().caller.call("name")

            async with server:
                await main(server)

        run(whole)

    return runs


def test_clients_share_a_poller_and_go_one_by_one(pair):
    async def main(server):
        (address,) = server.addresses
        clients = [await aio.connect(address) for _ in range(8)]
        loop = asyncio.get_running_loop()
        assert len({client._link.poller for client in clients}) == 1
        while clients:
            calls = [client.call("echo", n) for n, client in enumerate(clients)]
            assert await asyncio.gather(*calls) == list(range(len(clients)))
            leaving = clients.pop(random.randrange(len(clients)))
            under_way = asyncio.ensure_future(leaving.call("echo", "?"))
            await asyncio.sleep(0)
            await leaving.close()
            await asyncio.gather(under_way, return_exceptions=True)
        assert not loop._shmrpc_pollers
        async with aio.connect(address) as client:  # the next one makes another
            assert await client.call("echo", 1) == 1

    pair(main)


def test_each_has_methods_of_its_own(pair):
    async def main(server):
        (address,) = server.addresses
        async with (
            aio.connect(address) as first,
            aio.connect(address) as second,
            aio.connect(address) as third,
        ):

            @second.method
            async def unrelated():
                return None

            @first.method(name="name")
            async def name_of_first():
                return "first"

            @second.method(name="name")
            def name_of_second():
                return "second"

            for _ in range(3):
                assert await first.call("ask") == "first"
                assert await second.call("ask") == "second"
                with pytest.raises(shmrpc.RemoteError, match="has no method 'name'"):
                    await third.call("ask")

    pair(main)


def test_the_end_of_one_server_concerns_its_clients_alone(directory, run, service):
    async def main():
        servers = [service(f"shm://{directory}/{n}.sock") for n in range(3)]
        clients = [await aio.connect(server.address) for server in servers for _ in range(2)]
        assert len({client._link.poller for client in clients}) == 1
        waiting = [asyncio.ensure_future(client.call("sleep", 30)) for client in clients]
        await asyncio.gather(*(client.ping() for client in clients))
        servers[1].kill()
        for client, call in zip(clients[2:4], waiting[2:4], strict=True):
            with pytest.raises(shmrpc.ConnectionLost):
                await call
            with pytest.raises(shmrpc.ConnectError):
                await client.call("add", 1, 2, timeout=0.1)
        others = clients[:2] + clients[4:]
        assert await asyncio.gather(*(client.call("add", 1, 2) for client in others)) == [3] * 4
        assert not any(call.done() for call in waiting[:2] + waiting[4:])
        for client in clients:
            await client.close()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, shmrpc.Error) for end in ends)

    run(main)


# ---- bodies that are no values ----


class Crooked(MsgpackCodec):
    """Sends what bytes it is given, whatever they are."""

    def encoder(self):
        pack = super().encoder()

        def encode(value):
            args = value if isinstance(value, tuple) else (value,)
            return bytes(args[0]) if args and isinstance(args[0], bytes) else pack(value)

        return encode


GOOD = b"\x91\x07"  # [7]
NO_VALUES = {
    "none": b"",
    "too short": b"\x91",
    "much too short": b"\xdd\x00\x00\xff\xff\x01",
    "huge": b"\xdd\xff\xff\xff\xff",
    "two": b"\x91\x01\x91\x02",
    "reserved": b"\xc1",
    "half a string": b"\x91\xd9\xff" + b"x" * 20,
    "deep": b"\x91" * 3000,
}


@pytest.mark.parametrize("body", NO_VALUES.values(), ids=NO_VALUES)
def test_a_request_that_is_no_value_harms_nobody_else(pair, body):
    async def main(server):
        (address,) = server.addresses
        async with (
            aio.connect(address, codec=Crooked()) as crooked,
            aio.connect(address) as honest,
        ):
            for _ in range(3):
                calls = []
                for number in range(5):  # all of one turn, so that they come as a batch
                    calls.append(crooked.call("echo", body))
                    calls.append(honest.call("echo", [number, "honest"]))
                    calls.append(crooked.call("echo", GOOD))
                ends = await asyncio.gather(*calls, return_exceptions=True)
                for bad in ends[0::3]:
                    assert isinstance(bad, shmrpc.RemoteError), bad
                    assert bad.code == "INVALID_ARGUMENT"
                assert ends[1::3] == [[number, "honest"] for number in range(5)]
                assert ends[2::3] == [7] * 5

    pair(main)


@pytest.mark.parametrize("body", NO_VALUES.values(), ids=NO_VALUES)
def test_a_result_that_is_no_value_harms_nobody_else(run, directory, body):
    async def main():
        servers = [
            aio.Server(f"shm://{directory}/crooked.sock", codec=Crooked()),
            aio.Server(f"shm://{directory}/honest.sock"),
        ]
        for server in servers:

            @server.method
            async def echo(value):
                return value if value != "bad" else body

            await server.start()
        crooked, honest = [await aio.connect(server.addresses[0]) for server in servers]
        calls = []
        for number in range(5):
            calls.append(crooked.call("echo", "bad"))
            calls.append(honest.call("echo", number))
            calls.append(crooked.call("echo", number))
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, shmrpc.ProtocolError) for end in ends[0::3]), ends
        assert ends[1::3] == ends[2::3] == list(range(5))
        await crooked.close()
        await honest.close()
        for server in servers:
            await server.stop()

    run(main)


# ---- the loop's other work ----


def test_a_handler_that_blocks_the_loop_keeps_no_reply_back(run, service, directory):
    """Replies of a batch go out together only as long as that is over soon."""
    running = service("shm", program=ASYNC_SERVICES)
    path = f"{directory}/received"

    async def main():
        async with aio.connect(running.address) as client:
            assert not await client.call("stall", path, 0.01)  # now it is known to happen
            running.pause()  # so that what is sent now comes as one batch
            quick = [asyncio.ensure_future(client.call("echo", n)) for n in range(20)]
            slow = asyncio.ensure_future(client.call("stall", path, 20))
            await asyncio.sleep(0)
            running.resume()
            assert await asyncio.gather(*quick) == list(range(20))
            Path(path).touch()
            assert await slow

    run(main)


def test_a_turn_is_short():
    """What a timer or another socket may have to wait for us."""
    assert loops._TURN_SECONDS + loops._SPIN_NS / 1e9 <= 100e-6


def test_it_does_not_spin_while_others_are_ready(directory, monkeypatch):
    """On a loop that shows what is ready, each look of ours is seen here."""
    looks = []
    poll = loops._poll

    def seen(slot, spin_ns):
        looks.append((spin_ns, len(asyncio.get_running_loop()._ready)))
        return poll(slot, spin_ns)

    async def main():
        server = aio.Server(address_of("shm", directory))

        @server.method
        async def echo(value):
            return value

        async with server, aio.connect(server.addresses[0]) as client:
            turns = 0

            async def others():
                nonlocal turns
                while turns < 2000:
                    turns += 1
                    await asyncio.sleep(0)

            async def call():
                while turns < 2000:
                    await client.call("echo", 1)

            await asyncio.gather(others(), *(call() for _ in range(8)))
            while not any(spin for spin, _ in looks):  # as it does once nothing else is ready
                await asyncio.sleep(0.001)

    monkeypatch.setattr(loops, "_poll", seen)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    assert len(looks) > 1000
    assert not [look for look in looks if look[0] and look[1]]


def test_timers_and_sockets_have_their_turns(pair):
    """While calls follow each other without a pause, in as many tasks as like."""

    async def main(server):
        loop = asyncio.get_running_loop()
        (address,) = server.addresses
        near, far = socket.socketpair()
        done = []

        def answer():
            os.write(far.fileno(), os.read(far.fileno(), 100))

        far.setblocking(False)
        near.setblocking(False)
        loop.add_reader(far.fileno(), answer)

        async def use_socket():
            for number in range(200):
                await loop.sock_sendall(near, bytes([number]))
                assert await loop.sock_recv(near, 100) == bytes([number])
            done.append("socket")

        async def use_timers():
            for _ in range(200):
                await asyncio.sleep(0.0002)
            done.append("timers")

        async def call(client):
            while len(done) < 2:
                await client.call("echo", 1)

        async with aio.connect(address) as one, aio.connect(address) as other:
            callers = [call(client) for client in (one, other) for _ in range(20)]
            await asyncio.wait_for(asyncio.gather(use_socket(), use_timers(), *callers), 30)
        loop.remove_reader(far.fileno())
        near.close()
        far.close()

    pair(main)
