"""The server process of test_large_values.py; started as services.py is."""

import json
import os
import sys
import threading
import time

import numpy as np
from services import tell_ready, watch_stdin

import shmrpc
from shmrpc import tending


class Kept:
    """What handlers keep of what they got."""

    def __init__(self):
        self.values = []
        self.released = threading.Event()


def describe(value):
    if isinstance(value, np.ndarray):
        return ["ndarray", str(value.dtype), list(value.shape), bool(value.flags.writeable)]
    if isinstance(value, memoryview):
        return ["memoryview", value.format, list(value.shape), not value.readonly]
    return [type(value).__name__]


def add_methods(server):
    keeper = Kept()
    method = server.method

    @method
    def echo(value):
        return value

    @method
    def kind(value):
        return describe(value)

    @method
    def add(left, right):
        return left + right

    @method
    def total(*arrays, scale=1):
        return int(sum(int(array.sum()) for array in arrays)) * scale

    @method
    def make(count, size):
        """So many arrays, each with bytes of its own number."""
        return [np.full(size, number, "u1") for number in range(count)]

    @method
    def stream(count, size):
        for number in range(count):
            yield np.full(size, number % 251, "u1")

    @method
    def gaps(size):
        """A view of so many bytes that do not lie side by side."""
        return memoryview(b"ab" * size)[::2]

    @method
    def stream_gaps(*sizes):
        yield from map(gaps, sizes)

    @method(requests=True)
    def sums(requests):
        for array in requests:
            yield int(array.sum())

    @method(requests=True)
    def echoes(requests):
        yield from requests

    @method
    def keep(value):
        keeper.values.append(value)

    @method
    def kept():
        return keeper.values[0]

    @method
    def cut(value, start, stop):
        return value[start:stop]

    @method
    def swap(*values):
        return values[::-1]

    @method
    def kept_sums():
        return [int(value.sum()) for value in keeper.values]

    @method
    def drop(count=1):
        del keeper.values[:count]

    @method
    def drop_later(seconds):
        def drop_soon():
            time.sleep(seconds)
            keeper.values.clear()

        threading.Thread(target=drop_soon, daemon=True).start()

    @method
    def stats():
        return server.stats()

    @method
    def fail(value):
        raise KeyError(len(value))

    @method
    def call_back(value):
        return shmrpc.current_call().caller.call("double", value)

    @method
    def die():
        os._exit(1)


def main():
    setup = json.loads(sys.argv[1])
    threading.Thread(target=watch_stdin, daemon=True).start()
    tending.QUIET = float(os.environ.get("QUIET", tending.QUIET))
    server = shmrpc.Server(*setup["addresses"], **setup["options"])
    add_methods(server)
    server.start()
    threading.Thread(target=tell_ready, args=(server.addresses,), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
