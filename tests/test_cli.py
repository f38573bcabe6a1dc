"""The ``shmrpc`` command: every subcommand as a real process, with good input and bad."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command import COMMAND, Place, assert_complains
from conftest import short_directory, wait_until

import shmrpc

CALC = """
import os, time
import shmrpc

server = shmrpc.Server("calc", f"unix://{os.environ['SHMRPC_DIR']}/plain.sock", "tcp://127.0.0.1:0")

@server.method
def add(a, b=10):
    return a + b

@server.method
def echo(value):
    return value

@server.method
def keywords(**kwargs):
    return kwargs

@server.method
def fail():
    raise ValueError("first\\nsecond \\x1b[31mred")

@server.method
def abort():
    raise shmrpc.Abort("NOT_FOUND", "no such order", details={"id": 7})

@server.method
def mixed():
    return {1: b"x", "plain": {"$bytes": "no bytes"}, "inf": float("inf"), "none": None}

@server.method
def sleep(seconds, path=""):
    if path:
        open(path, "w").close()
    time.sleep(seconds)
    return "slept"

def make():
    other = shmrpc.Server("made")
    other.method(add)
    return other

def needs(argument):
    return argument

def raising():
    raise RuntimeError("boo\\nhoo")

thing = 3
"""

MODULES = {
    "calc": CALC,
    "remote": "import shmrpc\nserver = shmrpc.Server('tcp://0.0.0.0:0')\n",
    "remote_aio": "from shmrpc import aio\nserver = aio.Server('tcp://0.0.0.0:0')\n",
    "bad_import": "import surely_not_installed\n",
    "bad_syntax": "def f(:\n",
    "bad_exit": "raise SystemExit(3)\n",
    "bad_value": "import json\njson.loads('x')\n",
    "interrupted": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n",
}


@pytest.fixture(scope="module")
def place():
    with short_directory() as directory:
        yield Place(directory, MODULES)


@pytest.fixture
def fresh():
    """A place of its own for a test that starts and kills servers."""
    with short_directory() as directory:
        yield Place(directory, MODULES)


@pytest.fixture(scope="module")
def calc(place):
    """A served calc.py, for tests that leave it as it was."""
    with place.serving("calc") as process:
        yield process
        assert process.poll() is None, "the server died"


def address_in(banner, transport):
    return re.search(rf"{transport}://[^ ,]+", banner)[0]


# ---- the command itself ----


def test_version(place):
    result = place.run("--version")
    assert (result.returncode, result.stdout) == (0, f"shmrpc {shmrpc.__version__}\n")


def test_without_a_command_it_shows_its_help(place):
    result = place.run()
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("demo", "serve", "call", "ping", "ls", "top", "completion"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "command", ["", "demo", "serve", "call", "ping", "ls", "top", "completion"]
)
def test_help(place, command):
    result = place.run(*filter(None, [command, "--help"]))
    assert place.run(*filter(None, [command, "-h"])).stdout == result.stdout
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: shmrpc {command}".rstrip())
    assert f"shmrpc {command}".rstrip() in result.stdout.split("\n", 1)[1] or command == "demo"
    assert "\b" not in result.stdout
    assert "noqa" not in result.stdout


def test_installed_command():
    """The entry point is this command."""
    installed = Path(sys.executable).with_name("shmrpc")
    run = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"shmrpc {shmrpc.__version__}\n"


@pytest.mark.parametrize(
    "args,text",
    [
        (["nonsense"], "'nonsense'"),
        (["--nonsense"], "--nonsense"),
        (["ls", "--jso"], "--jso"),
        (["ls", "extra"], "extra"),
        (["call"], "ADDRESS"),
        (["call", "calc"], "METHOD"),
        (["ping"], "ADDRESS"),
        (["ping", "calc", "-c", "0"], "--count"),
        (["ping", "calc", "-c", "many"], "many"),
        (["ping", "calc", "-i", "-1"], "--interval"),
        (["ping", "calc", "-i", "nan"], "--interval"),
        (["ping", "calc", "--timeout", "0"], "--timeout"),
        (["ping", "no name"], "no name"),
        (["serve"], "MODULE"),
        (["serve", "calc", "--grace", "inf"], "--grace"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["demo", "extra"], "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(place, args, text):
    assert_complains(place.run(*args), 2, text, "--help")


@pytest.mark.parametrize("reader", ["closed pipe", "full device"])
def test_output_that_nobody_takes(place, reader):
    if reader == "closed pipe":
        end, target = os.pipe()
        os.close(end)
    else:
        target = os.open("/dev/full", os.O_WRONLY)
    try:
        result = place.run("--help", stdout=target)
    finally:
        os.close(target)
    assert result.returncode == 1
    assert result.stderr == (
        "" if reader == "closed pipe" else "shmrpc: can't write the output: no space is left\n"
    )


WITHOUT = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *COMMAND]


@pytest.mark.parametrize("args", [["--help"], ["ls"], ["call", "calc", "add", "1", "2"]])
def test_without_standard_streams(place, calc, args):
    """No socket gets the number of one that is closed: what is printed would go to a peer."""
    result = place.run(*args, command=WITHOUT)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_server_without_standard_streams(fresh):
    with fresh.popen("serve", "calc", command=WITHOUT) as server:
        assert server.stderr.readline().startswith("serving ")
        for fd in (0, 1):
            assert os.readlink(f"/proc/{server.pid}/fd/{fd}") == os.devnull
        server.terminate()
        assert server.wait(40) == 0


# ---- call ----


@pytest.mark.parametrize(
    "args,printed",
    [
        (["add", "1", "2"], "3"),
        (["add", "-1", "-2.5e1"], "-26.0"),
        (["add", "1", "-k", "b=5"], "6"),
        (["add", "--keyword", "a=1", "-kb=-5"], "-4"),
        (["keywords", "-k", 'text="a=b"'], '{"text": "a=b"}'),
        (["echo", "null", "--timeout", "10"], "null"),
        (["--timeout", "10", "echo", '{"a": [1, true, "ü€\\n"]}'], '{"a": [1, true, "ü€\\n"]}'),
        (["echo", "18446744073709551615"], "18446744073709551615"),
        (["echo", '{"$bytes": "AP8="}'], '{"$bytes": "AP8="}'),
        (["echo", '{"$float": "nan"}'], '{"$float": "nan"}'),
        (["echo", '{"$map": [[1, "a"], [null, {"$bytes": ""}]]}'], None),
        (["echo", '{"$other": 1}'], '{"$map": [["$other", 1]]}'),
        (["echo", '{"$map": [["$other", 1]]}'], None),
        (["echo", '{"$bytes": 1, "and": 2}'], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_call(place, calc, args, printed):
    result = place.run("call", "calc", *args)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{args[-1] if printed is None else printed}\n"


def test_call_shows_what_json_has_no_notation_for(place, calc):
    result = place.run("call", "calc", "mixed")
    assert json.loads(result.stdout) == {
        "$map": [
            [1, {"$bytes": "eA=="}],
            ["plain", {"$map": [["$bytes", "no bytes"]]}],
            ["inf", {"$float": "inf"}],
            ["none", None],
        ]
    }


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp"])
def test_call_at_any_transport(place, calc, transport):
    result = place.run("call", address_in(calc.banner, transport), "add", "1", "2")
    assert (result.returncode, result.stdout) == (0, "3\n")


def test_call_prints_what_the_terminal_can_show(place, calc):
    result = place.run("call", "calc", "echo", '"\\u20ac"', env={"PYTHONIOENCODING": "latin-1"})
    assert (result.returncode, result.stdout) == (0, '"\\u20ac"\n')


@pytest.mark.parametrize(
    "args,texts",
    [
        (["add", "1", "word"], ["argument 2", "not valid JSON", "character 1", "quotes"]),
        (["add", '{"a":'], ["argument 1", "character 6"]),
        (["add", ""], ["argument 1", "character 1"]),
        (["add", "1", "NaN"], ["argument 2", '{"$float": "nan"}']),
        (["add", "1", "-Infinity"], ["-Infinity"]),
        (["add", '{"$bytes": "a"}'], ["argument 1", "base64"]),
        (["add", '{"$bytes": 1}'], ["argument 1", "base64"]),
        (["add", '{"$float": "one"}'], ["argument 1", "inf"]),
        (["add", '{"$map": [[[], 1]]}'], ["argument 1", "unhashable"]),
        (["add", '{"$map": 1}'], ["argument 1", "[key, value]"]),
        (["add", "[" * 100_000], ["argument 1", "nested too deeply"]),
        (["add", "9" * 5000], ["argument 1"]),
        (["add", "99999999999999999999"], ["argument 1", "can't be sent"]),
        (["add", '"\\ud800"'], ["argument 1", "can't be sent"]),
        (["add", "1\n2"], ["argument 1", "1\\n2"]),
        (["add", "--tiemout", "5"], ["--tiemout", "--help"]),
        (["add", "-x"], ["-x"]),
        (["add", "-k", "b"], ["'b'", "KEY=JSON"]),
        (["add", "-k", "=1"], ["'=1'", "KEY=JSON"]),
        (["add", "-k", "b=word"], ["keyword 'b'", "not valid JSON"]),
        (["add", "-k", "b=1", "-k", "b=2"], ["'b'", "twice"]),
        (["add", "-k", "timeout=1"], ["'timeout'"]),
        (["add", "--timeout", "-1"], ["--timeout"]),
        (["add", "--timeout", "soon"], ["soon"]),
        (["nonsense"], ["UNIMPLEMENTED", "'nonsense'", "shm://calc"]),
        (["non\nsense\x1b[31m"], ["UNIMPLEMENTED"]),
        ([""], ["method"]),
        (["x" * 1000], ["method"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_call_with_wrong_input(place, calc, args, texts):
    assert_complains(place.run("call", "calc", *args), 2, *texts)


@pytest.mark.parametrize(
    "address,text",
    [
        ("nobody", "nobody.sock"),
        ("tcp://127.0.0.1:1", "127.0.0.1:1"),
        ("unix:///nowhere/x.sock", "/nowhere/x.sock"),
        ("http://x", "http"),
        ("tcp://x", "PORT"),
        ("unix://relative", "absolute"),
        ("two words", "two words"),
        ("", "address"),
        (f"shm:///{'x' * 200}", "longer"),
    ],
)
def test_call_without_a_server(place, address, text):
    assert_complains(place.run("call", address, "add", "1"), 2, text)


def test_call_of_somebody_who_never_answers(place, fresh):
    path = f"{fresh.sockets}/silent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        result = place.run("call", f"shm://{path}", "add", "--timeout", "0.3")
    assert_complains(result, 2, "UNAVAILABLE", path)


def test_call_whose_handler_raises(place, calc):
    result = place.run("call", "calc", "fail")
    assert_complains(result, 1, "UNKNOWN", "ValueError", r"first\nsecond \x1b[31mred")


def test_call_that_is_aborted(place, calc):
    result = place.run("call", "calc", "abort")
    assert_complains(result, 1, "NOT_FOUND", "no such order", '{"id": 7}')


def test_call_with_arguments_that_do_not_fit(place, calc):
    assert_complains(place.run("call", "calc", "add"), 1, "INVALID_ARGUMENT", "TypeError", "'a'")


def test_call_shows_the_traceback_when_asked(place, calc):
    result = place.run("call", "calc", "fail", "--traceback")
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[0].startswith("Traceback")
    assert any("calc.py" in line for line in lines)
    assert lines[-1].startswith("shmrpc: UNKNOWN: ValueError: first")
    assert "\x1b" not in result.stderr

    result = place.run("call", "calc", "abort", "--traceback")
    assert result.stderr.splitlines()[0] == "(the server sent no traceback)"


def test_call_takes_longer_than_its_timeout(place, calc):
    start = time.monotonic()
    result = place.run("call", "calc", "sleep", "30", "--timeout", "0.2")
    assert_complains(result, 1, "DEADLINE_EXCEEDED", "'sleep'")
    assert time.monotonic() - start < 25


def test_call_whose_server_dies(fresh):
    with fresh.serving("calc") as server:
        started = f"{fresh.temporary}/started"
        with fresh.popen("call", "calc", "sleep", "30", json.dumps(started)) as process:
            wait_until(lambda: os.path.exists(started), what="the handler's start")
            server.kill()
            out, err = process.communicate(timeout=20)
    result = subprocess.CompletedProcess([], process.returncode, out, err)
    assert_complains(result, 2, "UNAVAILABLE", "it may have run")


def test_call_interrupted(fresh):
    with fresh.serving("calc"):
        started = f"{fresh.temporary}/started"
        with fresh.popen("call", "calc", "sleep", "30", json.dumps(started)) as process:
            wait_until(lambda: os.path.exists(started), what="the handler's start")
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 130


# ---- ping ----


@pytest.mark.parametrize("transport", ["shm", "unix", "tcp"])
def test_ping(place, calc, transport):
    address = address_in(calc.banner, transport)
    result = place.run("ping", address, "-c", "3", "-i", "0.01")
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert lines[0] == f"PING {address}"
    for number in (1, 2, 3):
        pattern = rf"answer from {address}: seq={number} time=[\d,.]+ us"
        assert re.fullmatch(pattern, lines[number])
    assert lines[4:6] == ["", f"--- {address} ping statistics ---"]
    assert lines[6] == "3 sent, 3 answered, 0 % lost"
    least, average, most = (
        float(text.replace(",", ""))
        for text in re.fullmatch(r"round trip min/avg/max = (.*) us", lines[7])[1].split("/")
    )
    assert 0 < least <= average <= most


def test_ping_nobody(place):
    assert_complains(place.run("ping", "nobody", "-c", "1"), 1, "UNAVAILABLE", "nobody.sock")


def test_ping_notices_that_the_server_dies(fresh):
    with (
        fresh.serving("calc") as server,
        fresh.popen("ping", "calc", "-c", "3", "-i", "0.3", "--timeout", "0.2") as process,
    ):
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "seq=1" in lines[1]
        server.kill()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "")
    assert re.search(r"^no answer from shm://calc: seq=3 UNAVAILABLE: ", out, re.MULTILINE)
    assert re.search(r"^3 sent, [12] answered, (33|67) % lost$", out, re.MULTILINE)


def test_ping_goes_on_until_interrupted(place, calc):
    with place.popen("ping", "calc", "-i", "0.01") as process:
        for _ in range(12):
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert re.search(r"^\d+ sent, \d+ answered, 0 % lost$", out, re.MULTILINE)


# ---- serve ----


def test_serve_says_where(fresh):
    with fresh.serving("calc:server") as process:
        assert process.banner.startswith("serving calc:server at shm://calc, ")
        assert f"unix://{fresh.sockets}/plain.sock" in process.banner
        assert re.search(r"tcp://127\.0\.0\.1:[1-9]\d*", process.banner)
        assert process.banner.endswith(f"(pid {process.pid})\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_serve_lets_calls_end(fresh, number):
    started = f"{fresh.temporary}/started"
    with fresh.serving("calc") as server:
        with fresh.popen("call", "calc", "sleep", "0.7", json.dumps(started)) as process:
            wait_until(lambda: os.path.exists(started), what="the handler's start")
            server.send_signal(number)
            assert process.communicate(timeout=20) == ('"slept"\n', "")
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out, err) == (0, "", "")
    assert os.listdir(fresh.sockets) == []


def test_serve_ends_at_once_when_told_twice(fresh):
    started = f"{fresh.temporary}/started"
    with fresh.serving("calc", "--grace", "30") as server:
        with fresh.popen("call", "calc", "sleep", "30", json.dumps(started)) as process:
            wait_until(lambda: os.path.exists(started), what="the handler's start")
            server.send_signal(signal.SIGINT)
            wait_until(lambda: os.listdir(fresh.sockets) == [], what="the end of listening")
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 130
            assert_complains(
                subprocess.CompletedProcess([], process.wait(20), *process.communicate()), 2
            )
        assert server.stderr.read() == ""


def test_serve_a_factory(fresh):
    with fresh.serving("calc:make") as process:
        assert "at shm://made (" in process.banner
        assert fresh.run("call", "made", "add", "1").stdout == "11\n"


@pytest.mark.parametrize("target", ["remote", "remote_aio"])
@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one", "two"])
def test_serve_for_other_hosts_has_to_be_allowed(place, target, processes):
    assert_complains(place.run("serve", target, *processes), 2, "--allow-remote")
    with place.serving(target, "--allow-remote", *processes) as process:
        assert " at tcp://0.0.0.0:" in process.banner
        port = re.search(r"0\.0\.0\.0:(\d+)", process.banner)[1]
        with shmrpc.connect(f"tcp://127.0.0.1:{port}") as client:
            assert client.call("shmrpc.health") == {"status": "serving"}
        process.terminate()
        assert process.wait(20) == 0


def test_serve_where_somebody_serves(place, calc):
    assert_complains(place.run("serve", "calc:server"), 2, "in use", str(calc.pid))


@pytest.mark.parametrize(
    "target,text",
    [
        ("nonsense", "no module named 'nonsense'"),
        ("calc.nonsense", "no module named 'calc.nonsense'"),
        ("calc:nonsense", "there is calc:server"),
        ("calc:thing", "of type int"),
        ("calc:needs", "calc:needs(argument)"),
        ("calc:raising", r"RuntimeError: boo\nhoo"),
        ("calc:server.nonsense", "server.nonsense"),
        ("calc.py", "a module's name"),
        ("./calc", "a module's name"),
        (".calc", "a module's name"),
        ("calc:", "MODULE:SERVER"),
        (":server", "MODULE:SERVER"),
        ("", "MODULE:SERVER"),
        ("bad_import", "No module named 'surely_not_installed'"),
        ("bad_import", "bad_import.py:1"),
        ("bad_syntax", "bad_syntax.py, line 1"),
        ("bad_exit", "SystemExit: 3"),
        ("bad_value", "bad_value.py:2"),
    ],
)
def test_serve_what_is_no_server(place, target, text):
    assert_complains(place.run("serve", target), 2, text)


def test_serve_interrupted_while_importing(place):
    result = place.run("serve", "interrupted")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


# ---- ls ----


def test_ls(place, calc):
    result = place.run("ls")
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    titles = ["name", "pid", "uid", "uptime", "connections", "calls/s", "address", "ping"]
    assert rows[0] == titles
    who = [str(calc.pid), str(os.getuid())]
    assert rows[2][:3] == ["calc", *who]
    assert rows[2][6] == "shm://calc"
    assert rows[3][:3] == ["plain", *who]
    assert rows[3][6] == f"unix://{place.sockets}/plain.sock"
    for row in rows[2:]:
        assert re.fullmatch(r"(\d+m)?\d+s", row[3])
        assert all(re.fullmatch(r"[\d,.]+", cell) for cell in (*row[4:6], row[7]))
        assert row[8:] == ["us"]
    assert len(rows) == 4


def test_ls_json(place, calc):
    entry = json.loads(place.run("ls", "--json").stdout)[0]
    assert 0 < entry.pop("ping_seconds") < 60
    assert entry.pop("uptime_seconds") > 0
    assert entry.pop("connections") >= 0
    assert entry.pop("calls_per_second") >= 0
    assert entry == {
        "name": "calc",
        "alive": True,
        "pid": calc.pid,
        "uid": os.getuid(),
        "address": "shm://calc",
        "status": "serving",
        "problem": None,
    }


def test_ls_nobody(fresh):
    os.rmdir(fresh.sockets)
    result = fresh.run("ls")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == f"no live servers in {fresh.sockets}\n"
    assert json.loads(fresh.run("ls", "--json").stdout) == []


def test_ls_where_no_directory_is(place, fresh):
    file = f"{fresh.temporary}/file"
    Path(file).touch()
    assert_complains(place.run("ls", env={"SHMRPC_DIR": file}), 2, file)


def test_ls_shows_the_dead_only_when_asked(fresh):
    with fresh.serving("calc:make") as server:
        server.kill()
    Path(fresh.sockets, "file.sock").touch()
    Path(fresh.sockets, "file.sock.lock").touch()
    os.symlink("/nowhere", f"{fresh.sockets}/link.sock")
    assert sorted(os.listdir(fresh.sockets))[-2:] == ["made.sock", "made.sock.lock"]
    assert fresh.run("ls").stdout == ""
    assert json.loads(fresh.run("ls", "--json").stdout) == []
    rows = fresh.run("ls", "--all").stdout.split()
    assert rows[-8:] == ["made", "-", str(os.getuid()), "-", "-", "-", "shm://made", "dead"]
    [entry] = json.loads(fresh.run("ls", "--all", "--json").stdout)
    assert (entry["name"], entry["alive"], entry["ping_seconds"]) == ("made", False, None)
    assert "nobody listens" in entry["problem"]

    with fresh.serving("calc:make") as server:  # looking has left the name free
        assert json.loads(fresh.run("ls", "--json").stdout)[0]["pid"] == server.pid


def test_ls_shows_a_server_that_does_not_answer(fresh):
    with fresh.serving("calc:make") as server:
        server.send_signal(signal.SIGSTOP)
        rows = fresh.run("ls").stdout.split()
        assert rows[-9:-6] == ["made", str(server.pid), str(os.getuid())]
        assert rows[-3] == "shm://made"
        assert rows[-2:] == ["no", "answer"]
        [entry] = json.loads(fresh.run("ls", "--json").stdout)
        assert (entry["alive"], entry["ping_seconds"]) == (True, None)
        assert entry["problem"]


def test_ls_of_a_file_name_made_to_confuse(fresh):
    path = f"{fresh.sockets}/[red]\x1b[31m\n\udcff.sock"
    with socket.socket(socket.AF_UNIX) as listener, open(f"{path}.lock", "w") as lock:
        listener.bind(path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = fresh.run("ls")
        assert (result.returncode, result.stderr) == (0, "")
        assert r"[red]\x1b[31m\n\udcff" in result.stdout
        assert "\x1b" not in result.stdout
        [entry] = json.loads(fresh.run("ls", "--json").stdout)
        assert entry["address"] == f"shm://{path}"
        assert (entry["alive"], entry["pid"], entry["ping_seconds"]) == (True, None, None)


# ---- demo ----


def demo_table(out):
    """Check what the demo printed, and return the table's rows."""
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert re.fullmatch(r".+, \d+ CPUs?( of \d+)?, Linux \S+, \w+ 3\.\S+", lines[0])
    head = re.split(r"\s{2,}", lines[2])
    assert head == ["transport", "p50 us", "p99 us", "calls/s", "CPU us/call", "p50 vs shm"]
    assert not re.search(r"\w", lines[3])
    assert re.match(r"A call over shared memory took [\d.,]+ us at the median; .*\.$", lines[7])
    assert "over unix" in lines[7]
    assert "over tcp" in lines[7]
    assert len(lines) == 8
    return [re.split(r"\s{2,}", line) for line in lines[4:7]]


