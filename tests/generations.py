"""A server process that can be stopped and succeeded: ``python generations.py '{...}'``.

Prints where it listens as a line of JSON, or why it does not. It ends when its standard input does,
which its successors inherit, so that nothing outlives a test run that was killed.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import shmrpc


def watch_stdin():
    while os.read(0, 64):
        pass
    os._exit(3)


def note(path, text):
    """Append a line to a file, atomically."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)


def drop_privileges(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def tell(**facts):
    os.write(1, f"{json.dumps(facts)}\n".encode())


class Process:
    """What clients can find out about this process, and have it do."""

    grace = 20.0

    def __init__(self, server):
        self._server = server
        self._successors = []

    def pid(self):
        return os.getpid()

    def sleep(self, seconds):
        time.sleep(seconds)

    def sleep_pid(self, seconds):
        time.sleep(seconds)
        return os.getpid()

    def note(self, path, text):
        note(path, text)

    def hold(self, path):
        """Note that it runs, and run until the file is there."""
        note(f"{path}.running", os.getpid())
        wait_for(path)
        return os.getpid()

    def hold_until_cancelled(self, path):
        note(f"{path}.running", os.getpid())
        while not shmrpc.current_call().cancelled:
            time.sleep(0.002)
        note(path, "cancelled")

    def hand_over(self, setup, timeout=20.0):
        command = [sys.executable, __file__, json.dumps(setup)]
        self._successors.append(self._server.hand_over(command, timeout=timeout))
        return self._successors[-1].pid

    def run_successor(self, command, env=None):
        self._successors.append(self._server.hand_over(command, env=env))
        return self._successors[-1].pid

    def stop(self, grace=20.0):
        """Stop in a moment, and end."""
        self.grace = grace
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_and_start(self):
        """The same server once more, in a moment."""
        os.kill(os.getpid(), signal.SIGHUP)

    def environment(self):
        names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "SHMRPC_SUPERVISOR")
        return {name: os.environ[name] for name in names if name in os.environ}

    def inheritable(self):
        """The descriptors that a child would get from this process, but for the first three."""
        listing = (
            "import os\n"
            "fds = os.listdir('/proc/self/fd')\n"
            "print(*(fd for fd in fds if int(fd) > 2 and os.path.exists(f'/proc/self/fd/{fd}')))"
        )
        command = [sys.executable, "-I", "-S", "-c", listing]
        run = subprocess.run(command, close_fds=False, check=True, stdout=subprocess.PIPE)
        return run.stdout.decode().split()


def main():
    setup = json.loads(sys.argv[1])
    threading.Thread(target=watch_stdin, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    behaviour = setup.get("behaviour")
    if behaviour == "crash":
        sys.exit(7)
    if behaviour == "never ready":
        tell(pid=os.getpid())
        threading.Event().wait()
    if behaviour == "wait":
        tell(pid=os.getpid())
        wait_for(setup["until"])
    if "uid" in setup:
        drop_privileges(setup["uid"])
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    server = shmrpc.Server(*setup["addresses"], **setup.get("options", {}))
    process = Process(server)
    server.add_service(process)
    try:
        server.start()
    except shmrpc.Error as error:
        tell(error=str(error))
        sys.exit(4)
    tell(addresses=server.addresses, pid=os.getpid())
    while reader.recv(1)[0] != signal.SIGTERM:
        server.stop()
        server.start()
    server.stop(process.grace)


if __name__ == "__main__":
    main()
