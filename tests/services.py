"""The server process of the tests: ``python services.py '{"addresses": [...], "options": {...}}'``.

Prints the addresses that it listens at as a line of JSON, then serves until SIGTERM. It ends when
its standard input does, so that nothing outlives a test run that was killed.
"""

import json
import math
import os
import signal
import sys
import threading
import time

from duplex import add_duplex
from streaming import add_streams

import shmrpc


class JsonCodec:
    """Another codec than msgpack: what it can't carry differs visibly."""

    def encoder(self):
        return lambda value: json.dumps(value).encode()

    def decode(self, data):
        return json.loads(bytes(data))


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Basket:
    """A service object: its public methods are offered, nothing else."""

    size = 3

    def __init__(self):
        self.content = []

    def put(self, item, *, count=1):
        self.content += [item] * count
        return len(self.content)

    def items(self):
        return self.content

    @staticmethod
    def version():
        return "1.0"

    def _private(self):
        return "never shown"


class Held:
    """Handlers that run until they are told to end, and who counts them."""

    def __init__(self):
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.running = 0
        self.peak = 0

    def __enter__(self):
        with self.lock:
            self.running += 1
            self.peak = max(self.peak, self.running)

    def __exit__(self, *_):
        with self.lock:
            self.running -= 1

    def wait(self, path):
        with self:
            end = time.monotonic() + 60
            while time.monotonic() < end and not (path and os.path.exists(path)):
                if self.released.wait(0.01):
                    break


def note(path, text):
    """Append a line to a file, atomically: how tests learn what was started."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def raise_error(kind, *args):
    kinds = {
        "SystemExit": SystemExit,
        "KeyboardInterrupt": KeyboardInterrupt,
        "TypeError": TypeError,
        "ValueError": ValueError,
        "KeyError": KeyError,
        "Unprintable": Unprintable,
        "MethodNotFound": shmrpc.MethodNotFound,
        "DeadlineExceeded": shmrpc.DeadlineExceeded,
    }
    raise kinds[kind](*args)


def add_values(server):
    """Methods about arguments and results."""

    @server.method
    def echo(value):
        return value

    @server.method
    def add(a, b=1):
        return a + b

    @server.method
    def keywords(*args, **kwargs):
        return [list(args), kwargs]

    @server.method(name="math.add")
    def renamed(a, b):
        return a + b

    @server.method
    def nothing():
        pass

    @server.method
    def size(data):
        return len(data)

    @server.method
    def zeros(count):
        return bytes(count)

    @server.method
    def serialize(value):
        return value

    @server.method
    def unpackable(kind):
        if kind == "cycle":
            cycle = []
            cycle.append(cycle)
            return cycle
        return {"object": object(), "set": {1}, "huge": 1 << 70, "surrogate": "\udc80"}[kind]

    @server.method
    def inner_type_error():
        return len(5)

    server.method(raise_error)
    server.method(math.sqrt)

    @server.method
    def raise_surrogate():
        raise ValueError("file \udc80 not found")

    @server.method
    def abort(code, message="", details=None):
        raise shmrpc.Abort(code, message, details)

    @server.method
    def abort_strangely(what):
        if what == "message":
            raise shmrpc.Abort("NOT_FOUND", ValueError("an exception as the message"))
        if what == "details":
            raise shmrpc.Abort("NOT_FOUND", "text", details=object())
        raise shmrpc.Abort("NO_SUCH_CODE", "text")

    server.add_service(Basket(), prefix="basket.")


def add_state(server):
    """Methods about the server, and those that take their time."""
    held = Held()
    seen = []

    @server.method
    def pid():
        return os.getpid()

    @server.method
    def remember(item):
        seen.append(item)

    @server.method
    def remembered():
        return seen

    server.method(note)

    @server.method
    def note_and_hold(path, text):
        note(path, text)
        held.wait(f"{path}.release")
        return text

    @server.method
    def sleep(seconds, result=None):
        with held:
            time.sleep(seconds)
        return result

    @server.method
    def hold(until="", result=None):
        """Run until ``release`` is called, or until this file exists."""
        held.wait(until)
        return result

    @server.method
    def hold_until_cancelled():
        call = shmrpc.current_call()
        with held:
            end = time.monotonic() + 60
            while not call.cancelled and time.monotonic() < end:
                time.sleep(0.0005)
            if call.deadline is not None and time.monotonic() >= call.deadline:
                time.sleep(0.5)  # its deadline has passed: let the caller notice first
        return call.cancelled

    @server.method
    def release():
        held.released.set()

    @server.method
    def running():
        return held.running

    @server.method
    def peak():
        return held.peak

    @server.method
    def context(tag=None):
        call = shmrpc.current_call()
        peer = call.peer
        return {
            "tag": tag,
            "method": call.method,
            "peer": [peer.pid, peer.uid, peer.gid],
            "deadline": call.deadline,
            "remaining": call.time_remaining(),
            "cancelled": call.cancelled,
        }

    @server.method
    def metadata(tag=None):
        return shmrpc.current_call().metadata

    metadata_seen = []

    @server.method
    def remember_metadata():
        metadata_seen.append(shmrpc.current_call().metadata)

    @server.method
    def metadata_remembered():
        return metadata_seen

    @server.method
    def context_elsewhere():
        """What current_call() does in a thread that runs no handler."""
        found = []

        def look():
            try:
                found.append(str(shmrpc.current_call()))
            except RuntimeError as error:
                found.append(f"RuntimeError: {error}")

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found[0]

    @server.method
    def stats():
        return server.stats()

    @server.method
    def add_method(name, result):
        server.method(name=name)(lambda: result)

    @server.method
    def call_other(address, method, *args):
        with shmrpc.connect(address) as client:
            return client.call(method, *args)

    @server.method
    def pinned(value):
        """How many blocks of callers' memory this process uses."""
        return server.stats()["pinned_blocks"]

    @server.method
    def die():
        os._exit(1)

    @server.method
    def fork_and_connect(address):
        """Fork in the handler; the child answers through a pipe."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                answer = describe_inherited(server)
                with shmrpc.connect(address) as client:
                    answer += f" {client.call('add', 20, 22)}"
            except BaseException as error:
                answer = repr(error)
            os.write(writer, answer.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            text = pipe.read().decode()
        os.waitpid(child, 0)
        return text


def describe_inherited(server):
    names = []
    for action in (server.start, server.stop, server.stats):
        try:
            action()
            names.append("no error")
        except Exception as error:
            names.append(type(error).__name__)
    return " ".join(names)


def drop_privileges(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def watch_stdin():
    while os.read(0, 64):
        pass
    os._exit(3)


def tell_ready(addresses):
    """Say where it listens, once serve_forever takes SIGTERM."""
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.001)
    print(json.dumps({"addresses": addresses}), flush=True)


def main():
    setup = json.loads(sys.argv[1])
    options = setup["options"]
    if options.pop("codec", None) == "json":
        options["codec"] = JsonCodec()
    if "umask" in options:
        os.umask(options.pop("umask"))
    if "uid" in options:  # here and not at exec: another user may not read the interpreter
        drop_privileges(options.pop("uid"))
    threading.Thread(target=watch_stdin, daemon=True).start()
    server = shmrpc.Server(*setup["addresses"], **options)
    add_values(server)
    add_state(server)
    add_duplex(server)
    add_streams(server)
    try:
        server.start()
    except shmrpc.ConnectError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(4)
    threading.Thread(target=tell_ready, args=(server.addresses,), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
