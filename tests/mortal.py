"""Servers that are made to be killed: ``python mortal.py LOG``.

Each line of standard input is a list of addresses as JSON; the answer is the pid and the addresses
of a new server there. They are forked from this process, which has imported everything already, so
that a test can afford thousands. They end with it, and it ends with its standard input.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time

import shmrpc

WORKERS = 2  # few, so that calls wait in the server's queue as well as in the ring
LINE_BYTES = 16  # divides a page: a line is in the log as a whole or not at all
PR_SET_PDEATHSIG = 1


def note(log, number):
    """Say durably that this call has started."""
    os.write(log, f"{number:0{LINE_BYTES - 1}}\n".encode())
    os.fsync(log)


def make_server(addresses, log):
    # No call is refused: such a one has no outcome.
    server = shmrpc.Server(*addresses, workers=WORKERS, max_concurrency=1 << 20)

    @server.method
    def run(number, seconds, data=b""):
        note(log, number)
        if seconds:
            time.sleep(seconds)

    @server.method
    def items(number, seconds, data=b""):
        note(log, number)
        yield number
        time.sleep(seconds)
        yield number

    @server.method
    def die(number, data=b""):
        note(log, number)
        os.kill(os.getpid(), signal.SIGKILL)

    return server


def serve(addresses, log):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server = make_server(addresses, log)
    server.start()
    print(json.dumps({"pid": os.getpid(), "addresses": server.addresses}), flush=True)
    threading.Event().wait()


def main():
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for the dead
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                serve(json.loads(line), log)
            except shmrpc.Error as error:
                print(json.dumps({"error": str(error)}), flush=True)
            os._exit(1)


if __name__ == "__main__":
    main()
