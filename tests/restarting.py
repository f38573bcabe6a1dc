"""What tests of restarts share: servers that succeed each other, clients that notice nothing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from conftest import wait_until

import shmrpc

GENERATIONS = str(Path(__file__).resolve().parent / "generations.py")
SAFE = {"not_sent", "not_started"}  # outcomes of calls that can be repeated

# What systemd does between fork and exec.
ACTIVATE = """
import fcntl, os, sys
given, command = [int(fd) for fd in sys.argv[1].split(",")], sys.argv[2:]
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in given]
for fd in given:
    os.close(fd)
for place, fd in enumerate(moved, 3):
    os.dup2(fd, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)))
os.execv(command[0], command)
"""


def command_of(*addresses, **setup):
    return [sys.executable, GENERATIONS, json.dumps({"addresses": addresses, **setup})]


class Generations:
    """A server process and its successors, which share its standard input and output."""

    def __init__(self, *addresses, sockets=(), env=None, **setup):
        command = command_of(*addresses, **setup)
        if sockets:
            fds = ",".join(str(sock.fileno()) for sock in sockets)
            command = [sys.executable, "-I", "-S", "-c", ACTIVATE, fds, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[sock.fileno() for sock in sockets],
            env=None if env is None else {**os.environ, **env},
        )
        self.log = b""
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        facts = self.hear()
        self.addresses = facts.get("addresses", [])
        self.error = facts.get("error", "")

    def _read_log(self):
        for line in self.process.stderr:
            self.log += line

    def hear(self):
        """What the next process says: where it listens, or why it does not."""
        return json.loads(self.process.stdout.readline())

    @property
    def pid(self):
        return self.process.pid

    def end(self):
        """End all of them, and wait until they are gone: nobody has their output any more."""
        self.process.stdin.close()
        self._reader.join(20)
        assert not self._reader.is_alive(), "a server does not end"
        self.process.wait(20)
        self.process.stdout.close()
        self.process.stderr.close()


def listening(address):
    """The socket that a supervisor makes for this address, and the address with its port."""
    scheme, _, place = address.partition("://")
    if scheme == "tcp":
        sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
        return sock, f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(place)
    sock.listen(4096)
    return sock, address


def is_gone(pid):
    """No process has this pid, or a dead one that nobody has waited for."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def files(directory):
    return sorted(os.listdir(directory))


def call(address, method, *args):
    with shmrpc.connect(address) as client:
        return client.call(method, *args)


def stop(address):
    """Stop who serves there and wait for its end."""
    with shmrpc.connect(address) as client:
        pid = client.call("pid")
        client.call("stop")
        wait_until(lambda: is_gone(pid), 20)


def lock_owner(address):
    return int(Path(f"{address.partition('://')[2]}.lock").read_text())


def connect_again(client):
    """Its pid, when the server of this client has started anew."""

    def answer():
        with contextlib.suppress(shmrpc.ConnectionLost):
            pid = client.call("pid")
            return client.stats()["reconnects"] and pid

    return wait_until(answer, 20)


class Load:
    """Clients in threads that call all the time, one call at a time, and some that come anew.

    Each call either returns or, as it was not started, is made again. Nothing else may happen.
    """

    def __init__(self, address, clients):
        self.address = address
        self.pids = set()  # of servers that have answered
        self.repeated = 0
        self._counts = [0] * (clients + 1)
        self._stop = threading.Event()
        self._errors = []
        self._threads = [
            threading.Thread(target=self._guard, args=(number,), daemon=True)
            for number in range(clients + 1)
        ]

    def _guard(self, number):
        try:
            if number:
                with shmrpc.connect(self.address) as client:
                    while not self._stop.is_set():
                        self._call(client, number)
            else:
                while not self._stop.is_set():
                    with shmrpc.connect(self.address) as client:
                        self._call(client, number)
        except BaseException as error:
            self._errors.append(error)

    def _call(self, client, number):
        method = ("pid",) if number % 2 else ("sleep_pid", 0.002)
        while True:
            try:
                self.pids.add(client.call(*method, timeout=20))
                self._counts[number] += 1
                return
            except shmrpc.ConnectionLost as error:
                if error.outcome not in SAFE:
                    raise
                self.repeated += 1

    def await_progress(self, calls=20):
        """Wait until each client has made some more calls."""
        goal = [count + calls for count in self._counts]

        def reached():
            assert not self._errors, self._errors
            return all(count >= least for count, least in zip(self._counts, goal, strict=True))

        wait_until(reached, 30, "calls of every client")

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
        if exception[0] is None:
            assert not any(thread.is_alive() for thread in self._threads)
            assert not self._errors, self._errors
