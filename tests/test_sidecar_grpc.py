"""The leg between hosts by gRPC: between sidecars, with stock grpcio at either end, with TLS."""

import collections
import contextlib
import os
import subprocess
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import msgpack
import pytest
from conftest import Service, in_mount_namespace, short_directory, wait_until
from sidecars import Command, starter

import shmrpc

run = starter("sidecar")


@pytest.fixture(scope="module")
def pair():
    """A server behind two sidecars with gRPC between them: its address, theirs."""
    with short_directory() as path, contextlib.ExitStack() as stack:
        server = Service(f"shm://{path}/b")
        stack.callback(server.close)
        far = Command("sidecar", "--listen", "grpc://127.0.0.1:0", "--upstream", server.address)
        stack.callback(far.close)
        near = Command("sidecar", "--listen", f"shm://{path}/f", "--upstream", far.address)
        stack.callback(near.close)
        yield server, far, near
        for sidecar in (far, near):
            assert "failed" not in sidecar.said
            assert sidecar.stop() == 0


@pytest.fixture
def client(pair, connect):
    return connect(pair[2].address)


def test_calls(client, pair):
    assert client.call("echo", "x") == "x"
    assert client.call("keywords", 1, a=[2]) == [[1], {"a": [2]}]
    assert client.call("pid") == pair[0].pid
    data = os.urandom(3_000_000)
    assert client.call("echo", data) == data
    found = [client.submit("add", n, 1) for n in range(50)]
    assert [future.result(20) for future in found] == list(range(1, 51))
    client.notify("remember", "by gRPC")
    wait_until(lambda: "by gRPC" in client.call("remembered"))
    assert client.call("shmrpc.describe", "count")["streams"] is True


def test_metadata(client):
    sent = {
        "a": "1",
        "Upper": "x",
        "raw": b"\xff",
        "raw-bin": b"\0",
        "t": " \u00e9",
        "": "",
        "te": "x",
    }
    assert client.call("metadata", metadata=sent) == sent
    future = client.submit("metadata", metadata={"big": "x" * 7000})
    assert len(future.result(20)["big"]) == 7000
    with client.stream(
        "described", [1], {"end": "trailing", "r": b"1"}, metadata={"m": "2"}
    ) as call:
        assert call.initial_metadata == {"first": "initial", "m": "2"}
        assert list(call) == [1]
        assert call.trailing_metadata == {"end": "trailing", "r": b"1"}
    tag = f"meta {time.monotonic()}"
    with client.open("quiet", tag, timeout=40) as call:
        assert call.initial_metadata == {"early": "yes"}
        client.call("go", tag)
        assert call.result() == "done"


def test_errors(client):
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call("abort", "NOT_FOUND", "no such order", {"id": 7})
    error = caught.value
    assert (error.type, error.code, error.message) == ("Abort", "NOT_FOUND", "no such order")
    assert error.details == {"id": 7}
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call("inner_type_error")
    assert "in inner_type_error" in caught.value.remote_traceback
    with pytest.raises(shmrpc.MethodNotFound):
        client.call("no_such_method")
    with pytest.raises(shmrpc.RemoteError) as caught:
        client.call(
            "abort", "ABORTED", "x" * 20_000, {"y": "z" * 20_000}
        )  # more than headers carry
    assert (caught.value.code, caught.value.type) == ("ABORTED", "Abort")
    with pytest.raises(shmrpc.RemoteError, match="call it by"):
        client.call("count", 3)


def test_streams(client):
    assert list(client.stream("count", 500)) == list(range(500))
    with client.open("total", start=5) as call:
        for number in range(500):
            call.send(number)
        assert call.result() == sum(range(500)) + 5
    with client.open("parrot", "tag") as call:
        for item in ("a", b"b", None, [1]):
            call.send(item)
            assert next(call) == item
        call.close_send()
        assert list(call) == []
    stream = client.stream("fail_after", [1, 2], "abort", "ABORTED", "late", {"x": 1})
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(shmrpc.RemoteError, match="late") as caught:
        next(stream)
    assert caught.value.details == {"x": 1}
    with client.open("idle") as call:
        assert call.result() == "took none"
    with client.open("lengths") as call:
        call.send(bytes(300_000))
        assert call.result() == [300_000]


