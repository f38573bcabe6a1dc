"""Libraries that know nothing of shmrpc, over shared memory: in an installed loop, unmodified."""

import asyncio
import contextlib
import gc
import io
import os
import threading

import pytest
import uvloop
from conftest import wait_until

from shmrpc import aio
from shmrpc.rendezvous import Credentials

LOOPS = {"asyncio": aio.new_event_loop, "uvloop": lambda: aio.install(uvloop.new_event_loop())}
BIG = bytes(range(256)) * 8000  # 2 MB


def in_loop(loop, main):
    asyncio.set_event_loop(loop)
    trouble = []
    loop.set_exception_handler(lambda _loop, context: trouble.append(context))
    try:
        loop.run_until_complete(asyncio.wait_for(main, 30))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        gc.collect()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    assert not trouble


@pytest.fixture(params=LOOPS)
def run(request, directory):
    return lambda main: in_loop(LOOPS[request.param](), main)


def fastapi_app():
    import fastapi
    from fastapi.responses import StreamingResponse

    app = fastapi.FastAPI()
    app.state.go_on = asyncio.Event()

    @app.get("/hello")
    async def hello(name: str = "world"):
        return {"hello": name}

    @app.post("/size")
    async def size(request: fastapi.Request):
        return {"size": sum([len(part) async for part in request.stream()])}

    @app.get("/big")
    async def big():
        return fastapi.Response(BIG)

    @app.get("/parts")
    async def parts():
        async def generate():
            yield b"first"
            await app.state.go_on.wait()
            yield b"second"

        return StreamingResponse(generate())

    @app.websocket("/echo")
    async def echo(ws: fastapi.WebSocket):
        await ws.accept()
        with contextlib.suppress(fastapi.WebSocketDisconnect):
            while True:
                await ws.send_text((await ws.receive_text()).upper())

    return app


@contextlib.asynccontextmanager
async def uvicorn_serving(app, uds):
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, uds=uds, log_level="error", lifespan="off"))
    server.install_signal_handlers = lambda: None
    server.capture_signals = contextlib.nullcontext
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        assert not serving.done(), serving
        await asyncio.sleep(0.001)
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_uvicorn_with_fastapi_and_aiohttps_client(run):
    import aiohttp

    async def main():
        app = fastapi_app()
        path = aio.socket_path("web")
        async with (
            uvicorn_serving(app, path),
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
        ):
            for _ in range(3):
                async with session.get("http://web/hello", params={"name": "you"}) as response:
                    assert await response.json() == {"hello": "you"}
            async with session.post("http://web/size", data=io.BytesIO(BIG)) as response:
                assert await response.json() == {"size": len(BIG)}
            async with session.get("http://web/big") as response:
                assert await response.read() == BIG
            async with session.get("http://web/parts") as response:
                assert await response.content.readany() == b"first"
                app.state.go_on.set()
                assert await response.content.read() == b"second"
            async with session.ws_connect("http://web/echo") as ws:
                await ws.send_str("hello")
                assert await ws.receive_str() == "HELLO"

    run(main())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_websockets_client_to_uvicorn(run):
    import websockets

    async def main():
        path = aio.socket_path("web")
        async with (
            uvicorn_serving(fastapi_app(), path),
            websockets.unix_connect(path, "ws://web/echo") as ws,
        ):
            for number in range(20):
                await ws.send(f"message {number}")
                assert await ws.recv() == f"MESSAGE {number}"

    run(main())


def test_aiohttp_on_both_sides(run, tmp_path):
    import aiohttp
    from aiohttp import web

    (tmp_path / "big").write_bytes(BIG)
    peers = []

    async def hello(request):
        peers.append(request.transport.get_extra_info("peercred"))
        return web.json_response({"got": len(await request.read())})

    async def echo(request):
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_bytes(message.data[::-1])
        return ws

    async def main():
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.post("/hello", hello), web.get("/echo", echo)])
        app.router.add_static("/files", tmp_path)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, "shm://web").start()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector("shm://web")) as session:
            async with session.post("http://web/hello", data=io.BytesIO(BIG)) as response:
                assert await response.json() == {"got": len(BIG)}
            async with session.get("http://web/files/big") as response:
                assert await response.read() == BIG
            async with session.ws_connect("http://web/echo") as ws:
                await ws.send_bytes(b"abc")
                assert await ws.receive_bytes() == b"cba"
        await runner.cleanup()

    run(main())
    assert peers == [Credentials(os.getpid(), os.getuid(), os.getgid())]


