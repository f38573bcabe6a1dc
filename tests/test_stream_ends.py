"""How streams end before their time: given up, late, failed, cut off; and who is told what."""

import contextlib
import gc
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import SLACK, TRANSPORTS, Process, address_of, wait_until
from test_fork import in_child, kinds_of_errors

import shmrpc


@pytest.fixture
def tag(request):
    """What the server notes this test's handlers under."""
    return request.node.name


@pytest.fixture
def other(common, transport, connect):
    """A second client, to ask how the first one's handlers fare while that does nothing."""
    return connect(common.addresses[TRANSPORTS.index(transport)])


def end_of(client, tag):
    """What ended the handler, once it has ended."""
    return wait_until(lambda: (client.call("trace", tag) or {}).get("end"), what=f"end of {tag}")


def is_well(client):
    assert client.call("add", 40, 2) == 42
    assert list(client.stream("count", 2)) == [0, 1]
    assert client.stats()["reconnects"] == 0


# ---- given up by the caller ----


def by_close(client, call):
    call.close()


def by_cancel(client, call):
    assert call.cancel()
    assert not call.cancel()


def by_leaving(client, call):
    with call:
        pass


def by_failing(client, call):
    with pytest.raises(ZeroDivisionError), call:
        1 / 0  # noqa: B018


def by_closing_the_client(client, call):
    client.close()


WAYS = [by_close, by_cancel, by_leaving, by_failing, by_closing_the_client]
each_way = pytest.mark.parametrize("give_up", WAYS, ids=lambda way: way.__name__[3:])


@each_way
def test_a_handler_that_sends_is_told(client, other, tag, give_up):
    call = client.stream("endless", tag)
    assert next(call) == 0
    give_up(client, call)
    assert end_of(other, tag) == "GeneratorExit"
    assert call.done()
    if give_up is not by_closing_the_client:
        is_well(client)


@each_way
def test_a_handler_that_receives_is_told(client, other, tag, give_up):
    call = client.open("parrot", tag)
    call.send(1)
    assert next(call) == 1
    give_up(client, call)
    assert end_of(other, tag) == "Cancelled"
    if give_up is not by_closing_the_client:
        is_well(client)


@each_way
def test_a_handler_can_ask(client, other, tag, give_up):
    """One that neither sends nor receives."""
    call = client.stream("patient", tag)
    assert next(call) == "started"
    give_up(client, call)
    assert end_of(other, tag) == "returned"
    assert other.call("trace", tag)["cancelled"] is True


def test_a_call_that_is_dropped(client, other, tag):
    call = client.stream("endless", f"{tag} del")
    next(call)
    del call
    assert end_of(other, f"{tag} del") == "GeneratorExit"

    for _ in client.stream("endless", f"{tag} break"):
        break
    assert end_of(other, f"{tag} break") == "GeneratorExit"

    cycle = [client.open("parrot", f"{tag} gc")]
    cycle.append(cycle)
    wait_until(lambda: other.call("trace", f"{tag} gc"))
    assert not other.call("trace", f"{tag} gc")["end"]
    del cycle
    gc.collect()
    assert end_of(other, f"{tag} gc") == "Cancelled"
    is_well(client)


def test_a_call_that_was_never_looked_at(client, other, tag):
    """It is cancelled perhaps before its handler has started."""
    for _ in range(50):
        client.stream("endless", tag)
        client.open("parrot", tag).close()
    is_well(client)
    wait_until(lambda: other.call("stats")["running"] == 1)


def test_after_it_was_given_up(client, tag):
    call = client.open("parrot", tag)
    call.send(1)
    call.cancel()
    for use in (lambda: next(call), lambda: call.send(1), call.result):
        with pytest.raises(shmrpc.Cancelled, match="the call of 'parrot' was cancelled"):
            use()
    call.close_send()
    call.close()
    assert call.done()
    closed = client.stream("count", 5)
    assert next(closed) == 0
    closed.close()
    assert list(closed) == []
    assert not closed.cancel()


