"""``shmrpc call`` of streams and from standard input, ``top``, completion: real processes."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command import Place, assert_complains
from conftest import short_directory, wait_until

import shmrpc

WORK = """
import os, threading, time
import shmrpc

server = shmrpc.Server("work", "tcp://127.0.0.1:0", workers=2)
release = threading.Event()

@server.method
def add(a, b=10):
    "Add two numbers."
    return a + b

@server.method
def many(*values, **more):
    return [*values, more]

@server.method
def count(n, fail=False):
    "Count.\\n\\nAs far as told."
    for i in range(n):
        yield i
    if fail:
        raise ValueError("at the end")

@server.method(requests=True)
def total(requests, start=0):
    return sum(requests, start)

@server.method(requests=True)
def double(requests):
    for value in requests:
        yield 2 * value

@server.method(requests=True)
def first(requests):
    return next(iter(requests))

@server.method
def hold():
    release.wait()

@server.method(name="two words")
def two_words():
    pass

kept = []

@server.method
def keep(value):
    kept.append(value)
    return len(value)

@server.method
def large_view(size):
    return memoryview(bytes(size))
"""


@pytest.fixture(scope="module")
def place():
    with short_directory() as directory:
        yield Place(directory, {"work": WORK})


@pytest.fixture(scope="module")
def work(place):
    with place.serving("work") as process:
        yield process
        assert process.poll() is None, "the server died"


@pytest.fixture
def fresh():
    with short_directory() as directory:
        yield Place(directory, {"work": WORK})


# ---- serve ----

ASYNC = """
import os
from shmrpc import aio

server = aio.Server("async")

@server.method
async def pid():
    return os.getpid()
