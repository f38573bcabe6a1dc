"""Methods of the test service about who calls whom: callbacks, streams, deadlines, metadata.

``nest`` and ``inherited`` are offered by clients as well.
"""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import shmrpc


def nest(depth):
    """Call each other, so many calls deep."""
    if depth == 0:
        return 0
    return shmrpc.current_call().caller.call("nest", depth - 1) + 1


def ask(channel, how, method, *args, **options):
    """One call by each of the ways there are: its result, or the list of what it streamed."""
    if how == "call":
        return channel.call(method, *args, **options)
    if how == "submit":
        return channel.submit(method, *args, **options).result()
    if how == "stream":
        return list(channel.stream(method, *args, **options))
    if how == "items":
        with channel.open(method, *args, **options) as call:
            return list(call)
    with channel.open(method, *args, **options) as call:
        return call.result()


def remaining():
    return shmrpc.current_call().time_remaining()


def remaining_streamed():
    yield shmrpc.current_call().time_remaining()


def inherited(how, timeout=None):
    """The time that a call back to the caller has left, or the one that streams."""
    method = "remaining_streamed" if how in {"stream", "items"} else "remaining"
    found = ask(shmrpc.current_call().caller, how, method, timeout=timeout)
    return found[0] if isinstance(found, list) else found


def outcome_of(work):
    """What became of a call, as something that can be sent."""
    try:
        return ["ok", work()]
    except Exception as error:
        shown = getattr(error, "remote_traceback", "")
        outcome = getattr(error, "outcome", None)
        return [type(error).__name__, str(error), error.code, outcome, shown]


class Kept:
    """Callers that outlive the calls they came by, used from other threads."""

    def __init__(self):
        self.callers = {}
        self.outcomes = {}

    def keep(self, key):
        self.callers[key] = shmrpc.current_call().caller

    def call(self, key, method, *args, **options):
        return outcome_of(lambda: self.callers[key].call(method, *args, **options))

    def later(self, key, method, pauses):
        """From a thread of ours: one call after each pause."""

        def run():
            for number, pause in enumerate(pauses):
                time.sleep(pause)
                outcomes.append(outcome_of(lambda n=number: self.callers[key].call(method, n)))

        outcomes = self.outcomes[key] = []
        threading.Thread(target=run, daemon=True).start()

    def outcomes_of(self, key):
        return self.outcomes.get(key, [])


def add_callbacks(server):
    """Methods that call their caller."""
    server.method(nest)
    server.method(remaining)
    server.method(remaining_streamed)
    server.method(inherited)
    server.add_service(Kept(), prefix="kept.")
    outcomes = []

    @server.method
    def call_back(how, method, *args, **options):
        return ask(shmrpc.current_call().caller, how, method, *args, **options)

    @server.method
    def call_back_outcome(how, method, *args):
        outcome = outcome_of(lambda: ask(shmrpc.current_call().caller, how, method, *args))
        outcomes.append(outcome)
        return outcome

    @server.method
    def call_back_outcomes():
        return outcomes

    @server.method
    def call_back_late(method, pause):
        time.sleep(pause)
        return shmrpc.current_call().caller.call(method)

    @server.method
    def call_back_stream(method, count, pause):
        for _ in range(count):
            time.sleep(pause)
            yield shmrpc.current_call().caller.call(method)

    @server.method
    def upload_back(method, items):
        with shmrpc.current_call().caller.open(method) as call:
            for item in items:
                call.send(item)
            call.close_send()
            return list(call)

    @server.method(requests=True)
    def calls_back_first(requests, method, pause):
        time.sleep(pause)
        yield shmrpc.current_call().caller.call(method)
        yield sum(requests)

    @server.method
    def notify_back(method, *args):
        shmrpc.current_call().caller.notify(method, *args)

    @server.method
    def nest_elsewhere(address, *args):
        """Call another server, which knows nothing of our caller."""
        with shmrpc.connect(address) as client:
            return ask(client, *args)