def test_a_handler_that_is_told_can_go_on(client, other, tag):
    client.open("caught", tag).close()
    assert end_of(other, tag) == "returned"
    assert other.call("trace", tag)["caught"] == ["Cancelled", "Cancelled"]


def test_a_generator_that_ignores_its_end(client, other, tag):
    stream = client.stream("stubborn", tag)
    assert next(stream) == 0
    stream.close()
    wait_until(lambda: other.call("stats")["running"] == 1)
    is_well(client)


def test_an_iterator_that_can_be_closed(client, other, tag):
    stream = client.stream("closable", tag)
    next(stream)
    stream.close()
    assert end_of(other, tag) == "closed"
    unclosable = client.stream("countdown", 1 << 60)
    next(unclosable)
    unclosable.close()
    wait_until(lambda: other.call("stats")["running"] == 1)
    is_well(client)


def test_a_relay_passes_it_on(client, other, common, tag):
    stream = client.stream("relay", tag, common.addresses[0], "endless", f"{tag} inner")
    assert next(stream) == 0
    stream.close()
    assert end_of(other, tag) == "GeneratorExit"
    assert end_of(other, f"{tag} inner") == "GeneratorExit"


@pytest.mark.parametrize("waits_in", ["next", "send", "result", "initial_metadata"])
@pytest.mark.parametrize("give_up", [by_close, by_cancel, by_closing_the_client])
def test_given_up_by_another_thread(client, other, tag, waits_in, give_up):
    call = client.open("reluctant", tag)
    # Given up before it has started it never would, and have no end.
    wait_until(lambda: other.call("trace", tag) is not None)
    entered = threading.Event()
    ended = []

    def wait():
        entered.set()
        try:
            if waits_in == "next":
                next(call)
            elif waits_in == "send":
                for _ in range(2000):
                    call.send(1)
            elif waits_in == "result":
                call.result()
            else:
                ended.append(call.initial_metadata)
        except (shmrpc.Error, StopIteration) as error:
            ended.append(type(error).__name__)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert entered.wait(10)
    wait_until(lambda: len(call._waiters) == 1)  # it waits
    give_up(client, call)
    thread.join(10)
    assert not thread.is_alive()
    expected = {
        ("next", by_close): "StopIteration",
        ("send", by_close): "Error",
        ("initial_metadata", by_close): {},
    }.get((waits_in, give_up), "Cancelled")
    if waits_in == "initial_metadata" and give_up is by_closing_the_client:
        expected = {}
    assert ended == [expected]
    other.call("go", tag)
    # result() has said that nothing more comes: the handler may not notice that nobody waits.
    assert end_of(other, tag) in {"Cancelled", "returned" if waits_in == "result" else "Cancelled"}


# ---- ended early by the handler ----


def test_a_handler_that_returns_early(client, other, tag):
    """Sending says so, sooner or later; the result is there."""
    with client.open("first", 3, tag) as call:
        with pytest.raises(shmrpc.Error, match="'first' is over, its handler takes no more"):
            for number in range(10_000):
                call.send(number)
        assert call.result() == [0, 1, 2]
    with client.open("idle") as call:
        assert call.result() == "took none"
    is_well(client)


def test_a_generator_that_ends_early(client, other, tag):
    """What it had sent can still be read."""
    with client.open("some", 3, tag) as call:
        with pytest.raises(shmrpc.Error, match="'some' is over, its handler takes no more"):
            for number in range(10_000):
                call.send(number)
        assert list(call) == [0, 1, 2]
        assert call.result() is None


def test_a_generator_that_fails_early(client, other, tag):
    """The same, and then its error."""
    with client.open("some", 3, tag, "enough of that") as call:
        with pytest.raises(shmrpc.RemoteError, match="enough of that"):
            for number in range(10_000):
                call.send(number)
        got, error = items_and_error(call)
        assert (got, error.message) == ([0, 1, 2], "enough of that")
        with pytest.raises(shmrpc.RemoteError, match="enough of that"):
            call.result()
    is_well(client)


