"""Its caller, in a container of its own: ``python caller.py``."""

import time

import shmrpc


def connect() -> shmrpc.Pool:
    """Connect as soon as the server is there: containers start in any order."""
    while True:
        try:
            # retries: for calls that a worker which is about to stop refuses.
            return shmrpc.connect("calc", timeout=60, connections=2, retries=5)
        except shmrpc.ConnectError as error:
            print(error, flush=True)
            time.sleep(0.5)


def main() -> None:
    with connect() as client:
        while True:
            print(client.call("add", 1, 2), flush=True)
            time.sleep(1)


if __name__ == "__main__":
    main()