def test_hypercorn(run):
    import aiohttp
    import hypercorn.asyncio
    import hypercorn.config

    async def main():
        config = hypercorn.config.Config()
        config.bind = [f"unix:{aio.socket_path('web')}"]
        config.accesslog = config.errorlog = None
        stop = asyncio.Event()
        app = fastapi_app()
        serving = asyncio.ensure_future(
            hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait)
        )
        connector = aiohttp.UnixConnector("shm://web")
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                try:
                    async with session.get("http://web/hello") as response:
                        assert await response.json() == {"hello": "world"}
                    break
                except aiohttp.ClientConnectorError:
                    assert not serving.done(), serving
                    await asyncio.sleep(0.005)
            async with session.get("http://web/big") as response:
                assert await response.read() == BIG
        stop.set()
        await serving

    run(main())


def test_grpclib(run):
    import grpclib.client
    import grpclib.server
    from grpclib.const import Cardinality, Handler
    from grpclib.encoding.base import CodecBase

    class Bytes(CodecBase):
        __content_subtype__ = "bytes"

        def encode(self, message, message_type):
            return message

        def decode(self, data, message_type):
            return data

    class Service:
        async def reverse(self, stream):
            await stream.send_message((await stream.recv_message())[::-1])

        async def count(self, stream):
            async for message in stream:
                for number in range(int(message)):
                    await stream.send_message(b"%d" % number)

        def __mapping__(self):
            return {
                "/s.S/Reverse": Handler(self.reverse, Cardinality.UNARY_UNARY, bytes, bytes),
                "/s.S/Count": Handler(self.count, Cardinality.STREAM_STREAM, bytes, bytes),
            }

    async def main():
        server = grpclib.server.Server([Service()], codec=Bytes())
        await server.start(path="shm://grpc")
        async with grpclib.client.Channel(path="shm://grpc", codec=Bytes()) as channel:
            reverse = grpclib.client.UnaryUnaryMethod(channel, "/s.S/Reverse", bytes, bytes)
            assert await reverse(BIG) == BIG[::-1]
            count = grpclib.client.StreamStreamMethod(channel, "/s.S/Count", bytes, bytes)
            assert await count([b"2", b"3"]) == [b"0", b"1", b"0", b"1", b"2"]
        server.close()
        await server.wait_closed()

    run(main())


def test_other_sockets_go_to_the_loop(run, directory, tmp_path):
    async def main():
        async def upper(reader, writer):
            writer.write((await reader.readline()).upper())
            writer.close()
            await writer.wait_closed()

        with _chdir(tmp_path):
            server = await asyncio.start_unix_server(upper, "plain.sock")
            reader, writer = await asyncio.open_unix_connection("plain.sock")
        writer.write(b"abc\n")
        assert await reader.read() == b"ABC\n"
        assert writer.get_extra_info("peercred") is None
        writer.close()
        server.close()
        tcp = await asyncio.start_server(upper, "127.0.0.1", 0)
        tcp.close()

    run(main())


@contextlib.contextmanager
def _chdir(path):
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def test_errors_are_those_of_sockets(run):
    async def main():
        with pytest.raises(ConnectionRefusedError, match="no server"):
            await asyncio.open_unix_connection("shm://nobody")
        with pytest.raises(ValueError, match="TLS"):
            await asyncio.open_unix_connection("shm://nobody", ssl=True, server_hostname="x")
        server = await asyncio.start_unix_server(lambda *_: None, "shm://web")
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_unix_server(lambda *_: None, "shm://web")
        server.close()
        await server.wait_closed()

    run(main())