# ---- errors after items ----


def items_and_error(call):
    got = []
    with pytest.raises(shmrpc.Error) as caught:
        got.extend(call)
    return got, caught.value


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_handler_raises_after_items(client, transport, count):
    sent = list(range(count))
    got, error = items_and_error(client.stream("fail_after", sent, "ValueError", "the reason"))
    assert got == sent
    assert (error.type, error.message, error.code) == ("ValueError", "the reason", "UNKNOWN")
    assert ("in fail_after" in error.remote_traceback) == (transport != "tcp")
    got, error = items_and_error(client.open("fail_after", sent, "SystemExit", "bye"))
    assert (got, error.type) == (sent, "SystemExit")
    details = {"id": 7, "why": [None, b"\0"]}
    aborted = client.stream("fail_after", sent, "abort", "NOT_FOUND", "no such order", details)
    got, error = items_and_error(aborted)
    assert got == sent
    assert (error.type, error.code, error.details) == ("Abort", "NOT_FOUND", details)
    is_well(client)


def test_an_item_that_cant_be_packed(client):
    got, error = items_and_error(client.stream("unpackable_after", 3))
    assert got == [0, 1, 2]
    assert (error.type, error.code) == ("TypeError", "INTERNAL")
    assert "'unpackable_after' yielded what can't be sent" in error.message
    assert "of type set" in error.message
    is_well(client)


def test_an_item_that_is_too_large(common, transport, connect):
    client = connect(common.addresses[TRANSPORTS.index(transport)], max_message_bytes=100_000)
    got, error = items_and_error(client.stream("sized", [5, 99_000, 100_000, 5]))
    assert [len(item) for item in got] == [5, 99_000]
    assert isinstance(error, shmrpc.MessageTooLarge)
    # A buffer that goes beside its body is counted; the body tells where it belongs.
    assert re.search(r"an item of 1000\d\d bytes is longer than the caller accepts", str(error))
    is_well(client)


# ---- deadlines ----


def late():
    return pytest.raises(
        shmrpc.DeadlineExceeded, match=r"took longer than its timeout|expired before it was started"
    )


def test_no_time_at_all(client, tag):
    for use in (list, lambda call: call.result()):
        with late():
            use(client.open("stepwise", tag, 5, timeout=0))
    is_well(client)


@pytest.mark.parametrize("timeout", [0.05, 0.2])
def test_the_deadline_passes(client, other, tag, timeout):
    start = time.monotonic()
    stream = client.stream("stepwise", tag, 5, timeout=timeout)
    with late():
        list(stream)
    with late():
        next(stream)
    with client.open("reluctant", f"{tag} 2", timeout=timeout) as call, late():
        call.result()
    with client.open("reluctant", f"{tag} 3", timeout=timeout) as call, late():
        _ = call.initial_metadata
    with client.open("reluctant", f"{tag} 4", timeout=timeout) as call, late():
        for _ in range(2000):
            call.send("more than the window")
    assert time.monotonic() - start < 4 * timeout + SLACK
    for number in (tag, f"{tag} 2", f"{tag} 3", f"{tag} 4"):
        other.call("go", number)
    wait_until(lambda: other.call("stats")["running"] == 1)
    is_well(client)


def test_a_deadline_that_is_in_time(client):
    assert list(client.stream("count", 1000, timeout=30)) == list(range(1000))
    with client.open("total", timeout=30) as call:
        call.send(1)
        assert call.result() == 1


def test_a_stream_that_never_pauses_has_a_deadline(client, other, tag):
    start = time.monotonic()
    with late():
        for _ in client.stream("endless", tag, timeout=0.3):
            pass
    assert time.monotonic() - start < 0.3 * SLACK
    assert end_of(other, tag) == "GeneratorExit"


