"""Loggers, the access log, and ``SHMRPC_LOG``."""

import ast
import asyncio
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wait_until

import shmrpc
from shmrpc import aio, logs
from shmrpc.interceptors import AccessLog

PACKAGE = Path(shmrpc.__file__).parent


@pytest.fixture
def everything(caplog):
    caplog.set_level(logging.DEBUG, logger="shmrpc")
    return caplog


def records(caplog, name):
    return [record for record in caplog.records if record.name == name]


def serve(server):
    @server.method
    def add(a, b):
        return a + b

    @server.method
    def fail():
        raise shmrpc.Abort("NOT_FOUND", "no such thing")

    @server.method
    def count(n):
        yield from range(n)

    return server


def test_nothing_at_info_for_each_call(directory, everything):
    with serve(shmrpc.Server("calc")), shmrpc.connect("calc") as client:
        before = len(everything.records)
        client.call("add", 1, 2)
        client.submit("add", 1, 2).result()
        client.notify("add", 1, 2)
        assert list(client.stream("count", 3)) == [0, 1, 2]
        with pytest.raises(shmrpc.RemoteError):
            client.call("fail")
        assert everything.records[before:] == []


def test_what_the_layers_say(directory, everything):
    with serve(shmrpc.Server("calc")), shmrpc.connect("calc") as client:
        client.call("add", 1, 2)
    said = {(record.name, record.levelname) for record in everything.records}
    assert ("shmrpc.server", "INFO") in said
    assert ("shmrpc.acceptor", "DEBUG") in said
    assert ("shmrpc.client", "DEBUG") in said
    assert all(level in {"INFO", "DEBUG"} for _, level in said)


def test_every_logger_is_named_in_the_list():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                used |= {argument.value for argument in node.args}
    listed = set(re.findall(r"^    (shmrpc\.\w+) ", logs.__doc__, re.MULTILINE))
    assert used - {"shmrpc"} == listed


# ---- the access log ----


def access(caplog, side):
    return [
        (record.kind, record.method, record.code)
        for record in records(caplog, "shmrpc.access")
        if record.side == side
    ]


EXPECTED = [
    ("unary", "add", "OK"),
    ("unary", "fail", "NOT_FOUND"),
    ("stream", "count", "OK"),
    ("notify", "add", "OK"),
]


def test_access_log(directory, everything):
    around = [AccessLog()]
    with (
        serve(shmrpc.Server("calc", interceptors=around)),
        shmrpc.connect("calc", interceptors=around) as client,
    ):
        client.call("add", 1, 2)
        with pytest.raises(shmrpc.RemoteError):
            client.call("fail")
        assert list(client.stream("count", 3)) == [0, 1, 2]
        client.notify("add", 1, 2)
        wait_until(lambda: len(access(everything, "server")) == 4)
        client.submit("add", 1, 2).result()
        wait_until(lambda: len(access(everything, "client")) == 5)
    assert access(everything, "client")[:4] == EXPECTED
    assert access(everything, "client")[4] == ("submit", "add", "OK")
    assert access(everything, "server")[:4] == EXPECTED
    for record in records(everything, "shmrpc.access"):
        assert 0 <= record.seconds < 60
        assert "shm://calc" in record.peer
        assert record.levelname == "INFO"
        assert re.fullmatch(
            r"(client|server) \w+ '\w+' (from|to) shm://calc \(pid \d+\) [A-Z_]+ [\d.]+ ms",
            record.getMessage(),
        )


def test_asynchronous_access_log(directory, everything):
    async def main():
        around = [AccessLog()]
        server = serve(aio.Server("calc", interceptors=around))
        async with server, aio.connect("calc", interceptors=around) as client:
            await client.call("add", 1, 2)
            with pytest.raises(shmrpc.RemoteError):
                await client.call("fail")
            assert [item async for item in client.stream("count", 3)] == [0, 1, 2]
            await client.notify("add", 1, 2)
            while len(access(everything, "server")) < 4:
                await asyncio.sleep(0.005)

    asyncio.run(main())
    assert access(everything, "client") == EXPECTED
    assert access(everything, "server") == EXPECTED


def test_access_log_that_nobody_wants(directory, caplog):
    caplog.set_level(logging.WARNING, logger="shmrpc")
    around = [AccessLog()]
    with (
        serve(shmrpc.Server("calc", interceptors=around)),
        shmrpc.connect("calc", interceptors=around) as client,
    ):
        assert client.call("add", 1, 2) == 3
    assert records(caplog, "shmrpc.access") == []


# ---- SHMRPC_LOG ----

PROGRAM = """
import logging, sys
{first}
import shmrpc
with shmrpc.Server("calc"), shmrpc.connect("calc") as client:
    print(client.call("shmrpc.health"))
"""


def run(level, first="", directory=""):
    environment = {"SHMRPC_DIR": directory, **({} if level is None else {"SHMRPC_LOG": level})}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert done.stdout == "{'status': 'serving'}\n"
    return done.stderr


@pytest.mark.parametrize(
    "level,said,unsaid",
    [
        ("debug", ["DEBUG shmrpc.client: connected to shm://calc", "INFO shmrpc.server"], []),
        ("INFO", ["INFO shmrpc.server: serving at shm://calc"], ["DEBUG"]),
        ("warning", [], ["INFO", "DEBUG"]),
        (None, [], ["shmrpc"]),
        ("", [], ["shmrpc"]),
        ("loud", ["SHMRPC_LOG is 'loud'; use debug, info, warning, error"], ["INFO"]),
    ],
)
def test_shmrpc_log(directory, level, said, unsaid):
    text = run(level, directory=directory)
    for part in said:
        assert part in text
    for part in unsaid:
        assert part not in text


def test_a_program_that_configures_logging_gets_the_records(directory):
    first = "logging.basicConfig(format='mine %(name)s %(message)s', level=logging.WARNING)"
    lines = run("info", first, directory).splitlines()
    assert lines
    assert all(line.startswith("mine shmrpc.") for line in lines)


def test_the_command_logs_as_well(directory):
    done = subprocess.run(
        [sys.executable, "-m", "shmrpc.cli", "ping", "calc", "-c", "1"],
        env={"SHMRPC_DIR": directory, "SHMRPC_LOG": "debug"},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 1
    with shmrpc.Server("calc"):
        done = subprocess.run(
            [sys.executable, "-m", "shmrpc.cli", "ping", "calc", "-c", "1"],
            env={"SHMRPC_DIR": directory, "SHMRPC_LOG": "debug"},
            capture_output=True,
            text=True,
            timeout=40,
            check=True,
        )
    assert "DEBUG shmrpc.client: connected to shm://calc" in done.stderr