"""


def test_an_asynchronous_server_is_served(fresh):
    Path(fresh.modules, "asynchronous.py").write_text(ASYNC)
    with fresh.serving("asynchronous") as server:
        assert fresh.run("call", "async", "pid").stdout == f"{server.pid}\n"
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert os.listdir(fresh.sockets) == []
    with fresh.serving("asynchronous") as server:
        assert_complains(fresh.run("serve", "asynchronous"), 2, "in use", str(server.pid))


# ---- call: streams ----


def test_a_stream_is_printed_line_by_line(place, work):
    result = place.run("call", "work", "count", "3")
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n1\n2\n", "")


def test_a_stream_that_fails_at_its_end(place, work):
    result = place.run("call", "work", "count", "2", "-k", "fail=true")
    assert (result.returncode, result.stdout) == (1, "0\n1\n")
    assert "at the end" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "args,text,printed",
    [
        (["total"], "1\n2\n3\n", "6\n"),
        (["total", "-"], "1 2\n3", "6\n"),
        (["total", "100", "-"], "1\n", "101\n"),
        (["total", "-k", "start=5"], "", "5\n"),
        (["double"], '1\n"ab"\n[\n1\n]\n', '2\n"abab"\n[1, 1]\n'),
        (["first"], "7\n8\n", "7\n"),
        (["add", "-"], "1 2", "3\n"),
        (["add", "-"], '"a"\n\n  "b"\n', '"ab"\n'),
        (["many", "1", "-", "4"], "2\n{\n}\n", "[1, 2, {}, 4, {}]\n"),
        (["many", "-"], "", "[{}]\n"),
        (["many", "-"], '{"$bytes": "AP8="}', '[{"$bytes": "AP8="}, {}]\n'),
        (["count", "-"], "2\n", "0\n1\n"),
    ],
)
def test_arguments_and_messages_from_standard_input(place, work, args, text, printed):
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    result = place.run("call", "work", *args, stdin=read)
    os.close(read)
    assert (result.returncode, result.stdout, result.stderr) == (0, printed, "")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_messages_are_sent_and_replies_printed_as_they_come(place, work, transport):
    address = re.search(rf"{transport}://[^ ,]+", work.banner)[0]
    with place.popen("call", address, "double", stdin=subprocess.PIPE) as process:
        for value in (1, 20, 300):
            process.stdin.write(f"{value}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{2 * value}\n"
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_call_that_ends_while_standard_input_goes_on(place, work):
    with place.popen("call", "work", "first", stdin=subprocess.PIPE) as process:
        process.stdin.write("5\n")
        process.stdin.flush()
        assert process.stdout.readline() == "5\n"
        assert process.wait(20) == 0  # though nobody has closed its input


@pytest.mark.parametrize(
    "args,text,complaint",
    [
        (["add", "-"], "1 x", "value 2 is not valid JSON"),
        (["add", "-"], "[1,", "value 1 is not valid JSON"),
        (["add", "-"], '1\n"open', "value 2 is not valid JSON"),
        (["add", "-"], "[" * 100_000, "nested too deeply"),
        (["total"], "1\n2\nNaN\n", "value 3 is not valid JSON"),
        (["double"], "x", "value 1 is not valid JSON"),
        (["total", "-", "-"], "1", "after the arguments"),
        (["total", "-", "1"], "1", "after the arguments"),
    ],
)
def test_wrong_standard_input(place, work, args, text, complaint):
    with place.popen("call", "work", *args, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(text, timeout=40)
    assert process.returncode == 2
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert out == ""


# ---- call: what the server tells of itself ----


def test_call_of_what_is_built_in(place, work):
    health = place.run("call", "work", "shmrpc.health")
    assert (health.returncode, json.loads(health.stdout)) == (0, {"status": "serving"})
    stats = json.loads(place.run("call", "work", "shmrpc.stats").stdout)
    assert stats["pid"] == work.pid
    described = json.loads(place.run("call", "work", "shmrpc.describe", '"add"').stdout)
    assert described["signature"] == "(a, b=10)"
    assert json.loads(place.run("call", "work", "shmrpc.describe", '"no"').stdout) is None
    everything = json.loads(place.run("call", "work", "shmrpc.describe").stdout)
    assert "count" in [method["name"] for method in everything]
    assert_complains(place.run("call", "work", "shmrpc.health", "1"), 2, "shmrpc.health")
    assert_complains(place.run("call", "nobody", "shmrpc.health"), 2, "nobody")


# ---- top ----


def stuck(place, count=3):
    """A server whose two workers hold calls for ever, with one more in the queue."""
    server = place.serving("work")
    process = server.__enter__()
    address = f"shm://{place.sockets}/work.sock"
    clients = [shmrpc.connect(address) for _ in range(count)]
    for client in clients:
        client.submit("hold")
    with shmrpc.inspect(address) as inspector:
        wait_until(lambda: len(inspector.stats()["slowest"]) == 2 and inspector.stats()["queued"])
    return server, process, clients


@pytest.fixture
def stuck_server(fresh):
    server, process, clients = stuck(fresh)
    yield process
    for client in clients:
        client.close()
    process.kill()
    server.__exit__(None, None, None)


def test_top_shows_a_server_whose_handlers_are_stuck(fresh, stuck_server):
    result = fresh.run("top", "--once", "-i", "0.3")
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()]
    [row] = [row for row in rows if row[:1] == ["shm://work"]]
    assert row[1] == str(stuck_server.pid)
    held = [row for row in rows if row[:2] == ["hold", str(stuck_server.pid)]]
    assert len(held) == 3  # the method, and two calls of it
    assert all(row[-1] == str(os.getpid()) for row in held[1:])  # who called

    result = fresh.run("top", "work", "--once", "--json", "-i", "0.3")
    [look] = json.loads(result.stdout)
    assert (look["address"], look["pid"], look["uid"]) == ("work", stuck_server.pid, os.getuid())
    assert (look["in_flight"], look["queued"], look["status"]) == (2, 1, "serving")
    assert look["queue_delay_seconds"] >= 0.3
    assert [call["method"] for call in look["slowest"]] == ["hold", "hold"]
    assert all(call["seconds"] >= 0.3 for call in look["slowest"])


def test_top_shows_what_large_values_take(fresh):
    """The server holds one that came in, and its caller one that went out."""
    with fresh.serving("work") as server:
        address = f"shm://{fresh.sockets}/work.sock"
        with shmrpc.connect(address) as client:
            assert client.call("keep", memoryview(bytes(1 << 20))) == 1 << 20
            kept = client.call("large_view", 1 << 20)
            [look] = json.loads(fresh.run("top", "work", "--once", "--json", "-i", "0.1").stdout)
            assert (look["pinned_blocks"], look["pinned_bytes"]) == (1, 1 << 20)
            assert look["arena_bytes"] >= look["arena_used_bytes"] >= 1 << 20
            rows = fresh.run("top", "work", "--once", "-i", "0.1").stdout.splitlines()
            [row] = [row for row in rows if str(server.pid) in row and "work" in row]
            assert "1 (1 MiB)" in row
            assert "1 MiB/" in row
            assert len(kept) == 1 << 20


def test_ls_and_ping_of_a_server_whose_handlers_are_stuck(fresh, stuck_server):
    [entry] = json.loads(fresh.run("ls", "--json").stdout)
    assert (entry["pid"], entry["status"], entry["problem"]) == (stuck_server.pid, "serving", None)
    assert entry["connections"] == 3
    health = fresh.run("call", "work", "shmrpc.health", "--timeout", "20")
    assert json.loads(health.stdout) == {"status": "serving"}


def test_top_times_the_calls_while_it_looks(fresh):
    with (
        fresh.serving("work") as server,
        shmrpc.connect(f"shm://{fresh.sockets}/work.sock") as client,
        fresh.popen("top", "work", "--json", "-i", "0.2") as top,
    ):
        done = threading.Event()

        def call():
            while not done.is_set():
                client.call("add", 1)

        caller = threading.Thread(target=call)
        caller.start()
        try:

            def look():
                [seen] = json.loads(top.stdout.readline())
                return seen if seen["p50_seconds"] else None

            seen = wait_until(look, timeout=30)
        finally:
            done.set()
            caller.join()
            top.send_signal(signal.SIGINT)
        assert seen["pid"] == server.pid
        assert seen["calls_per_second"] > 0
        assert 0 < seen["p50_seconds"] <= seen["p99_seconds"] < 60
        [method] = [method for method in seen["methods"] if method["name"] == "add"]
        assert 0 < method["p50_seconds"] <= method["p99_seconds"]
        assert top.wait(20) == 130


@pytest.mark.thorough
def test_top_on_a_terminal(fresh):
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    shown = b""

    def read():
        """Some of what it shows, b"" if it has ended; a terminal that nobody reads stops it."""
        assert select.select([ours], [], [], 40)[0], f"nothing came after {shown[-2000:]!r}"
        try:
            return os.read(ours, 65536)
        except OSError:  # nobody has the other end any more
            return b""

    with (
        fresh.serving("work"),
        fresh.popen("top", "-i", "0.1", stdout=theirs, env=env) as top,
    ):
        try:
            os.close(theirs)
            while shown.count(b"shm://work") < 2:
                more = read()
                assert more, top.stderr.read()
                shown += more
            top.send_signal(signal.SIGINT)
            end = time.monotonic() + 40
            while read():  # to the end, at which it lets go of the terminal
                assert time.monotonic() < end, "it goes on after Ctrl-C"
            assert top.wait(20) == 130
        finally:
            top.kill()
            os.close(ours)


def test_top_of_nobody(place, fresh):
    result = fresh.run("top", "--once", "--json", "-i", "0.05")
    assert (result.returncode, result.stdout) == (0, "[]\n")
    result = fresh.run("top", "nobody", "--once", "--json", "-i", "0.05")
    assert (result.returncode, result.stdout) == (1, "[]\n")
    assert "no server has made" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("args", [["no name"], ["-i", "0"], ["-i", "nan"], ["--onc"]])
def test_wrong_usage_of_top(place, args):
    assert_complains(place.run("top", *args), 2, "--help")


# ---- completion ----


def completions(place, *words, shell="bash"):
    """What the shell would be offered for the last of these words."""
    env = {"_SHMRPC_COMPLETE": f"{shell}_complete"}
    if shell == "fish":
        env |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": words[-1]}
    else:
        env |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    program = Path(sys.executable).with_name("shmrpc")
    run = subprocess.run(
        [program], env={**place.env, **env}, capture_output=True, text=True, timeout=40, check=True
    )
    assert run.stderr == ""
    return run.stdout.split("\n")[:-1] if run.stdout.strip() else []


def test_methods_are_completed(place, work):
    found = completions(place, "shmrpc", "call", "work", "")
    assert "plain,add" in found
    assert "plain,shmrpc.stats" in found
    assert completions(place, "shmrpc", "call", "work", "cou") == ["plain,count"]
    assert completions(place, "shmrpc", "call", "work", "cou", shell="zsh") == [
        "plain",
        "count",
        "(n, fail=False) Count.",
    ]


def test_services_and_commands_are_completed(place, work):
    assert completions(place, "shmrpc", "call", "") == ["plain,work"]
    assert completions(place, "shmrpc", "top", "w") == ["plain,work"]
    assert completions(place, "shmrpc", "to") == ["plain,top"]


@pytest.mark.parametrize(
    "words",
    [
        ["call", "nobody", "a"],
        ["call", "no name", "a"],
        ["call", "tcp://127.0.0.1:1", ""],
        ["call", "work", "unknown"],
    ],
)
def test_what_has_no_completions(place, work, words):
    assert completions(place, "shmrpc", *words) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(place, shell):
    result = place.run("completion", shell)
    assert result.returncode == 0
    assert f"_SHMRPC_COMPLETE={shell}_complete" in result.stdout


def test_the_script_for_no_shell(place):
    assert_complains(place.run("completion", "csh"), 2, "csh", "--help")


@pytest.mark.parametrize(
    "line, offered",
    [
        ("shmrpc call work cou", ["count"]),
        ("shmrpc call tcp://127.0.0.1:PORT cou", ["count"]),
        ("shmrpc call shm://DIRECTORY/work.sock cou", ["count"]),
        ("shmrpc ping shm://wo", ["//work"]),
        ("shmrpc ping shm:", ["//work"]),
        ("shmrpc call work ", None),
        ("shmrpc call work 'cou", ["count"]),
    ],
)
def test_bash_completes(place, work, line, offered):
    """What bash itself makes of the line after <Tab>; it takes words apart at colons."""
    port = re.search(r"tcp://127.0.0.1:(\d+)", work.banner)[1]
    line = line.replace("PORT", port).replace("DIRECTORY", place.sockets)
    words = [word for part in line.split(" ") for word in re.split("(:)", part) if word]
    words += [""] if line[-1].isspace() else []
    ask = """
eval "$(shmrpc completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_CWORD=$(($# - 2))
COMP_WORDS=("${@:2}")
_shmrpc_completion shmrpc
printf '%s\\n' "${COMPREPLY[@]}"
"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "--norc", "-c", ask, "bash", line, *words],
        env={**place.env, "PATH": path},
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert run.stderr == ""
    found = run.stdout.splitlines()
    assert found == offered if offered else {"count", "add", "shmrpc.stats"} <= set(found)
    assert "two words" not in found
