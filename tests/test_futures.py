"""``submit`` and its futures."""

import concurrent.futures
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import SLACK, TRANSPORTS, in_threads, wait_until

import shmrpc


def test_result_and_exception(client):
    future = client.submit("add", 1, b=2)
    assert future.result() == 3
    assert future.result(timeout=0) == 3
    assert future.exception() is None
    assert future.done()
    assert not future.cancelled()
    failing = client.submit("raise_error", "ValueError", "no")
    assert isinstance(failing.exception(5), shmrpc.RemoteError)
    with pytest.raises(shmrpc.RemoteError, match="no"):
        failing.result()
    with pytest.raises(shmrpc.MethodNotFound):
        client.submit("no_such_method").result(5)
    assert client.submit("nothing").result(5) is None


def test_wrong_arguments_raise_at_once(client):
    with pytest.raises(TypeError, match="argument 2"):
        client.submit("add", 1, object())
    with pytest.raises(TypeError, match="'b'"):
        client.submit("add", 1, b=object())
    with pytest.raises(ValueError, match="timeout"):
        client.submit("add", 1, timeout=-1)
    with pytest.raises(TypeError, match="str"):
        client.submit(5)
    assert client.submit("add", 1, 2).result(5) == 3


def test_result_with_a_timeout_of_its_own(client):
    """The timeout of ``result`` ends the wait, not the call."""
    future = client.submit("sleep", 0.5, "late")
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.05)
    assert not future.done()
    assert future.result(timeout=10) == "late"


def test_done_without_waiting(client):
    future = client.submit("add", 1, 2)
    wait_until(future.done)
    assert future.result(0) == 3


def test_thousands_in_flight(transport, service, connect):
    client = connect(service(transport, max_concurrency=10_000).address)
    futures = [client.submit("echo", number) for number in range(5000)]
    assert [future.result(30) for future in futures] == list(range(5000))


def test_results_in_any_order(client):
    futures = [client.submit("echo", number) for number in range(500)]
    for number in reversed(range(500)):
        assert futures[number].result(20) == number


def test_done_callback(client):
    called = threading.Event()
    found = []

    def callback(future):
        found.append((future.result(0), threading.current_thread() is threading.main_thread()))
        called.set()

    future = client.submit("sleep", 0.1, "x")
    future.add_done_callback(callback)
    assert called.wait(10)  # nobody asks for the result
    assert found == [("x", False)]
    future.add_done_callback(callback)  # of a finished one: at once
    assert found[1:] == [("x", True)]


def test_observing_one_that_is_finished(client):
    """Another thread may have taken the reply before whoever submitted looks on."""
    ends = []
    finished = client.submit("add", 1, 2)
    assert finished.result(5) == 3
    finished.observe(ends.append)
    assert ends == [None]
    failed = client.submit("raise_error", "ValueError", "no")
    error = failed.exception(5)
    failed.observe(ends.append)
    assert ends == [None, error]
    cancelled = client.submit("hold_until_cancelled")
    cancelled.cancel()
    cancelled.observe(ends.append)
    assert isinstance(ends[2], concurrent.futures.CancelledError)


def test_done_callback_may_call(client):
    """A callback runs in whatever thread reads; it may use the client itself."""
    results = []
    done = threading.Event()

    def callback(future):
        results.append(client.call("add", future.result(0), 1))
        client.submit("add", 10, 1).add_done_callback(second)

    def second(future):
        results.append(future.result(0))
        done.set()

    client.submit("echo", 1).add_done_callback(callback)
    assert done.wait(10)
    assert results == [2, 11]


def test_done_callback_that_raises(client, monkeypatch):
    monkeypatch.setattr(logging.getLogger("concurrent.futures"), "disabled", True)
    raised, done = threading.Event(), threading.Event()

    def callback(future):
        raised.set()
        raise ValueError("a broken callback")

    client.submit("sleep", 0.05).add_done_callback(callback)
    assert raised.wait(10)
    assert client.call("add", 1, 2) == 3
    client.submit("sleep", 0.05).add_done_callback(lambda _: done.set())
    assert done.wait(10)


