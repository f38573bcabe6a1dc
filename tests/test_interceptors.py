"""The chain of interceptors, and what they see of a call."""

import asyncio
import concurrent.futures
import logging
import threading

import pytest
from chains import call_info, drive, finished, intercepted, intercepted_async
from conftest import in_threads

import shmrpc
from shmrpc.interceptors import compose, compose_async, status_of, when_done


class Noting:
    """Notes when it is passed, inwards and outwards."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def intercept(self, call, proceed):
        self.log.append(f"{self.name} in")
        try:
            return proceed(call)
        finally:
            self.log.append(f"{self.name} out")

    async def intercept_async(self, call, proceed):
        self.log.append(f"{self.name} in")
        try:
            return await proceed(call)
        finally:
            self.log.append(f"{self.name} out")


def interceptor(function):
    """An interceptor with both faces, of a function that does not await."""

    class Both:
        def intercept(self, call, proceed):
            return function(call, proceed)

        async def intercept_async(self, call, proceed):
            result = function(call, proceed)
            return await result if asyncio.iscoroutine(result) else result

    return Both()


@pytest.fixture(params=["sync", "async"])
def run(request):
    """``run(interceptors, call, final)`` through one of the two faces."""
    if request.param == "sync":
        return intercepted

    def in_loop(interceptors, call, final):
        async def awaited(call):
            return final(call)

        return asyncio.run(intercepted_async(interceptors, call, awaited))

    return in_loop


def add(call):
    return sum(call.args)


def test_the_first_is_outermost(run):
    log = []
    call = call_info("add", "unary", "client", 1, 2)
    assert run([Noting("a", log), Noting("b", log), Noting("c", log)], call, add) == 3
    assert log == ["a in", "b in", "c in", "c out", "b out", "a out"]
    assert call.code == "OK"


def test_no_interceptors(run):
    assert run([], call_info("add", "unary", "client", 1, 2), add) == 3


def test_the_request_may_be_replaced(run):
    def double(call, proceed):
        call.args = tuple(2 * arg for arg in call.args)
        call.metadata["by"] = "double"
        return proceed(call)

    call = call_info("add", "unary", "client", 1, 2)
    assert run([interceptor(double)], call, lambda call: [add(call), call.metadata]) == [
        6,
        {"by": "double"},
    ]


def test_the_call_may_be_replaced(run):
    """What goes further in need not be the same object."""
    other = call_info("add", "unary", "client", 10)
    call = call_info("add", "unary", "client", 1, 2)
    replaced = interceptor(lambda call, proceed: proceed(other))
    assert run([replaced], call, add) == 10


def test_the_response_may_be_replaced():
    class Doubled:
        def intercept(self, call, proceed):
            return 2 * proceed(call)

        async def intercept_async(self, call, proceed):
            return 2 * await proceed(call)

    assert intercepted([Doubled()], call_info("add", "unary", "client", 1, 2), add) == 6


def test_a_call_need_not_happen(run):
    def never(call):
        raise AssertionError

    call = call_info()
    assert run([interceptor(lambda call, proceed: "cached")], call, never) == "cached"
    assert call.code == "OK"


def test_a_call_may_happen_again():
    seen = []

    class Twice:
        def intercept(self, call, proceed):
            return [proceed(call), proceed(call)]

    def final(call):
        seen.append(call)
        return len(seen)

    assert intercepted([Twice()], call_info(), final) == [1, 2]


def test_exceptions_go_outwards(run):
    log = []

    def broken(call, proceed):
        raise RuntimeError("a broken interceptor")

    call = call_info()
    with pytest.raises(RuntimeError, match="broken") as caught:
        run([Noting("a", log), interceptor(broken)], call, add)
    assert log == ["a in", "a out"]
    assert call.error is caught.value
    assert call.code == "UNKNOWN"


def test_a_chain_is_made_once_and_used_by_many_threads():
    log = []
    chain = compose([Noting("a", log), Noting("b", log)], add)

    def work(number):
        for i in range(200):
            assert drive(chain, call_info("add", "unary", "client", number, i)) == number + i

    in_threads(4, work)
    assert len(log) == 4 * 200 * 4
    assert log.count("a in") == log.count("b out") == 800


def test_a_list_that_changes_later_changes_nothing():
    log = []
    interceptors = [Noting("a", log)]
    chain = compose(interceptors, add)
    interceptors.append(Noting("b", log))
    drive(chain, call_info())
    assert log == ["a in", "a out"]


@pytest.mark.parametrize("wrong", [None, print, object(), Noting], ids=["None", "f", "o", "class"])
def test_what_is_no_interceptor_is_refused_at_once(wrong):
    with pytest.raises(TypeError, match=r"an interceptor must be an object with .* intercept\(\)"):
        compose([Noting("a", []), wrong], add)
    with pytest.raises(TypeError, match=r"intercept_async\(\)"):
        compose_async([wrong], add)


def test_one_without_an_asynchronous_face_is_refused_by_asyncio():
    class OnlySync:
        def intercept(self, call, proceed):
            return proceed(call)

    with pytest.raises(TypeError, match=r"intercept_async\(\), not .*OnlySync"):
        compose_async([OnlySync()], add)


# ---- the end of a call ----


@pytest.mark.parametrize(
    "error, code",
    [
        (None, "OK"),
        (shmrpc.DeadlineExceeded("late"), "DEADLINE_EXCEEDED"),
        (shmrpc.ConnectionLost("gone"), "UNAVAILABLE"),
        (shmrpc.Abort("NOT_FOUND", "no order"), "NOT_FOUND"),
        (shmrpc.RemoteError("?", code="a code of nobody's"), "UNKNOWN"),
        (ValueError(), "UNKNOWN"),
        (TimeoutError(), "UNKNOWN"),
        (KeyboardInterrupt(), "CANCELLED"),
        (GeneratorExit(), "CANCELLED"),
        (asyncio.CancelledError(), "CANCELLED"),
        (concurrent.futures.CancelledError(), "CANCELLED"),
    ],
    ids=repr,
)
def test_codes(error, code):
    assert status_of(error) == code
    call = call_info()
    assert call.code is None
    call.finish(error)
    assert (call.code, call.error) == (code, error)


def test_done_callbacks():
    call, seen = call_info(), []
    call.add_done_callback(lambda ended: seen.append((1, ended is call, ended.code)))
    call.add_done_callback(lambda _: seen.append(2))
    assert not seen
    call.finish()
    call.finish(ValueError("too late"))
    assert seen == [(1, True, "OK"), 2]
    call.add_done_callback(lambda ended: seen.append(ended.code))  # at once
    assert seen[2:] == ["OK"]


def test_a_done_callback_that_raises_is_logged(caplog):
    call, seen = call_info("some.method"), []

    def broken(_):
        raise ValueError("a broken callback")

    with caplog.at_level(logging.ERROR, logger="shmrpc"):
        call.add_done_callback(broken)
        call.add_done_callback(seen.append)
        call.finish()
    assert seen == [call]
    assert "some.method" in caplog.text
    assert "a broken callback" in caplog.text


def test_a_done_callback_may_add_another():
    call, seen = call_info(), []
    call.add_done_callback(lambda ended: ended.add_done_callback(seen.append))
    call.finish()
    assert seen == [call]


def test_finishing_from_many_threads():
    """However threads meet, each callback runs once."""
    for _ in range(200):
        call, seen = call_info(), []
        start = threading.Barrier(4)

        def work(number, call=call, seen=seen, start=start):
            start.wait(10)
            if number % 2:
                call.finish(ValueError(number))
            else:
                call.add_done_callback(seen.append)

        in_threads(4, work)
        assert seen == [call, call]


def test_when_done():
    ends = []
    when_done(call_info(kind="unary"), "result", ends.append)
    when_done(call_info(kind="notify"), None, ends.append)
    assert ends == [None, None]

    future = concurrent.futures.Future()
    submitted = call_info(kind="submit")
    when_done(submitted, future, ends.append)
    submitted.finish()  # the future is what counts: it may be one attempt of several
    assert ends[2:] == []
    future.set_result(1)
    assert ends[2:] == [None]
    error = ValueError()
    when_done(call_info(kind="submit"), finished(error=error), ends.append)
    assert ends[3:] == [error]
    cancelled = concurrent.futures.Future()
    when_done(call_info(kind="submit"), cancelled, ends.append)
    cancelled.cancel()
    assert isinstance(ends[4], concurrent.futures.CancelledError)

    for call in (call_info(kind="stream"), call_info(kind="unary", side="server")):
        when_done(call, "result", ends.append)
        assert len(ends) == 5
        call.finish(error)
        assert ends.pop() is error


def test_representation():
    call = call_info("math.add", "stream", "server")
    assert repr(call) == "<CallInfo server stream 'math.add' running>"
    call.finish(shmrpc.Cancelled("by the caller"))
    assert repr(call) == "<CallInfo server stream 'math.add' CANCELLED>"


def test_a_misspelled_attribute_is_an_error():
    with pytest.raises(AttributeError):
        call_info().time_out = 5
