"""Ctrl-C while the thread that waits for its reply serves what the server calls back."""

import linecache
import sys

import pytest
from conftest import wait_until

import shmrpc
from shmrpc import worker

STEPS = 100


class Interrupt(BaseException):
    """What a signal handler raises, at a place of our choice."""


def interrupted_at(step, work):
    """Run ``work``, interrupted at the so-manieth line of what serves; whether it got that far."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        code = frame.f_code
        if code.co_filename != worker.__file__:
            return None
        # At the end of a with block no signal is handled before the lock is free.
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        if not line.startswith("with "):
            seen += 1
            if seen == step:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("how", ["call", "stream"])
def test_interrupted_at_any_line(transport, service, connect, how):
    """No worker that was given back is ended, and none that was ended serves again."""
    running = service(transport)
    client = connect(running.address)
    client.method(name="twice")(lambda number: 2 * number)
    works = {
        "call": lambda: client.call("call_back", "call", "twice", 4),
        "stream": lambda: client.call("call_back", "stream", "counted", 4),
    }

    @client.method
    def counted(count):
        yield from range(count)

    expected = {"call": 8, "stream": [0, 1, 2, 3]}[how]
    work = works[how]
    interrupted = 0
    for step in range(1, STEPS):
        interrupted += interrupted_at(step, work)
        assert work() == expected
        with pytest.raises(RuntimeError, match="works in a handler"):
            shmrpc.current_call()
    assert interrupted > 5  # not all: another thread of the client may have served
    observer = connect(running.address)
    wait_until(lambda: observer.call("stats")["running"] == 1)