def test_the_handler_keeps_the_deadline_by_itself(client, other, tag):
    """The caller does nothing meanwhile, and says nothing."""
    waiting = client.open("parrot", f"{tag} waiting", timeout=0.1)
    sending = client.stream("endless", f"{tag} sending", timeout=0.1)
    asking = client.stream("patient", f"{tag} asking", timeout=0.1)
    assert next(asking) == "started"
    assert end_of(other, f"{tag} waiting") == "Cancelled"
    assert end_of(other, f"{tag} sending") == "GeneratorExit"
    assert end_of(other, f"{tag} asking") == "returned"
    assert other.call("trace", f"{tag} asking")["cancelled"] is True
    with late():
        waiting.result()
    with late():
        list(sending)
    is_well(client)


def test_a_relay_hands_the_deadline_on(client, other, common, tag):
    address = common.addresses[0]
    stream = client.stream("relay", tag, address, "endless", f"{tag} inner", timeout=0.2)
    got, error = items_and_error(stream)
    assert got
    assert error.code == "DEADLINE_EXCEEDED"
    assert end_of(other, tag) in {"DeadlineExceeded", "GeneratorExit"}
    assert end_of(other, f"{tag} inner") == "GeneratorExit"


# ---- Ctrl-C ----

INTERRUPTED = """
import os, signal, sys, threading, time
import shmrpc

client = shmrpc.connect(sys.argv[1])
mode, tag = sys.argv[2:]
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
call = None
try:
    if mode == "stream":
        call = client.stream("stepwise", tag, 2000)
        list(call)
    elif mode == "busy":
        call = client.stream("endless", tag)
        for item in call:
            pass
    elif mode == "follower":
        # Another thread reads for all; it must go on.
        reader = threading.Thread(target=client.call, args=("sleep", 1))
        reader.start()
        time.sleep(0.1)
        call = client.stream("stepwise", tag, 2000)
        list(call)
    else:
        call = client.open("reluctant", tag)
        if mode == "send":
            while True:
                call.send("more than the window")
        elif mode == "large":
            os.kill(int(client.call("pid")), signal.SIGSTOP)
            call.send("x" * 5_000_000)  # bytes would be lent, and sent at once
        elif mode == "result":
            call.result()
        elif mode == "initial":
            call.initial_metadata
except KeyboardInterrupt:
    print("interrupted", end=" ")
if mode == "large":
    os.kill(int(sys.argv[3].split()[-1]), signal.SIGCONT)
try:
    call.result()
except shmrpc.Cancelled:
    print("cancelled", end=" ")
client.call("go", tag)
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    end = (client.call("trace", tag) or {}).get("end")
    if end:
        break
print(end, list(client.stream("count", 3)), client.stats()["reconnects"])
"""


@pytest.mark.parametrize(
    "mode", ["stream", "busy", "follower", "send", "large", "result", "initial"]
)
def test_keyboard_interrupt(transport, service, mode):
    """Ctrl-C ends the wait at once and cancels the call, and the client goes on working."""
    running = service(transport)
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, running.address, mode, f"x {running.pid}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    ends = {"GeneratorExit"} if mode in {"stream", "busy", "follower"} else {"Cancelled"}
    if mode == "result":
        ends.add("returned")  # it was told before that nothing more comes
    said = run.stdout.split(" [")
    assert said[0] in {f"interrupted cancelled {end}" for end in ends}, run.stdout + run.stderr
    assert said[1] == "0, 1, 2] 0\n"


# ---- one side dies ----


@pytest.mark.parametrize("count", [0, 1, 3])
def test_server_dies_in_the_middle(transport, service, connect, tag, count):
    running = service(transport)
    client = connect(running.address)
    stream = client.stream("endless", tag)
    sending = client.open("reluctant", f"{tag} sending")
    waiting = client.open("parrot", f"{tag} waiting")
    got = [next(stream) for _ in range(count)]
    wait_until(lambda: client.call("trace", f"{tag} waiting"))
    wait_until(lambda: client.call("trace", tag)["items"] > 512)
    running.kill()
    with pytest.raises(
        shmrpc.ConnectionLost, match=f"pid {running.pid}.*it may have run"
    ) as caught:
        got.extend(stream)
    assert caught.value.outcome == "unknown"
    assert len(got) >= 512  # all that had come before the reply to our last call
    assert got == list(range(len(got)))
    with pytest.raises(shmrpc.ConnectionLost):
        next(stream)
    with pytest.raises(shmrpc.ConnectionLost):
        for _ in range(2000):
            sending.send(1)
    with pytest.raises(shmrpc.ConnectionLost):
        sending.result()
    with pytest.raises(shmrpc.ConnectionLost):
        list(waiting)
    assert waiting.trailing_metadata == {}
    again = service(running.address)
    assert list(client.stream("count", 3)) == [0, 1, 2]
    assert client.call("pid") == again.pid
    assert client.stats()["reconnects"] == 1