def test_a_reader_that_stops_stops_its_writer(client):
    tag = f"slow {time.monotonic()}"
    stream = client.stream("endless", tag, 10_000)
    next(stream)
    counts = collections.deque(maxlen=20)

    def stands_still():
        counts.append(client.call("trace", tag)["items"])
        return len(counts) == 20 and counts[0] == counts[-1]

    wait_until(stands_still, timeout=30)
    stream.close()
    wait_until(lambda: client.call("trace", tag)["end"] == "GeneratorExit")


def test_deadlines_and_cancelling(client):
    assert 0 < client.call("context", timeout=30)["remaining"] < 31
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.call("hold_until_cancelled", timeout=0.3)
    wait_until(lambda: client.call("running") == 0)
    future = client.submit("hold_until_cancelled")
    wait_until(lambda: client.call("running") == 1)
    assert future.cancel()
    wait_until(lambda: client.call("running") == 0)
    tag = f"cancel {time.monotonic()}"
    with client.stream("patient", tag) as stream:
        assert next(stream) == "started"
    wait_until(lambda: (client.call("trace", tag) or {}).get("cancelled"))
    with client.open("collect") as call:
        call.send(1)


def test_outcomes(run, service, connect, directory):
    server = service("shm")
    far = run("--listen", "grpc://127.0.0.1:0", "--upstream", server.address)
    near = run("--listen", "shm://front", "--upstream", far.address)
    client = connect("front")
    running = client.submit("note_and_hold", f"{directory}/ran", "x")
    wait_until(lambda: os.path.exists(f"{directory}/ran"))
    server.kill()
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        running.result(20)
    assert caught.value.outcome == "unknown"
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        client.call("add", 1)
    assert caught.value.outcome == "not_started"
    far.process.kill()
    far.process.wait()

    def outcome():
        with pytest.raises(shmrpc.ConnectionLost) as caught:
            client.call("add", 1)
        return caught.value.outcome

    assert outcome() in {"unknown", "not_started"}  # grpcio may learn of the loss from this call
    wait_until(lambda: outcome() == "not_started", timeout=20)
    port = far.address.rpartition(":")[2]
    again = service(server.address)
    run("--listen", f"grpc://127.0.0.1:{port}", "--upstream", server.address)

    def back():
        with contextlib.suppress(shmrpc.ConnectionLost):
            return client.call("pid", timeout=20) == again.pid

    wait_until(back, timeout=30)
    assert near.stop() == 0


# ---- stock grpcio at either end ----


def generic(channel, kind, name):
    make = getattr(channel, kind)
    return make(f"/shmrpc.Sidecar/{name}")