def test_socket_path_is_the_rendezvous(directory):
    path = aio.socket_path("web")
    assert path == f"{directory}/web.sock"
    assert aio.socket_path("shm:///elsewhere/x.sock") == "/elsewhere/x.sock"
    with pytest.raises(ValueError, match="no shm address"):
        aio.socket_path("tcp://127.0.0.1:80")


# ---- httpx ----


@contextlib.contextmanager
def fastapi_process(directory, app):
    """Serve it in a thread, with a loop of its own."""
    ready, stop = threading.Event(), asyncio.Event()
    loop = aio.new_event_loop()

    async def main():
        async with uvicorn_serving(app, aio.socket_path("calc")):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=in_loop, args=(loop, main()))
    thread.start()
    try:
        assert ready.wait(10)
        yield loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_httpx_async(run, directory):
    import httpx

    from shmrpc.httpx import AsyncTransport

    async def main():
        app = fastapi_app()
        async with (
            uvicorn_serving(app, aio.socket_path("calc")),
            httpx.AsyncClient(transport=AsyncTransport(), base_url="http://calc") as client,
        ):
            for _ in range(3):
                assert (await client.get("/hello")).json() == {"hello": "world"}
            assert len(client._transport._pool.connections) == 1, "is kept alive"

            async def pieces():
                for start in range(0, len(BIG), 100_000):
                    yield BIG[start : start + 100_000]

            assert (await client.post("/size", content=pieces())).json() == {"size": len(BIG)}
            both = await asyncio.gather(client.get("/big"), client.get("/hello"))
            assert both[0].content == BIG
            async with client.stream("GET", "/parts") as response:
                parts = response.aiter_raw()
                assert await anext(parts) == b"first"
                with pytest.raises(httpx.ReadTimeout):
                    await client.get("/parts", timeout=0.05)
                app.state.go_on.set()
                assert await anext(parts) == b"second"
            with pytest.raises(httpx.ConnectError, match="no server"):
                await client.get("http://nobody/")
            with pytest.raises(httpx.ConnectError, match="TLS"):
                await client.get("https://calc/")

    run(main())


def test_httpx_gives_up_on_a_server_that_takes_nothing(run):
    import httpx

    from shmrpc.httpx import AsyncTransport

    async def main():
        ended = asyncio.Event()

        async def stuck(_reader, writer):
            writer.transport.pause_reading()
            await ended.wait()
            writer.close()

        async with (
            await aio.start_server(stuck, "calc"),
            httpx.AsyncClient(transport=AsyncTransport(), timeout=0.2) as client,
        ):
            # Closing the connection must not wait for the server, which has not taken all.
            with pytest.raises(httpx.WriteTimeout):
                await client.post("http://calc/", content=BIG)
            ended.set()

    run(main())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_httpx_in_threads(directory):
    import httpx

    from shmrpc.httpx import Transport

    app = fastapi_app()
    with (
        fastapi_process(directory, app) as loop,
        httpx.Client(transport=Transport("calc"), base_url="http://any") as client,
    ):
        for _ in range(3):
            assert client.get("/hello").json() == {"hello": "world"}
        assert len(client._transport._pool.connections) == 1, "is kept alive"
        assert client.post("/size", content=BIG).json() == {"size": len(BIG)}
        assert client.get("/big").content == BIG
        with client.stream("GET", "/parts") as response:
            parts = response.iter_raw()
            assert next(parts) == b"first"
            with pytest.raises(httpx.ReadTimeout):
                client.get("/parts", timeout=0.05)
            loop.call_soon_threadsafe(app.state.go_on.set)
            assert next(parts) == b"second"
    with (
        pytest.raises(httpx.ConnectError),
        httpx.Client(transport=Transport("calc")) as client,
    ):
        client.get("http://calc/")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_httpx_connects_anew_when_the_server_has_restarted(directory):
    import httpx

    from shmrpc.httpx import Transport

    with httpx.Client(transport=Transport(), base_url="http://calc") as client:
        for _ in range(2):
            with fastapi_process(directory, fastapi_app()):
                assert client.get("/hello").status_code == 200
            wait_until(lambda: not os.path.exists(f"{directory}/calc.sock"))