def check_rows(rows):
    number = r"[\d,]+(\.\d)?"
    assert [row[0] for row in rows] == ["shm", "unix", "tcp"]
    for row in rows:
        assert all(re.fullmatch(number, cell) for cell in row[1:5])
        p50, p99, rate, cpu = (float(cell.replace(",", "")) for cell in row[1:5])
        assert 0 < p50 <= p99
        assert rate > 0
        assert cpu > 0
        assert re.fullmatch(r"\d+\.\dx", row[5])
    assert rows[0][5] == "1.0x"


def assert_nothing_left(place, servers=()):
    """No directory, no socket, no process. (The names in /dev/shm are checked for all tests.)"""
    wait_until(lambda: os.listdir(place.temporary) == [], what="an empty directory")
    wait_until(lambda: not any(map(psutil.pid_exists, servers)), what="the server's end")
    for process in psutil.process_iter(["cmdline"]):
        assert not any(place.temporary in word for word in process.info["cmdline"] or ())


@pytest.mark.slow
def test_demo(fresh):
    start = time.monotonic()
    result = fresh.run("demo")
    assert time.monotonic() - start < 20
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert "calling over" not in result.stdout
    check_rows(demo_table(result.stdout))
    assert_nothing_left(fresh)


def test_demo_in_a_long_temporary_directory(fresh):
    deep = f"{fresh.temporary}/{'x' * 100}"
    os.mkdir(deep)
    result = fresh.run("demo", "--seconds", "0.3", env={"TMPDIR": deep})
    assert (result.returncode, result.stderr) == (0, "")
    check_rows(demo_table(result.stdout))
    os.rmdir(deep)
    assert_nothing_left(fresh)