def test_server_dies_while_all_wait(transport, service, connect, tag):
    running = service(transport)
    client = connect(running.address)
    calls = [client.open("reluctant", f"{tag} {number}") for number in range(3)]
    ended = []

    def wait(number):
        use = [lambda: next(calls[0]), calls[1].result, lambda: fill(calls[2])][number]
        try:
            use()
        except shmrpc.ConnectionLost as error:
            ended.append(error.outcome)

    def fill(call):
        for _ in range(2000):
            call.send(1)

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not calls[2]._stream.may_send())
    wait_until(lambda: all(client.call("trace", f"{tag} {number}") for number in range(3)))
    running.kill()
    for thread in threads:
        thread.join(10)
    assert ended == ["unknown"] * 3


def test_outcome_of_streams_that_never_ran(transport, service, connect, tag):
    running = service(transport, workers=1)
    client = connect(running.address)
    future = client.submit("hold")
    wait_until(lambda: client.stats() and future.running() is False and client.ping())
    calls = [client.stream("count", 3), client.open("total")]
    client.ping()
    running.kill()
    for call in calls:
        with pytest.raises(shmrpc.ConnectionLost) as caught:
            next(call)
        assert caught.value.outcome == ("not_started" if transport == "shm" else "unknown")


CLIENT_THAT_DIES = """
import os, signal, sys
import shmrpc
client = shmrpc.connect(sys.argv[1])
calls = [client.open("reluctant", "reluctant"), client.stream("endless", "sending"),
         client.stream("patient", "asking"), client.open("parrot", "waiting")]
print(next(calls[1]), next(calls[2]))
calls[3].send(0)
print(next(calls[3]), client.call("trace", "reluctant")["items"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_client_dies_in_the_middle(transport, service, connect):
    running = service(transport)
    client = connect(running.address)
    run = subprocess.run(
        [sys.executable, "-c", CLIENT_THAT_DIES, running.address],
        check=False,
        capture_output=True,
        timeout=20,
    )
    assert run.stdout == b"0 started\n0 0\n", run.stderr
    assert end_of(client, "sending") == "GeneratorExit"
    assert end_of(client, "waiting") == "Cancelled"
    assert end_of(client, "asking") == "returned"
    client.call("go", "reluctant")
    assert end_of(client, "reluctant") == "Cancelled"
    wait_until(lambda: client.call("stats")["running"] == 1)


CLIENT_THAT_IS_KILLED = """
import itertools, sys
import shmrpc
client = shmrpc.connect(sys.argv[1])
print("connected", flush=True)
for number in itertools.count():
    for turn in range(5):
        sending = client.stream("endless", f"{sys.argv[2]} {number} {turn} sending")
        waiting = client.open("parrot", f"{sys.argv[2]} {number} {turn} waiting")
        waiting.send(next(sending))
        next(waiting)
"""


@pytest.mark.slow
def test_clients_are_killed_at_any_moment(transport, service, connect):
    """Whatever their handlers were about, each ends as one whose caller is gone."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    running = service(transport)
    client = connect(running.address)
    for round_number in range(12):
        child = Process(
            [sys.executable, "-c", CLIENT_THAT_IS_KILLED, running.address, str(round_number)],
            stdout=subprocess.PIPE,
        )
        with child:
            assert child.stdout.readline() == b"connected\n"
            threading.Event().wait(chosen.uniform(0, 0.1))
            child.kill()
    wait_until(lambda: client.call("stats")["running"] == 1, 20, "all handlers to end")
    assert client.call("stats")["conns"] == 1
    ends = {trace["end"] for trace in client.call("all_traces").values()}
    assert ends <= {"GeneratorExit", "Cancelled"}


