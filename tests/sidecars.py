"""Sidecars as processes, for the tests."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from conftest import Service, short_directory, wait_until

COMMAND = [sys.executable, "-m", "shmrpc.cli"]


class Command:
    """``shmrpc sidecar`` or ``shmrpc tunnel``, in a process of its own, and what it says."""

    def __init__(self, *arguments, prefix=(), ready=True):
        self.process = subprocess.Popen(
            [*prefix, *COMMAND, *arguments], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            self.wait_for(rf"{arguments[0]} at .*\(pid")

    def _read(self):
        for line in self.process.stderr:
            self.said += line.decode()

    def wait_for(self, pattern, count=1):
        """Wait until it has said this so many times; the last match."""

        def found():
            matches = list(re.finditer(pattern, self.said))
            if len(matches) >= count:
                return matches
            assert self.process.poll() is None or self._reader.is_alive(), self.said
            return None

        return wait_until(found, timeout=20, what=f"{pattern!r} in {self.said!r}")[-1]

    @property
    def addresses(self):
        return self.wait_for(r"at (.*?)(?:, http|,? \(pid|$)")[1].split(", ")

    @property
    def address(self):
        return self.addresses[0]

    @property
    def http(self):
        return "http://" + self.wait_for(r"http at (\S+)")[1]

    @property
    def pid(self):
        return self.process.pid

    def reload(self):
        """SIGHUP, and wait until it has been seen to."""
        before = len(re.findall(r"reloaded|stays as it was", self.said))
        self.process.send_signal(signal.SIGHUP)
        return self.wait_for(r"(reloaded|stays as it was).*", before + 1)[0]

    def stop(self, timeout=20):
        """SIGTERM, and its exit status."""
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout=20):
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()


def fds(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def segments_of(pid):
    """How many segments of shared memory a process has mapped."""
    with open(f"/proc/{pid}/maps") as file:
        return sum("/dev/shm/shmrpc" in line or "memfd:" in line for line in file)


def starter(*first):
    """A fixture that starts ``shmrpc FIRST ...``, and ends what it started."""

    @pytest.fixture
    def run(directory):
        with contextlib.ExitStack() as stack:

            def start(*arguments, **options):
                command = Command(*first, *arguments, **options)
                stack.callback(command.close)
                return command

            yield start

    return run


def pairs_of(transports):
    """A fixture of each module: a server, and the sidecar before it, for each (inside, outside)."""

    @pytest.fixture(scope="module", params=transports, ids="-".join)
    def between(request):
        inside, outside = request.param
        tcp = "tcp://127.0.0.1:0"
        with short_directory() as path, contextlib.ExitStack() as stack:
            where = {"shm": f"shm://{path}/b", "unix": f"unix://{path}/b", "tcp": tcp}
            server = Service(where[outside])
            stack.callback(server.close)
            front = {"shm": f"shm://{path}/f", "unix": f"unix://{path}/f", "tcp": tcp}
            sidecar = Command("sidecar", "--listen", front[inside], "--upstream", server.address)
            stack.callback(sidecar.close)
            yield server, sidecar
            assert sidecar.process.poll() is None, sidecar.said
            assert "failed" not in sidecar.said

    return between
