"""What the documentation shows is run, what it says of files is looked up.

Each page is one story, told from top to bottom in an empty directory with an empty SHMRPC_DIR.

    ```python     a program, run to its end. The comment after a print(...) is what it prints
    ```console    commands after "$ ", each with its output; a last & leaves it running
    ```sh         commands that succeed
    ```toml       a file, marked as such
    ```text       a drawing

A comment on the line before says what else a snippet is:

    <!-- server: calc.py -->   the file calc.py, run until the next server or the end of the page
    <!-- file: calc.py -->     the file calc.py, not run; ends the server before it too
    <!-- continues -->         goes on where the program before it ended
    <!-- make -->              targets of the Makefile: make --dry-run
    <!-- hex: request -->      bytes, compared in a test of their own

In outputs "..." stands for anything. Port 7001 becomes one that is free.
"""

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import msgpack
import pytest
from conftest import free_port, wait_until
from minimal_client import CANCEL, NOTIFY, PING, REQUEST, MinimalClient

import shmrpc

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SNIPPET_PAGES = [path for path in PAGES if path.name == "README.md" or path.parent.name == "docs"]
PORT = "7001"
MINIMAL_CLIENT = ROOT / "tests" / "minimal_client.py"
FENCED = re.MULTILINE | re.DOTALL
LANGUAGES = {"python", "console", "sh", "text", "toml"}

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


class Snippet(NamedTuple):
    line: int
    language: str
    mark: str  # "server", "file", "continues", "make", "hex" or ""
    argument: str
    text: str


def snippets(page):
    """All fenced blocks of a page."""
    pattern = re.compile(
        r"^(?:<!-- (\w+)(?:: ([^\n]+?))? -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
    )
    text = page.read_text(encoding="utf-8")
    found = [
        Snippet(
            text.count("\n", 0, match.start()) + 1,
            match[3],
            match[1] or "",
            match[2] or "",
            match[4],
        )
        for match in pattern.finditer(text)
    ]
    assert text.count("\n```") == 2 * len(found), f"{page.name}: a fence that is not understood"
    return found


def expected_output(code):
    """The comments behind the prints of a program."""
    lines = []
    for line in code.splitlines():
        if re.match(r"\s*print\(", line):
            _, separator, comment = line.rpartition("  # ")
            assert separator, f"say what this prints: {line}"
            lines.append(comment.strip())
    return "\n".join(lines)


def matches(expected, output):
    """Compare line by line and word by word; "..." is anything, spaces are one space."""
    words = expected.split()
    pattern = r"\s+".join(
        re.escape(word).replace(r"\.\.\.", r".*") if word != "..." else r".*" for word in words
    )
    return re.fullmatch(rf"\s*{pattern}\s*", output, re.DOTALL) is not None


def check_output(where, expected, output):
    assert matches(expected, output), f"{where}: expected\n{expected}\ngot\n{output}"


