"""The streaming methods of services.py. Each notes under a tag what became of it: ``trace``."""

import collections
import functools
import itertools
import threading
import time

import shmrpc


class Traces(dict):
    """How handlers fared, by tag: items so far, and the name of what ended them."""

    def __call__(self, tag):
        trace = self[tag] = Trace(items=0, end=None)
        return trace


class Trace(dict):
    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self["end"] = kind.__name__ if kind is not None else "returned"

    def each(self, items):
        """Pass them on, counted."""
        for item in items:
            self["items"] += 1
            yield item


class Countdown:
    """An iterator that has no ``close``."""

    def __init__(self, n):
        self.left = n

    def __iter__(self):
        return self

    def __next__(self):
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        return self.left


class Closable(Countdown):
    """And one that has, and is told."""

    def __init__(self, trace):
        super().__init__(1 << 60)
        self.trace = trace

    def close(self):
        self.trace["end"] = "closed"


class Squares:
    """A service object some of whose methods stream; and an object that is called itself."""

    def upto(self, n):
        for number in range(n):
            yield number * number

    @staticmethod
    def static(n):
        yield from range(n)

    @classmethod
    def named(cls, n):
        for _ in range(n):
            yield cls.__name__

    def one(self, n):
        return n * n

    def __call__(self, n):
        yield from self.upto(n)


def add_streams(server):
    traces = Traces()
    released = collections.defaultdict(threading.Event)

    @server.method
    def trace(tag):
        return traces.get(tag)

    @server.method
    def all_traces():
        return traces

    @server.method
    def go(tag):
        released[tag].set()

    add_replies(server, traces, released)
    add_requests(server, traces, released)
    add_others(server, traces)


def add_replies(server, traces, released):
    """Methods that stream what they return."""

    @server.method
    def count(n, start=0):
        yield from range(start, start + n)

    @server.method
    def values(items):
        yield from items

    @server.method
    def sized(sizes):
        for size in sizes:
            yield bytes(size)

    @server.method
    def endless(tag, size=None):
        with traces(tag) as trace:
            for number in trace.each(itertools.count()):
                yield number if size is None else bytes(size)

    @server.method
    def stepwise(tag, n):
        """The first item at once, the others after ``go``."""
        with traces(tag):
            for number in range(n):
                yield number
                released[tag].wait(60)

    @server.method
    def patient(tag):
        """One item, then it only asks whether it is still wanted."""
        with traces(tag) as trace:
            call = shmrpc.current_call()
            yield "started"
            end = time.monotonic() + 60
            while not call.cancelled and time.monotonic() < end:
                time.sleep(0.001)
            trace["cancelled"] = call.cancelled

    @server.method
    def stubborn(tag):
        """Cleans up after its end by yielding, which no generator may."""
        with traces(tag):
            try:
                yield from itertools.count()
            finally:
                yield "one more"

    @server.method
    def fail_after(items, error, *args):
        yield from items
        if error == "abort":
            raise shmrpc.Abort(*args)
        raise {"ValueError": ValueError, "SystemExit": SystemExit}[error](*args)

    @server.method
    def unpackable_after(n):
        yield from range(n)
        yield {1, 2}

    @server.method
    def described(items, trailing=None, error=""):
        call = shmrpc.current_call()
        call.send_initial_metadata({"first": "initial", **call.metadata})
        yield from items
        call.set_trailing_metadata(trailing or {})
        if error:
            raise ValueError(error)

    squares = Squares()
    server.add_service(squares, prefix="squares.")
    server.method(squares, name="squares")
    server.method(functools.partial(squares.upto, 4), name="four")
    server.method(Countdown, name="countdown")
    server.method(name="generated")(lambda n: (str(number) for number in range(n)))
    server.method(name="closable")(lambda tag: Closable(traces(tag)))


def add_requests(server, traces, released):
    """Methods that the caller's messages stream to."""

    @server.method(requests=True)
    def total(requests, start=0):
        return sum(requests, start)

    @server.method(requests=True)
    def collect(requests):
        return list(requests)

    @server.method(requests=True)
    def lengths(requests):
        return [len(item) for item in requests]

    @server.method(requests=True)
    def parrot(requests, tag):
        with traces(tag) as trace:
            yield from trace.each(requests)

    @server.method(requests=True)
    def first(requests, n, tag):
        """Takes so many and returns."""
        with traces(tag) as trace:
            return list(itertools.islice(trace.each(requests), n))

    @server.method(requests=True)
    def some(requests, n, tag, error=""):
        """Replies to so many and ends."""
        with traces(tag) as trace:
            yield from itertools.islice(trace.each(requests), n)
            if error:
                raise ValueError(error)

    @server.method(requests=True)
    def idle(requests):
        return "took none"

    @server.method(requests=True)
    def reluctant(requests, tag):
        """Takes nothing before ``go``."""
        with traces(tag) as trace:
            released[tag].wait(60)
            return sum(1 for _ in trace.each(requests))

    @server.method(requests=True)
    def deaf(requests, tag, size):
        """Sends without end and never listens."""
        with traces(tag) as trace:
            for _ in trace.each(itertools.count()):
                yield bytes(size)

    @server.method(requests=True)
    def twice(requests):
        return [list(requests), list(requests)]

    @server.method(requests=True)
    def caught(requests, tag):
        """Asks on after it was told that nobody waits."""
        with traces(tag) as trace:
            for _ in range(2):
                try:
                    next(requests)
                except shmrpc.Error as error:
                    trace["caught"] = [*trace.get("caught", []), type(error).__name__]


def add_others(server, traces):
    """Streams to and from third parties."""

    @server.method
    def relay(tag, address, method, *args):
        with traces(tag) as trace, shmrpc.connect(address) as client:
            yield from trace.each(client.stream(method, *args))

    @server.method
    def ask_back(tag, method, *args):
        """Stream what a method of the caller streams."""
        with traces(tag) as trace:
            yield from trace.each(shmrpc.current_call().caller.stream(method, *args))

    @server.method
    def sum_by_caller(numbers):
        """Stream to a method of the caller."""
        with shmrpc.current_call().caller.open("total") as call:
            for number in numbers:
                call.send(number)
            return call.result()

    @server.method(requests=True)
    def converse(requests):
        """Each message goes to a method of the caller, and what that replies back to the caller."""
        with shmrpc.current_call().caller.open("parrot") as call:
            for item in requests:
                call.send(item)
                yield next(call)