# ---- the server stops ----


def test_stop_with_streams_that_do_not_end(directory, transport, connect):
    """Each handler is told when the grace is over, and the caller what became of its call."""
    ended = []

    def noting(name, items):
        try:
            yield from items
        except BaseException as error:
            ended.append((name, type(error).__name__))
            raise

    server = shmrpc.Server(address_of(transport, directory))
    server.method(name="endless")(lambda: noting("sending", iter(int, 1)))
    server.method(name="parrot", requests=True)(lambda requests: noting("waiting", requests))
    server.start()
    client = connect(server.addresses[0])
    sending, waiting = client.stream("endless"), client.open("parrot")
    assert next(sending) == 0
    waiting.send("hello")
    assert next(waiting) == "hello"
    start = time.monotonic()
    server.stop(grace=0.2)
    assert time.monotonic() - start < 0.2 + SLACK
    assert sorted(ended) == [("sending", "GeneratorExit"), ("waiting", "Cancelled")]
    for call in (sending, waiting):
        with pytest.raises(shmrpc.ConnectionLost) as caught:
            list(call)
        assert caught.value.outcome == "unknown"


def test_stop_lets_streams_end(transport, service, connect, tag):
    """What goes on within the grace is not cut off; new streams are refused meanwhile."""
    running = service(transport)
    client = connect(running.address)
    parrot = client.open("parrot", tag)
    wait_until(lambda: client.call("trace", tag))
    running.signal(signal.SIGTERM)
    refused = None
    while refused is None:
        try:
            list(client.stream("count", 1, timeout=1))
        except shmrpc.ConnectionLost as error:
            refused = error.outcome
        except (shmrpc.ConnectError, shmrpc.DeadlineExceeded):
            refused = "not_started"
    assert refused == "not_started"
    for number in range(100):
        parrot.send(number)
        assert next(parrot) == number
    parrot.close_send()
    assert list(parrot) == []
    assert running.process.wait(10) == 0


# ---- forks ----


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_with_open_calls(client, other, tag):
    parrot = client.open("parrot", tag)
    parrot.send(1)
    assert next(parrot) == 1
    stream = client.stream("count", 2000)
    assert next(stream) == 0
    finished = client.stream("count", 3)
    assert list(finished) == [0, 1, 2]

    def work():
        kinds = kinds_of_errors(
            lambda: parrot.send(2),
            lambda: next(parrot),
            parrot.result,
            parrot.close_send,
            parrot.done,
            lambda: parrot.initial_metadata,
            lambda: list(stream),
            lambda: client.stream("count", 1),
            lambda: client.open("total"),
        )
        return kinds, parrot.cancel(), parrot.close(), repr(stream)[-6:]

    expected = (" ".join(["ForkedError"] * 9), True, None, " open>")
    assert in_child(work) == str(expected)
    assert in_child(lambda: list(finished)) != ""
    parrot.send(2)
    assert next(parrot) == 2
    parrot.close_send()
    assert list(parrot) == []
    assert list(stream) == list(range(1, 2000))
    is_well(client)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_sends(client, tag):
    """The child does not wait for a lock that nobody will give back."""
    call = client.open("reluctant", tag)

    def send():
        with contextlib.suppress(shmrpc.Cancelled):
            for _ in range(2000):
                call.send(1)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    wait_until(lambda: not call._stream.may_send())
    used = in_child(lambda: kinds_of_errors(lambda: call.send(1), call.close_send, call.result))
    assert used == "ForkedError ForkedError ForkedError"
    assert call.cancel()
    sender.join(10)
    client.call("go", tag)
    is_well(client)