class Story:
    """Runs the snippets of one page."""

    def __init__(self, page, directory, environment):
        self.page = page
        self.directory = directory
        self.environment = environment
        self.program = ""  # all programs since the last that was not continued
        self.background = []
        self.port = str(free_port())

    def tell(self):
        for snippet in snippets(self.page):
            where = f"{self.page.relative_to(ROOT)}:{snippet.line}"
            assert snippet.language in LANGUAGES, f"{where}: {snippet.language!r}?"
            getattr(self, f"_{snippet.language}")(where, snippet)

    def _python(self, where, snippet):
        snippet = snippet._replace(text=snippet.text.replace(PORT, self.port))
        if snippet.mark in {"server", "file"}:
            self.end_background()
            (self.directory / snippet.argument).write_text(snippet.text, encoding="utf-8")
            if snippet.mark == "server":
                self._start_server(where, snippet)
            return
        assert snippet.mark in {"", "continues"}, where
        self.program = snippet.text if not snippet.mark else self.program + snippet.text
        output = self._run(where, [sys.executable, "-W", "error", "-c", self.program])
        check_output(where, expected_output(self.program), output)

    def _start_server(self, where, snippet):
        name = re.search(r"(?:Server|socket_path)\(\"(\w+)\"", snippet.text)
        assert name, f"{where}: a server without a name"
        command = [sys.executable, "-W", "error", snippet.argument]
        process = self._start(command)

        def listens():
            assert process.poll() is None, f"{where} ended with {process.returncode}"
            with contextlib.suppress(shmrpc.ConnectError):
                shmrpc.connect(name[1]).close()
                return True

        wait_until(listens, what=f"the server of {where}")

    def _console(self, where, snippet):
        assert not snippet.mark, where
        for part in re.split(r"^\$ ", snippet.text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            if command.endswith("&"):
                command = command[:-1].replace(PORT, self.port)
                process = self._start(shlex.split(command), stderr=subprocess.PIPE)
                output = process.stderr.readline().decode()
            else:
                command = command.replace(PORT, self.port)
                output = self._run(f"{where}: {command}", shlex.split(command))
            check_output(f"{where}: {command}", expected, output)

    def _sh(self, where, snippet):
        if snippet.mark == "make":
            for command in snippet.text.splitlines():
                program, target = shlex.split(command)
                assert program == "make", where
                dry = ["make", "--dry-run", "--directory", str(ROOT), target]
                self._run(f"{where}: {command}", dry)
            return
        assert not snippet.mark, where
        self._run(where, ["sh", "-e", "-c", snippet.text])

    def _toml(self, where, snippet):
        assert snippet.mark == "file", where
        text = snippet.text.replace(PORT, self.port)
        (self.directory / snippet.argument).write_text(text, encoding="utf-8")

    def _text(self, where, snippet):
        assert snippet.mark in {"", "hex"}, where

    def _start(self, command, **options):
        process = subprocess.Popen(command, cwd=self.directory, env=self.environment, **options)
        self.background.append(process)
        return process

    def _run(self, where, command):
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def end_background(self):
        """Stop the servers; that they stop by SIGTERM is part of what the pages say."""
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            # uvicorn stops, and then lets the signal have its way.
            assert process.wait(10) in {0, -signal.SIGTERM}
            if process.stderr is not None:
                process.stderr.close()
        self.background.clear()

    def kill(self):
        for process in self.background:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


@pytest.fixture
def environment(directory):
    """What a reader has: the shmrpc command, and a terminal of a certain width."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SHMRPC_DIR": directory, "COLUMNS": "100"}


@pytest.mark.parametrize("page", SNIPPET_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets(page, tmp_path, environment):
    """Every snippet does what the page says."""
    story = Story(page, tmp_path, environment)
    try:
        story.tell()
        story.end_background()
    finally:
        story.kill()


def test_readme_example_is_short():
    """A server and a client in a dozen lines."""
    server, client = [s for s in snippets(ROOT / "README.md") if s.language == "python"][:2]
    lines = [line for line in f"{server.text}\n{client.text}".splitlines() if line.strip()]
    assert len(lines) <= 12


# ---- links and names ----


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=FENCED)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_name
def test_links(page):
    """Links between pages lead somewhere, also to the right heading."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}"
        assert place.is_relative_to(ROOT), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links to {target}"


@by_name
def test_no_figure_is_missing(page):
    """Figures that wait to be measured look like {{THIS}}."""
    assert "{{" not in page.read_text(encoding="utf-8")


@by_name
def test_named_files_exist(page):
    """Files of the source tree that a page names in backticks are there."""
    names = re.findall(
        r"`((?:csrc|shmrpc|tests|docs|benchmarks)/[\w./-]*)`", page.read_text(encoding="utf-8")
    )
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_models_named_in_the_register_exist():
    """Each variant that docs/memory-model.md names is one of tests/models."""
    text = (ROOT / "docs" / "memory-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+) (BUG_\d+)", text)
    assert named
    for model, variant in named:
        source = (ROOT / "tests" / "models" / f"{model}.pml").read_text(encoding="utf-8")
        assert re.search(rf"#if.*\b{variant}\b", source), f"{model}.pml has no {variant}"


# ---- the protocol ----


def hex_dump(data):
    """Bytes as docs/protocol.md shows them."""
    rows = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        halves = (row[:8].hex(" "), row[8:].hex(" "))
        rows.append(f"{start:04x}  " + "  ".join(filter(None, halves)))
    return "\n".join(rows) + "\n"


def documented(name):
    pages = snippets(ROOT / "docs" / "protocol.md")
    return next(s.text for s in pages if (s.mark, s.argument) == ("hex", name))


@pytest.fixture
def serve(directory):
    """A server of this process, by shm://; returns the path of its socket."""
    with contextlib.ExitStack() as stack:

        def started(*functions, **options):
            path = f"{directory}/docs.sock"
            server = stack.enter_context(shmrpc.Server(f"shm://{path}", **options))
            for function in functions:
                server.method(function)
            return path

        yield started


@pytest.fixture
def minimal():
    with contextlib.ExitStack() as stack:

        def connected(path, **options):
            client = MinimalClient(path, **options)
            stack.callback(client.close)
            return client

        yield connected


def add(a, b=10):
    return a + b


def echo(value):
    return value


def test_minimal_client_is_independent():
    """It knows the protocol from the page, and fits into a page or two itself."""
    source = MINIMAL_CLIENT.read_text(encoding="utf-8")
    imports = [
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert "msgpack" in imports
    assert not [name for name in imports if "shmrpc" in name]
    assert source.count("\n") <= 180


def test_worked_example(serve, minimal):
    """The bytes in the rings are those of docs/protocol.md."""
    client = minimal(serve(add))
    assert client.call(REQUEST, "add", 1, 2) == (0, 3)
    own, peer = client.own, client.peer
    assert hex_dump(own.memory[4096 : 4096 + 38]) == documented("request")
    assert hex_dump(peer.memory[4096 : 4096 + 33]) == documented("reply")
    assert (client.tail, peer.words[256 // 8], peer.words[128 // 8]) == (40, 40, 40)
    assert peer.words[384 // 8] >> 1 >= 1


def receive(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, "hung up"
        data += part
    return data


@pytest.mark.parametrize("transport", ["shm", "unix"])
def test_worked_example_is_what_the_client_sends(transport, directory):
    """A socket that knows the page only takes what shmrpc's own client sends."""
    path = f"{directory}/fake.sock"
    caught = {}
    hello_bytes = bytes.fromhex("".join(line[6:] for line in documented("hello").splitlines()))
    request_bytes = bytes.fromhex("".join(line[6:] for line in documented("request").splitlines()))
    reply_bytes = bytes.fromhex("".join(line[6:] for line in documented("reply").splitlines()))

    def serve_once(listener):
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            caught["hello"] = hello = receive(sock, 64)
            if transport == "shm":
                reason = b"only the HELLO was wanted"
                refusal = bytearray(hello)
                refusal[10] = 5
                refusal[24:28] = len(reason).to_bytes(4, "little")
                sock.sendall(refusal + reason)
                return
            sock.sendall(hello[:10] + b"\2" + hello[11:])
            caught["request"] = receive(sock, len(request_bytes))
            sock.sendall(reply_bytes)
            sock.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve_once, args=[listener])
        thread.start()
        try:
            if transport == "shm":
                with pytest.raises(shmrpc.ConnectError, match="only the HELLO was wanted"):
                    shmrpc.connect(f"shm://{path}")
            else:
                with shmrpc.connect(f"unix://{path}") as client:
                    assert client.call("add", 1, 2) == 3
        finally:
            thread.join()
    hello = bytearray(caught["hello"])
    assert hello[12:16] == os.getpid().to_bytes(4, "little")
    hello[12:16] = hello_bytes[12:16]
    hello[11] = hello_bytes[11]
    assert hex_dump(hello) == documented("hello")
    if transport == "unix":
        assert hex_dump(caught["request"]) == documented("request")


def test_minimal_client_calls(serve, minimal):
    """Arguments, keywords, errors and statuses are as on the page."""

    def abort():
        raise shmrpc.Abort("NOT_FOUND", "no such order", details=[1])

    path = serve(add, echo, abort)
    client = minimal(path)
    assert client.call(REQUEST, "add", 1) == (0, 11)
    assert client.call(REQUEST, "add", 1, b=2) == (0, 3)
    assert client.call(REQUEST, "echo", {"a": [1.5, None, b"x"]}) == (0, {"a": [1.5, None, b"x"]})
    assert client.call(PING) == (0, None)
    assert client.call(REQUEST, "nothing") == (12, None)
    assert client.call(REQUEST, "add", 1, 2, timeout=0) == (4, None)
    status, error = client.call(REQUEST, "add")
    assert (status, error["type"]) == (3, "TypeError")
    status, error = client.call(REQUEST, "add", 1, "2")
    assert (status, error["type"]) == (2, "TypeError")
    assert "in add" in error["traceback"]
    status, error = client.call(REQUEST, "abort")
    assert (status, error["message"], error["details"]) == (5, "no such order", [1])
    client.send(NOTIFY, "add", msgpack.packb([1, 2]))
    client.send(CANCEL, call_id=0x70000)
    client.send(99, call_id=0x70000)  # of a later version: dropped
    assert client.call(REQUEST, "add", 2, 2) == (0, 4)


@pytest.mark.parametrize("ring_bytes", [4096, 65536, 1 << 20])
def test_minimal_client_sends_messages_of_all_sizes(serve, minimal, ring_bytes):
    """Frames wrap, messages come in pieces, rings fill up."""
    client = minimal(serve(echo), ring_bytes=ring_bytes)
    most = ring_bytes // 4 - 32
    for size in [0, 1, 7, 8, 1000, most - 20, most, most + 1, 2 * most, ring_bytes, 300_000]:
        value = os.urandom(size)
        assert client.call(REQUEST, "echo", value) == (0, value)
    for count in range(500):
        assert client.call(REQUEST, "echo", b"x" * count) == (0, b"x" * count)


@pytest.mark.parametrize(
    "what, word, value",
    [
        ("a tail beyond the ring", 128 // 8, 65536 + 48),
        ("a tail that is no multiple of 8", 128 // 8, 44),
        ("half a frame", 128 // 8, 48),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_violations_end_one_connection(serve, minimal, what, word, value):
    """The page's violations hang up on who commits them, and on nobody else."""
    path = serve(add)
    hostile, other = minimal(path), minimal(path)
    assert hostile.call(REQUEST, "add", 1, 2) == (0, 3)
    hostile.own.words[word] = value
    hostile.ring()
    with pytest.raises(ConnectionError, match="the server hung up"):
        hostile.wait(0)
    assert other.call(REQUEST, "add", 1, 2) == (0, 3), what


@pytest.mark.parametrize(
    "changes, text",
    [
        ({0: b"GET / HT"}, b"does not speak shmrpc"),
        ({8: b"\2\0"}, b"speaks protocol version 2"),
        ({11: b"\2"}, b"serves shm://, not unix://"),
        ({10: b"\3"}, b"message 3 instead of 1"),
    ],
    ids=["magic", "version", "transport", "kind"],
)
def test_refusals(serve, changes, text):
    """Who says something else than the page is told so, in the page's form."""
    path = serve(add)
    message = bytearray(
        bytes.fromhex("".join(line[6:] for line in documented("hello").splitlines()))
    )
    for offset, value in changes.items():
        message[offset : offset + len(value)] = value
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(message)
        answer = receive(sock, 64)
        assert (answer[:8], answer[10]) == (b"shmrpc\r\n", 5)
        assert text in receive(sock, int.from_bytes(answer[24:28], "little"))
        assert not sock.recv(1)


def test_status_numbers_and_kinds_are_documented():
    """The tables of docs/protocol.md have what the code has."""
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    for number, name in enumerate(shmrpc.errors.STATUS_NAMES):
        assert re.search(rf"\| {number} {name} \|", text), name
    header = (ROOT / "csrc" / "shmrpc.h").read_text(encoding="utf-8")
    for name, number in re.findall(r"SHMRPC_(\w+) = (\d+), +/\* (?!never)", header)[:7]:
        assert re.search(rf"^\| {number} \| {name} \|", text, re.MULTILINE), name


def test_make_is_here():
    assert shutil.which("make")