def test_a_stock_client(pair):
    _, far, _ = pair
    with grpc.insecure_channel(far.address.removeprefix("grpc://")) as channel:
        unary = generic(channel, "unary_unary", "Unary")
        method = (("shmrpc-method", "metadata"), ("user", "ada"))
        answer, call = unary.with_call(msgpack.packb([]), metadata=method, timeout=20)
        assert msgpack.unpackb(answer) == {"user": "ada"}
        answer = unary(
            msgpack.packb([[1], {"b": 2}]),
            metadata=(("shmrpc-method", "add"), ("shmrpc-keywords", "1")),
        )
        assert msgpack.unpackb(answer) == 3
        with pytest.raises(grpc.RpcError) as caught:
            unary(msgpack.packb(["NOT_FOUND", "gone"]), metadata=(("shmrpc-method", "abort"),))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "gone"
        known = dict(caught.value.trailing_metadata())["shmrpc-error-bin"]
        assert msgpack.unpackb(known) == {"type": "Abort", "message": "gone"}
        for wrong, code in (
            ((), grpc.StatusCode.INVALID_ARGUMENT),
            ((("shmrpc-method", "none"),), grpc.StatusCode.UNIMPLEMENTED),
            ((("shmrpc-method", "shmrpc.bytes"),), grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                unary(msgpack.packb([]), metadata=wrong)
            assert caught.value.code() is code
        with pytest.raises(grpc.RpcError) as caught:
            unary(
                msgpack.packb([]),
                metadata=(("shmrpc-method", "hold_until_cancelled"),),
                timeout=0.3,
            )
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stream = generic(channel, "stream_stream", "Stream")
        replies = stream(iter([msgpack.packb([3])]), metadata=(("shmrpc-method", "count"),))
        assert list(replies) == [b"\0" + msgpack.packb(n) for n in range(3)]
        items = [msgpack.packb([]), *(msgpack.packb(n) for n in (1, 2, 3))]
        replies = stream(iter(items), metadata=(("shmrpc-method", "total"),))
        assert list(replies) == [b"\1" + msgpack.packb(6)]
        notify = generic(channel, "unary_unary", "Notify")
        assert notify(msgpack.packb(["stock"]), metadata=(("shmrpc-method", "remember"),)) == b""
        remembered = (("shmrpc-method", "remembered"),)
        wait_until(
            lambda: "stock" in msgpack.unpackb(unary(msgpack.packb([]), metadata=remembered))
        )
        assert call.code() is grpc.StatusCode.OK


class Stock:
    """What a plain gRPC server has to do to be an upstream."""

    def __init__(self):
        self.seen = []
        self.release = threading.Event()

    def unary(self, body, context):
        metadata = dict(context.invocation_metadata())
        method = metadata["shmrpc-method"]
        self.seen.append((method, msgpack.unpackb(body), metadata.get("user")))
        if method == "fail":
            context.abort(grpc.StatusCode.OUT_OF_RANGE, "too far")
        if method == "wait":
            context.add_callback(self.release.set)
            self.release.wait(30)
        context.send_initial_metadata((("first", "1"),))
        context.set_trailing_metadata((("last", "2"),))
        return msgpack.packb([method, *msgpack.unpackb(body)])

    def notify(self, body, context):
        self.seen.append(("notify", msgpack.unpackb(body), None))
        return b""

    def stream(self, messages, context):
        context.send_initial_metadata((("first", "1"),))
        if dict(context.invocation_metadata())["shmrpc-method"] == "sum":
            next(messages)
            yield b"\1" + msgpack.packb(sum(msgpack.unpackb(message) for message in messages))
            return
        for message in messages:
            yield b"\0" + message
        context.set_trailing_metadata((("last", "2"),))


@contextlib.contextmanager
def stock_server(credentials=None):
    stock = Stock()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(stock.unary),
        "Notify": grpc.unary_unary_rpc_method_handler(stock.notify),
        "Stream": grpc.stream_stream_rpc_method_handler(stock.stream),
    }
    generic_handler = grpc.method_handlers_generic_handler("shmrpc.Sidecar", handlers)
    server.add_generic_rpc_handlers((generic_handler,))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield stock, port
    finally:
        server.stop(None).wait()


def test_a_stock_server(run, connect):
    with stock_server() as (stock, port):
        run("--listen", "shm://front", "--upstream", f"grpc://127.0.0.1:{port}")
        client = connect("front")
        future = client.submit("twice", 1, metadata={"user": "ada"})
        assert future.result(20) == ["twice", 1]
        assert (future.initial_metadata, future.trailing_metadata) == (
            {"first": "1"},
            {"last": "2"},
        )
        assert stock.seen == [("twice", [1], "ada")]
        with pytest.raises(shmrpc.RemoteError, match="too far") as caught:
            client.call("fail")
        assert caught.value.code == "OUT_OF_RANGE"
        with client.open("parrot") as call:
            assert call.initial_metadata == {"first": "1"}
            call.send("x")
            assert [next(call), next(call)] == [[], "x"]
            call.close_send()
            assert list(call) == []
            assert call.trailing_metadata == {"last": "2"}
        with client.open("sum") as call:
            call.send(1)
            call.send(2)
            assert call.result() == 3
        client.notify("anything", 7)
        wait_until(lambda: ("notify", [7], None) in stock.seen)
        waiting = client.submit("wait")
        wait_until(lambda: any(entry[0] == "wait" for entry in stock.seen))
        assert waiting.cancel()
        assert stock.release.wait(20)  # it was told


# ---- TLS ----


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def certificates(path, name):
    """A CA, and a certificate that it has signed for this host."""
    base = f"{path}/{name}"
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-keyout", f"{base}-ca.key", "-out", f"{base}-ca.pem")
    openssl(*new, "-x509", "-days", "2", "-subj", f"/CN={name} CA", *ca)
    openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{base}.key", "-out", f"{base}.csr")
    Path(f"{base}.ext").write_text(f"subjectAltName=DNS:{name},DNS:localhost\n")
    sign = ("-CA", f"{base}-ca.pem", "-CAkey", f"{base}-ca.key", "-CAcreateserial")
    signed = ("-in", f"{base}.csr", "-out", f"{base}.pem", "-extfile", f"{base}.ext")
    openssl("x509", "-req", "-days", "2", *sign, *signed)
    return {"ca": f"{base}-ca.pem", "cert": f"{base}.pem", "key": f"{base}.key"}


@pytest.fixture(scope="module")
def keys():
    with short_directory() as path:
        yield {name: certificates(path, name) for name in ("server", "client", "other")}


def pem(**files):
    return [part for name, file in files.items() for part in (f"--{name}", file)]


def test_tls(run, service, connect, keys):
    server = service("shm")
    own = pem(cert=keys["server"]["cert"], key=keys["server"]["key"])
    far = run("--listen", "grpcs://localhost:0", *own, "--upstream", server.address)
    assert far.address.startswith("grpcs://localhost:")
    upstream = ("--upstream", far.address)
    run("--listen", "shm://right", *upstream, *pem(ca=keys["server"]["ca"]))
    assert connect("right").call("pid") == server.pid
    assert list(connect("right").stream("count", 3)) == [0, 1, 2]
    run("--listen", "shm://wrong", *upstream, *pem(ca=keys["other"]["ca"]))
    with pytest.raises(shmrpc.ConnectionLost, match=r"(?i)certificate|handshake") as caught:
        connect("wrong").call("pid", timeout=20)
    assert caught.value.outcome == "not_started"
    run("--listen", "shm://plain", "--upstream", far.address.replace("grpcs", "grpc"))
    with pytest.raises(shmrpc.ConnectionLost):
        connect("plain").call("pid", timeout=20)
    by_number = far.address.replace("localhost", "127.0.0.1")  # which the certificate does not name
    run("--listen", "shm://name", "--upstream", by_number, *pem(ca=keys["server"]["ca"]))
    with pytest.raises(shmrpc.ConnectionLost) as caught:
        connect("name").call("pid", timeout=20)
    assert caught.value.outcome == "not_started"
    assert connect("right").call("pid") == server.pid


def test_mutual_tls(run, service, connect, keys, directory):
    server = service("shm")
    own = pem(ca=keys["client"]["ca"], cert=keys["server"]["cert"], key=keys["server"]["key"])
    far = run("--listen", "grpcs://localhost:0", *own, "--upstream", server.address)
    with open(f"{directory}/near.toml", "w") as file:
        file.write(
            f'listen = "shm://right"\n[upstreams.far]\nendpoints = "{far.address}"\n'
            "keepalive = 30.0\n[upstreams.far.tls]\n"
            f'ca = "{keys["server"]["ca"]}"\ncert = "{keys["client"]["cert"]}"\n'
            f'key = "{keys["client"]["key"]}"\nserver_name = "server"\n'
            '[[routes]]\nupstream = "far"\n'
        )
    run(f"{directory}/near.toml")
    assert connect("right").call("pid") == server.pid
    ca = keys["server"]["ca"]
    for name, certificate in (("none", {}), ("other", keys["other"])):
        shown = pem(**{**certificate, "ca": ca})
        run("--listen", f"shm://{name}", "--upstream", far.address, *shown)
        with pytest.raises(shmrpc.ConnectionLost):
            connect(name).call("pid", timeout=20)
    assert connect("right").call("pid") == server.pid


def test_a_stock_server_with_tls(run, connect, keys):
    pairs = [tuple(Path(keys["server"][part]).read_bytes() for part in ("key", "cert"))]
    with stock_server(grpc.ssl_server_credentials(pairs)) as (_, port):
        upstream = ("--upstream", f"grpcs://localhost:{port}", *pem(ca=keys["server"]["ca"]))
        run("--listen", "shm://front", *upstream)
        assert connect("front").call("twice", 1) == ["twice", 1]


def test_calls_take_turns_at_the_hosts_of_a_name(run, service, connect, directory):
    """One name, two addresses: DNS round-robin, also after one of them has gone."""
    servers = [service(f"shm://{directory}/{name}") for name in "ab"]
    first = run("--listen", "grpc://127.0.0.1:0", "--upstream", servers[0].address)
    port = first.address.rpartition(":")[2]
    second = run(
        *("--listen", f"grpc://127.0.0.2:{port}", "--upstream", servers[1].address),
        "--allow-remote",
    )
    hosts = Path(directory, "hosts")
    hosts.write_text("127.0.0.1 localhost\n127.0.0.1 payments\n127.0.0.2 payments\n")
    near = ("--listen", "shm://front", "--upstream", f"grpc://payments:{port}")
    run(*near, prefix=in_mount_namespace(f"mount --bind {hosts} /etc/hosts"))
    client = connect("front")
    pids = [server.pid for server in servers]
    wait_until(lambda: {client.call("pid", timeout=20) for _ in range(4)} == set(pids))
    found = [client.call("pid", timeout=20) for _ in range(40)]
    assert [found.count(pid) for pid in pids] == [20, 20]
    second.close()

    def settled():
        try:
            return {client.call("pid", timeout=20) for _ in range(8)} == {pids[0]}
        except shmrpc.ConnectionLost:
            return False

    wait_until(settled, timeout=20)


def refused(*arguments):
    command = Command("sidecar", *arguments, ready=False)
    try:
        assert command.wait() == 2
        assert command.said.count("\n") == 1
        return command.said
    finally:
        command.close()


def test_what_is_refused_at_the_start(directory, keys):
    upstream = ("--upstream", "shm://x")
    said = refused("--listen", "grpcs://localhost:0", *upstream)
    assert "command line: " in said
    assert "--cert and --key" in said
    missing = pem(cert=f"{directory}/none.pem", key=keys["server"]["key"])
    said = refused("--listen", "grpcs://localhost:0", *missing, *upstream)
    assert f"can't read the certificate {directory}/none.pem: No such file" in said
    swapped = pem(cert=keys["server"]["key"], key=keys["server"]["cert"])
    said = refused("--listen", "grpcs://localhost:0", *swapped, *upstream)
    assert "can't use the certificate" in said
    of_another = pem(cert=keys["server"]["cert"], key=keys["other"]["key"])
    said = refused("--listen", "grpcs://localhost:0", *of_another, *upstream)
    assert "key values mismatch" in said
    no_ca = pem(ca=keys["server"]["key"])
    said = refused("--listen", "shm://front", "--upstream", "grpcs://localhost:1", *no_ca)
    assert "can't use the CA certificate" in said
    near = ("--listen", "shm://front")
    said = refused(*near, "--upstream", "grpcs://localhost:1", *pem(ca=f"{directory}/none.pem"))
    assert "CA certificate" in said
    with stock_server() as (_, port):
        said = refused("--listen", f"grpc://127.0.0.1:{port}", *upstream)
        assert f"can't listen at grpc://127.0.0.1:{port}: address already in use" in said