def add_streams(server):
    """Methods that stream or wait, and note how they ended."""
    running, ends, told = set(), [], threading.Event()

    @contextmanager
    def noted(label):
        call = shmrpc.current_call()
        running.add(label)
        try:
            yield call
        except BaseException as error:
            ends.append([label, type(error).__name__, call.cancelled])
            raise
        finally:
            running.discard(label)

    server.method(name="mark_running")(running.add)
    server.method(name="is_running")(running.__contains__)

    @server.method
    def ends_of(label):
        """How the handlers with this label ended since the last time that somebody asked."""
        found = [end for end in ends if end[0] == label]
        for end in found:
            ends.remove(end)
        return [end[1:] for end in found]

    @server.method
    def numbers(limit, pause=0):
        for number in range(limit):
            yield number
            time.sleep(pause)

    @server.method(requests=True)
    def pass_on(requests, label=""):
        """Bidirectional: each message comes back."""
        with noted(label):
            yield from requests

    @server.method(requests=True)
    def sum_up(requests, label=""):
        with noted(label):
            return sum(requests)

    @server.method
    def flood(label, size=0, pause=0):
        """As fast as its caller takes it, or slowly."""
        with noted(label):
            while True:
                yield bytes(size)
                time.sleep(pause)

    @server.method
    def until_cancelled(label):
        """Unary: ends when it sees that it is cancelled."""
        with noted(label) as call:
            end = time.monotonic() + 60
            while not call.cancelled and time.monotonic() < end:
                time.sleep(0.001)
            ends.append([label, "return", call.cancelled])

    @server.method
    def cancel_back(how, method):
        """Call the caller, and give that up when it notifies ``begun``."""
        caller = shmrpc.current_call().caller
        told.clear()
        call = caller.submit(method) if how == "submit" else caller.stream(method)

        def cancel():
            told.wait(10)
            call.cancel()

        threading.Thread(target=cancel, daemon=True).start()

    @server.method
    def begun():
        told.set()

    @server.method
    def stuck(seconds):
        """In C code that does not let go of the interpreter: nothing in this process runs."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def add_metadata(server):
    """Methods that answer with metadata."""
    kept = []

    def answer(initial, trailing):
        call = shmrpc.current_call()
        if initial is not None:
            call.send_initial_metadata(initial)
        if trailing is not None:
            call.set_trailing_metadata(trailing)
        return call.metadata

    @server.method
    def metadata_unary(initial=None, trailing=None, error=None):
        found = answer(initial, trailing)
        if error is not None:
            raise shmrpc.Abort("NOT_FOUND", error)
        return found

    @server.method
    def metadata_stream(initial=None, trailing=None, error=None):
        yield answer(initial, trailing)
        if error is not None:
            raise shmrpc.Abort("NOT_FOUND", error)

    @server.method(requests=True)
    def metadata_requests(requests, initial=None, trailing=None):
        call = shmrpc.current_call()
        call.send_initial_metadata(initial)
        count = sum(1 for _ in requests)
        call.set_trailing_metadata(trailing)
        return count

    @server.method
    def metadata_back(method, metadata):
        future = shmrpc.current_call().caller.submit(method, metadata=metadata)
        return [future.result(), future.initial_metadata, future.trailing_metadata]

    @server.method
    def metadata_mistakes(kind):
        """What the handler is told of what can't be sent; the call itself succeeds."""
        call = shmrpc.current_call()
        wrong = {
            "type": ["a"],
            "key": {1: "x"},
            "value": {"culprit": 1},
            "size": {"culprit": "x" * 9000},
            "text": {"culprit": "\udc80"},
        }[kind]
        found = []
        for use in (call.set_trailing_metadata, call.send_initial_metadata):
            try:
                use(wrong)
                found.append("no error")
            except (TypeError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error}")
        call.set_trailing_metadata({"after": kind})
        return found

    def attempt(work):
        try:
            return f"no error: {work()!r}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    @server.method
    def metadata_from_another_thread():
        call = shmrpc.current_call()
        with ThreadPoolExecutor(1) as pool:
            set_there = pool.submit(call.set_trailing_metadata, {"stray": "x"})
            return attempt(set_there.result)

    @server.method
    def keep_context():
        kept.append(shmrpc.current_call())

    used_late = []

    @server.method
    def keep_context_and_use_it_late():
        call = shmrpc.current_call()

        def use():
            time.sleep(0.1)
            used_late.append(attempt(lambda: call.set_trailing_metadata({"stray": "x"})))
            used_late.append(attempt(lambda: call.send_initial_metadata({"stray": "x"})))

        threading.Thread(target=use, daemon=True).start()

    server.method(name="used_late")(lambda: used_late)

    @server.method
    def use_kept_context(elsewhere):
        """The context of a call that is over, used in this thread or in another one."""

        def use():
            call = kept[-1]
            return [
                attempt(lambda: call.set_trailing_metadata({"stray": "x"})),
                attempt(lambda: call.send_initial_metadata({"stray": "x"})),
                attempt(lambda: call.caller.call("nothing")),
                call.cancelled,
            ]

        if not elsewhere:
            return use()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(use).result()


def add_duplex(server):
    add_callbacks(server)
    add_streams(server)
    add_metadata(server)