def test_wait_and_as_completed(client):
    futures = [client.submit("sleep", pause, pause) for pause in (0.2, 0.05, 0.4)]
    order = [future.result() for future in concurrent.futures.as_completed(futures, timeout=20)]
    assert sorted(order) == [0.05, 0.2, 0.4]
    futures = [client.submit("sleep", 0.05), client.submit("hold_until_cancelled")]
    done, pending = concurrent.futures.wait(
        futures, timeout=10, return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert (done, pending) == ({futures[0]}, {futures[1]})
    futures[1].cancel()


def test_callbacks_of_many(client):
    count = 300
    lock, seen, done = threading.Lock(), [], threading.Event()

    def callback(future):
        with lock:
            seen.append(future.result(0))
            if len(seen) == count:
                done.set()

    for number in range(count):
        client.submit("echo", number).add_done_callback(callback)
        assert client.call("add", number, 1) == number + 1
    assert done.wait(20)
    assert sorted(seen) == list(range(count))


def test_cancel(client):
    future = client.submit("hold_until_cancelled")
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    wait_until(lambda: client.call("running") == 0)
    finished = client.submit("add", 1, 2)
    assert finished.result(5) == 3
    assert not finished.cancel()
    assert finished.result() == 3


def test_cancel_twice(client):
    future = client.submit("hold_until_cancelled")
    assert future.cancel()
    assert future.cancel()  # as any Future says of one that is cancelled
    wait_until(lambda: client.call("running") == 0)


def test_cancel_while_another_thread_waits(client):
    future = client.submit("hold_until_cancelled")
    caught = []

    def wait():
        try:
            future.result()
        except concurrent.futures.CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    assert future.cancel()
    thread.join(10)
    assert caught
    assert time.monotonic() - start < 1 * SLACK


def test_as_completed_counts_each_future_once(client):
    """Some end between its look at them and its entry into the list of who is told."""

    def complete(futures):
        return len(list(concurrent.futures.as_completed(futures, timeout=30)))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for _ in range(200):
            futures = [client.submit("echo", number) for number in range(30)]
            completed = [threads.submit(complete, futures) for _ in range(2)]
            for future in futures[::3]:
                future.cancel()
            for future in futures[1::3]:
                assert future.result() in range(30)
            assert [each.result() for each in completed] == [30, 30]


@pytest.mark.parametrize("until", ["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"])
def test_a_future_that_ends_while_wait_counts(client, monkeypatch, until):
    """``wait`` has seen that it is not finished, and found it finished when it looked again.

    Then it waited for ever: nobody was left to tell it.
    """
    module = concurrent.futures._base
    install = module._create_and_install_waiters
    readers = []

    def end_meanwhile(futures, how):
        reader = threading.Thread(target=client.call, args=("sleep", 0.4, 0))
        readers.append(reader)
        reader.start()  # it tells the future when it gets its lock
        wait_until(lambda: future._came is not None)
        return install(futures, how)

    monkeypatch.setattr(module, "_create_and_install_waiters", end_meanwhile)
    future = client.submit("sleep", 0.1, "result")
    done, _ = concurrent.futures.wait([future], 20, getattr(concurrent.futures, until))
    assert done == {future}
    assert future.result(20) == "result"
    for reader in readers:
        reader.join(20)


def test_each_future_ends_once(client):
    """Replies, cancellations, callbacks and waits race for the same futures."""
    count = 200
    futures = [client.submit("echo", number) for number in range(count)]
    called, ended = [], threading.Event()

    def callback(future):
        called.append(future)
        if len(called) == count:
            ended.set()

    def work(thread):
        if thread == 0:
            return [number for number, future in enumerate(futures) if future.cancel()]
        if thread == 1:
            for future in futures:
                future.add_done_callback(callback)
        elif thread == 2:
            return sorted(map(id, concurrent.futures.as_completed(futures, timeout=30)))
        else:
            concurrent.futures.wait(futures, timeout=30)
        return None

    cancelled, _, completed, _ = in_threads(4, work)
    assert ended.wait(30)
    assert sorted(map(id, called)) == completed == sorted(map(id, futures))
    for number, future in enumerate(futures):
        assert future.done()
        assert not future.running()
        assert future.cancelled() == (number in cancelled)
        if number not in cancelled:
            assert future.result(0) == number
            assert future.exception(0) is None
            assert not future.cancel()


def test_a_cancelled_call_in_the_queue_is_never_started(transport, service, connect, directory):
    client = connect(service(transport, workers=1).address)
    path, release = os.path.join(directory, "started"), os.path.join(directory, "release")
    holding = client.submit("hold", release, "held")
    queued = [client.submit("note", path, str(number)) for number in range(4)]
    assert queued[1].cancel()
    assert queued[3].cancel()
    client.ping()  # so the cancellations have arrived
    Path(release).touch()
    assert holding.result(10) == "held"
    queued[0].result(10)
    queued[2].result(10)
    assert client.call("add", 1, 2) == 3
    assert Path(path).read_text().split() == ["0", "2"]


def test_timeout(client):
    start = time.monotonic()
    future = client.submit("hold_until_cancelled", timeout=0.2)
    with pytest.raises(shmrpc.DeadlineExceeded):
        future.result()
    assert 0.19 < time.monotonic() - start < 0.2 + 0.2 * SLACK
    wait_until(lambda: client.call("running") == 0)
    with pytest.raises(shmrpc.DeadlineExceeded):
        client.submit("sleep", 1, timeout=0).result(5)
    assert client.submit("add", 1, 2, timeout=1e9).result(5) == 3


def test_timeouts_reach_callbacks(client):
    """Also when the one with the earlier deadline came later."""
    slow = client.submit("hold_until_cancelled")
    slow.add_done_callback(lambda _: None)
    time.sleep(0.1)  # the reader waits by now
    start = time.monotonic()
    ended = threading.Event()
    first = client.submit("sleep", 3, timeout=0.2)
    first.add_done_callback(lambda _: ended.set())
    assert ended.wait(10)
    assert time.monotonic() - start < 0.2 + 0.2 * SLACK
    assert isinstance(first.exception(0), shmrpc.DeadlineExceeded)
    assert not slow.done()
    slow.cancel()


def test_close_ends_futures(transport, service):
    running = service(transport)
    client = shmrpc.connect(running.address)
    quiet = client.submit("hold")
    told = client.submit("hold")
    ended = threading.Event()
    told.add_done_callback(lambda _: ended.set())
    waiting = client.submit("hold")
    caught = []

    def wait():
        caught.append(waiting.exception())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    client.close()
    thread.join(10)
    assert ended.wait(10)
    for future in (quiet, told, waiting):
        assert isinstance(future.exception(0), shmrpc.Error)
    assert isinstance(caught[0], shmrpc.Error)


def test_close_while_a_background_thread_reads(client, common, transport):
    """Nothing is printed, no thread dies of it: pytest makes an error of one that does."""
    for number in range(30):
        with shmrpc.connect(common.addresses[TRANSPORTS.index(transport)]) as other:
            futures = [other.submit("add", number, 1) for _ in range(10)]
            for future in futures:
                future.add_done_callback(lambda _: None)
            if number % 2:
                time.sleep(0.001 * (number % 5))
        assert all(future.done() for future in futures)


def test_futures_and_calls_from_many_threads(client):
    def work(number):
        for i in range(150):
            future = client.submit("add", number, i)
            assert client.call("echo", i) == i
            assert future.result(20) == number + i

    in_threads(6, work)


def test_one_future_many_waiters(client):
    future = client.submit("sleep", 0.2, "x")
    assert in_threads(8, lambda _: future.result(20)) == ["x"] * 8