def test_demo_on_a_terminal_shows_progress(fresh):
    terminal, end = pty.openpty()
    text = b""
    env = {"TERM": "xterm", "COLUMNS": "120"}
    with fresh.popen("demo", "--seconds", "0.3", stdout=end, env=env) as process:
        os.close(end)
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(terminal, 4096):
                text += part
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    os.close(terminal)
    assert b"calling over shm, unix and tcp" in text
    assert "\u2501".encode() in text  # the bar
    assert b"A call over shared memory took" in text
    assert_nothing_left(fresh)


@contextlib.contextmanager
def running_demo(place):
    """A demo that is measuring; gives it and its server's pid."""
    with place.popen("demo", "--seconds", "60", start_new_session=True) as process:
        try:
            itself = psutil.Process(process.pid)
            wait_until(itself.children, what="the demo's server")
            [server] = itself.children()
            # Measuring, once the clients' connections are there: 2 Unix sockets, 1 TCP.
            wait_until(
                lambda: any(c.status == "ESTABLISHED" for c in itself.net_connections("tcp")),
                what="the demo's connection",
            )
            yield process, server.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_demo_ended_by_a_signal_leaves_nothing(fresh, number):
    with running_demo(fresh) as (process, server):
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (128 + number, "")
        assert len(out.splitlines()) == 1
        assert_nothing_left(fresh, [server])


def test_demo_killed_leaves_nothing(fresh):
    with running_demo(fresh) as (process, server):
        process.kill()
        assert_nothing_left(fresh, [server])


def test_demo_whose_server_is_killed(fresh):
    with running_demo(fresh) as (process, server):
        os.kill(server, signal.SIGKILL)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        assert len(out.splitlines()) == 1
        assert re.fullmatch(r"shmrpc: the demo failed: UNAVAILABLE: .*\n", err)
        assert_nothing_left(fresh, [server])


def test_demo_under_nohup_ignores_hangups(fresh):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.argv = ['shmrpc', 'demo', '--seconds', '0.3']\n"
        "import shmrpc.cli\n"
        "shmrpc.cli.main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=fresh.env, check=True
    )
    check_rows(demo_table(run.stdout))
    assert_nothing_left(fresh)
