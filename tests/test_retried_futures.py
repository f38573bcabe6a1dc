"""Futures whose calls are repeated: who waits, who is told, what is cancelled."""

import concurrent.futures
import os
import random
import threading
from concurrent.futures import Future

import pytest
from chains import ERRORS, Script, call_info, fail, finished, intercepted
from conftest import in_threads, wait_until

from shmrpc.retries import _THREADS_MAX, Retries


def submitted(final, retries=None, **options):
    retries = Retries(backoff=0.0) if retries is None else retries
    call = call_info("add", "submit", "client", **options)
    return intercepted([retries], call, final), call


def retry_threads():
    return [t for t in threading.enumerate() if t.name.startswith("shmrpc-retries")]


def test_what_can_not_be_repeated_is_raised_at_once():
    def final(call):
        raise TypeError("argument 1 can't be sent")

    with pytest.raises(TypeError, match="argument 1"):
        submitted(final)
    assert not retry_threads()


def test_a_future_of_a_later_attempt():
    attempts = [Future() for _ in range(3)]
    seen = []
    left = iter(attempts)

    def final(call):
        seen.append(threading.current_thread())
        return next(left)

    future, call = submitted(final)
    for number in range(2):
        assert not future.done()
        attempts[number].set_exception(ERRORS["not_started"]())
        wait_until(lambda number=number: len(seen) == number + 2)
    assert call.code is None
    attempts[2].set_result("result")
    assert future.result(0) == "result"
    assert call.code == "OK"
    assert seen[0] is threading.current_thread()
    assert threading.current_thread() not in seen[1:]


def test_callbacks_and_waiting():
    attempts = [Future(), Future()]
    left = iter(attempts)
    future, _ = submitted(lambda call: next(left))
    told = threading.Event()
    future.add_done_callback(lambda _: told.set())
    done, _ = concurrent.futures.wait([future], timeout=0)
    assert not done
    attempts[0].set_exception(ERRORS["connect"]())
    attempts[1].set_result(1)
    assert concurrent.futures.wait([future], timeout=10).done == {future}
    assert told.wait(10)


def test_cancelling_cancels_the_attempt():
    attempt = Future()
    future, call = submitted(lambda call: attempt)
    assert future.cancel()
    assert attempt.cancelled()
    assert future.cancelled()
    assert future.cancel()  # again: it still is
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(0)
    assert call.code == "CANCELLED"
    assert concurrent.futures.wait([future], timeout=0).done == {future}


def test_cancelling_in_a_pause_ends_it():
    random.seed(1)  # a pause of 0.13 s
    script = Script(["connect"] * 5)
    future, _ = submitted(script.submit, Retries(5, backoff=1.0))
    assert future.cancel()
    wait_until(lambda: not retry_threads())
    assert script.count() == 1


def test_cancelling_while_an_attempt_is_sent():
    sending, sent = threading.Event(), threading.Event()
    attempt = Future()
    script = Script(["connect"])

    def final(call):
        if script.ends:
            return script.submit(call)
        sending.set()
        assert sent.wait(10)
        return attempt

    future, _ = submitted(final)
    assert sending.wait(10)
    assert future.cancel()
    sent.set()
    wait_until(attempt.cancelled)


def test_cancelling_from_many_threads():
    for _ in range(50):
        attempt = Future()
        future, _ = submitted(lambda call, attempt=attempt: attempt)
        assert all(in_threads(4, lambda _, future=future: future.cancel()))
        assert attempt.cancelled()


def test_an_attempt_that_somebody_cancels():
    attempt = Future()
    future, _ = submitted(lambda call: attempt)
    attempt.cancel()
    assert future.cancelled()


def test_a_finished_future_is_not_cancelled():
    future, _ = submitted(lambda call: finished("result"))
    assert not future.cancel()
    assert future.result(0) == "result"


def test_futures_of_an_absent_server_take_few_threads():
    """Connecting blocks; the rest waits for its turn, and all threads end."""
    count, go = 40, threading.Event()
    lock, running = threading.Lock(), []
    peak = []

    def final(call):
        if threading.current_thread() not in retry_threads():
            fail("connect")
        with lock:
            running.append(call)
            peak.append(len(running))
        assert go.wait(20)
        with lock:
            running.remove(call)
        return finished(call.args[0])

    futures = []
    for number in range(count):
        call = call_info("add", "submit", "client", number)
        futures.append(intercepted([Retries(backoff=0.0)], call, final))
    wait_until(lambda: len(running) == _THREADS_MAX)
    assert len(retry_threads()) == _THREADS_MAX
    go.set()
    assert [future.result(20) for future in futures] == list(range(count))
    assert max(peak) == _THREADS_MAX
    wait_until(lambda: not retry_threads())


def test_from_many_threads():
    def work(number):
        for i in range(50):
            script = Script(["not_started", "connect", (number, i)])
            assert script.run("submit") == (number, i)

    in_threads(6, work)
    wait_until(lambda: not retry_threads())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child():
    """The child starts anew: pauses and threads of the parent are none of its business."""
    go = threading.Event()
    script = Script(["connect"])

    def final(call):
        if script.ends:
            return script.submit(call)
        go.wait(10)
        return finished("parent")

    future, _ = submitted(final)
    wait_until(lambda: script.count() == 1 and retry_threads())
    child = os.fork()
    if child == 0:
        try:
            good = Script(["connect", "result"]).run("submit") == "result"
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    assert future.result(10) == "parent"
