"""``shmrpc tunnel``: programs that only speak sockets, and servers on shared memory, both ways."""

import asyncio
import contextlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import wait_until
from sidecars import Command, fds, starter

from shmrpc import aio
from shmrpc.bytestream import connect_bytes

WEB = """
import asyncio, os, sys
import fastapi, uvicorn
from shmrpc import aio

app = fastapi.FastAPI()

@app.get("/hello")
async def hello(name: str):
    return {"hello": name}

@app.post("/size")
async def size(request: fastapi.Request):
    return {"size": len(await request.body())}

@app.get("/zeros")
async def zeros(n: int):
    return fastapi.Response(bytes(n))

async def main():
    aio.install(asyncio.get_running_loop())
    config = uvicorn.Config(app, uds=aio.socket_path("web"), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    print("ready", flush=True)
    await serving

asyncio.run(main())
"""


run = starter("tunnel")


def tunnel_address(command):
    return command.wait_for(r"tunnel at (\S+) to")[1]


@pytest.fixture
def web(directory):
    """FastAPI on uvicorn, at shm://web."""
    process = subprocess.Popen([sys.executable, "-c", WEB], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def fetch(*arguments):
    """What curl gets; the standard library's client does where there is none."""
    if shutil.which("curl"):
        command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30", *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout
    *options, url = arguments
    data = None
    if options:
        with open(options[-1].removeprefix("@"), "rb") as file:
            data = file.read()
    with urllib.request.urlopen(url, data, timeout=30) as answer:
        return answer.read()


def test_curl_to_fastapi_on_shm(web, run, directory):
    tunnel = run("--listen", "tcp://127.0.0.1:0", "--to", "shm://web")
    base = tunnel_address(tunnel).replace("tcp", "http")
    assert fetch(f"{base}/hello?name=you") == b'{"hello":"you"}'
    assert fetch(f"{base}/zeros?n=3000000") == bytes(3_000_000)
    with open(f"{directory}/body", "wb") as file:
        file.write(os.urandom(2_000_000))
    assert fetch("--data-binary", f"@{directory}/body", f"{base}/size") == b'{"size":2000000}'
    before = fds(tunnel.pid)
    for _ in range(5):
        fetch(f"{base}/hello?name=you")
    wait_until(lambda: fds(tunnel.pid) <= before)
    assert tunnel.stop() == 0


class Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(bytes(1_000_000))

    def log_message(self, *_):
        pass


def test_there_and_back(run):
    """A plain server, a tunnel to shm, another back to a socket, and curl."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{server.server_port}")
            back = run("--listen", "tcp://127.0.0.1:0", "--to", "shm://far")
            url = tunnel_address(back).replace("tcp", "http")
            assert fetch(f"{url}/") == bytes(1_000_000)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def listener():
    """A plain socket that somebody will connect to."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(20)
        yield sock


def accept(listener):
    sock, _ = listener.accept()
    sock.settimeout(20)
    return sock


def test_halves_end_one_by_one(run, listener):
    run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    stream = connect_bytes("shm://far")
    sock = accept(listener)
    with sock:
        stream.send_all(b"question")
        stream.send_eof()
        assert sock.recv(100) == b"question"
        assert sock.recv(100) == b""
        sock.sendall(b"answer")
        assert stream.receive(100, timeout=20) == b"answer"
        sock.shutdown(socket.SHUT_WR)
        assert stream.receive(100, timeout=20) == b""
    stream.close()


def test_the_other_half_first(run, listener, directory):
    """A plain client ends its half; what the server on shm says afterwards arrives."""
    told = []

    async def main():
        async def serve(reader, writer):
            told.append(await reader.read())
            writer.write(b"answer")
            await writer.drain()
            writer.close()

        async with await aio.start_server(serve, "shm://told"):
            unix = f"unix://{directory}/plain.sock"
            tunnel = await asyncio.to_thread(run, "--listen", unix, "--to", "shm://told")
            reader, writer = await asyncio.open_unix_connection(f"{directory}/plain.sock")
            writer.write(b"question")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 20) == b"answer"
            writer.close()
            await writer.wait_closed()
            assert await asyncio.to_thread(tunnel.stop) == 0

    asyncio.run(main())
    assert told == [b"question"]
    assert not os.path.exists(f"{directory}/plain.sock")


def test_who_does_not_read_stops_who_writes(run, listener):
    run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    stream = connect_bytes("shm://far")
    sock = accept(listener)
    with sock:
        sent = 0
        with pytest.raises(TimeoutError):
            for _ in range(1000):  # 100 MB, which nobody reads
                stream.send_all(bytes(100_000), timeout=1)
                sent += 100_000
        assert sent < 50_000_000
        got = 0
        while got < sent:
            got += len(sock.recv(1 << 20))
    stream.close()


def test_ends_that_are_lost(run, listener):
    tunnel = run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    idle = fds(tunnel.pid)
    stream = connect_bytes("shm://far")
    sock = accept(listener)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()  # a reset
    assert stream.receive(100, timeout=20) == b""
    stream.close()
    again = connect_bytes("shm://far")
    sock = accept(listener)
    again.close()
    with sock:
        assert sock.recv(100) == b""
    wait_until(lambda: fds(tunnel.pid) <= idle + 4)  # what the loop itself needed first


def test_nobody_at_the_other_side(run, listener):
    tunnel = run("--listen", "tcp://127.0.0.1:0", "--to", "shm://nobody")
    host, port = tunnel_address(tunnel).removeprefix("tcp://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    with sock, contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""
    tunnel.wait_for("a connection was refused: .*shm://nobody")
    port = listener.getsockname()[1]
    listener.close()
    back = run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{port}")
    stream = connect_bytes("shm://far")
    assert stream.receive(100, timeout=20) == b""
    stream.close()
    back.wait_for("a connection was refused: .*Connection refused|Connect call failed")


def test_draining(run, listener):
    tunnel = run("--listen", "shm://far", "--to", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    stream = connect_bytes("shm://far")
    sock = accept(listener)
    with sock:
        tunnel.process.terminate()
        wait_until(lambda: not os.path.exists(f"{os.environ['SHMRPC_DIR']}/far.sock"))
        stream.send_all(b"still here")
        assert sock.recv(100) == b"still here"
        stream.close()
        assert sock.recv(100) == b""
    assert tunnel.wait() == 0


def test_a_drain_that_takes_too_long(run, listener):
    to = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    tunnel = run("--listen", "shm://far", "--to", to, "--grace", "0.1")
    stream = connect_bytes("shm://far")
    with accept(listener) as sock:
        tunnel.process.send_signal(signal.SIGINT)
        assert tunnel.wait() == 0
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    assert stream.receive(100, timeout=20) == b""
    stream.close()


def refused(*arguments):
    command = Command("tunnel", *arguments, ready=False)
    try:
        assert command.wait() == 2
        return command.said
    finally:
        command.close()


def test_what_is_refused(listener, directory):
    port = listener.getsockname()[1]
    assert "in use" in refused("--listen", f"tcp://127.0.0.1:{port}", "--to", "shm://x")
    assert "--allow-remote" in refused("--listen", "tcp://0.0.0.0:0", "--to", "shm://x")
    assert "nothing to tunnel" in refused("--listen", "tcp://127.0.0.1:0", "--to", "unix:///x")
    assert "unknown scheme" in refused("--listen", "http://x:1", "--to", "shm://x")
    assert "--to" in refused("--listen", "shm://x")
