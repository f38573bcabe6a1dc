"""Which calls are repeated, when, and what of them is left to see."""

import asyncio
import gc
import random
import time
import weakref

import pytest
from chains import (
    ERRORS,
    HAS_NOT_RUN,
    REPEATED,
    Script,
    call_info,
    fail,
    finished,
    intercepted,
    intercepted_async,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import shmrpc
from shmrpc.interceptors import compose
from shmrpc.retries import Retries, _Attempts

# ---- which ----


@pytest.mark.parametrize("kind", ["unary", "submit"])
@pytest.mark.parametrize("end", sorted(HAS_NOT_RUN))
def test_a_call_that_has_not_run_is_repeated(kind, end):
    script = Script([end, end, "result"])
    assert script.run(kind) == "result"
    assert script.count() == 3
    assert script.count("ask") == 0


@pytest.mark.parametrize("kind", ["unary", "submit"])
@pytest.mark.parametrize("end", sorted(HAS_NOT_RUN))
def test_the_last_error_is_raised(kind, end):
    script = Script([end] * 5)
    assert script.run(kind, attempts=4) == f"proceed {end}"
    assert script.count() == 4


@pytest.mark.parametrize("kind", ["unary", "submit", "notify", "stream"])
@pytest.mark.parametrize("end", sorted(set(ERRORS) - REPEATED))
def test_answers_are_never_repeated(kind, end):
    script = Script([end, "result"], answers=[True])
    assert script.run(kind) == f"proceed {end}"
    assert script.log == [("proceed", end)]


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_a_call_that_may_have_run_is_repeated_if_it_may_run_twice(kind):
    script = Script(["unknown", "unknown", "result"], answers=[True, False])
    assert script.run(kind) == "result"
    # It is asked when the answer is needed, and once.
    assert [what for what, _ in script.log] == ["proceed", "ask", "proceed", "proceed"]


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_a_call_that_may_have_run_is_not_repeated_otherwise(kind):
    script = Script(["unknown", "result"], answers=[False])
    assert script.run(kind) == "proceed unknown"
    assert script.count() == 1


def test_nobody_declares_methods_idempotent_by_default():
    calls = []

    def final(call):
        calls.append(call)
        raise shmrpc.ConnectionLost("lost")

    with pytest.raises(shmrpc.ConnectionLost):
        intercepted([Retries()], call_info(), final)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_a_question_that_fails_is_an_attempt(kind):
    script = Script(["unknown", "result"], answers=["connect", "unknown", True])
    assert script.run(kind, attempts=4) == "result"
    assert script.count("ask") == 3


@pytest.mark.parametrize("kind", ["unary", "submit"])
@pytest.mark.parametrize("answers", [["connect"] * 2, ["not_sent"] * 2, ["overloaded"]])
def test_a_question_that_fails_for_good_hides_nothing(kind, answers):
    """That there was no connection in the end does not mean that the call has not run."""
    script = Script(["unknown"], answers=answers)
    assert script.run(kind, attempts=3) == "proceed unknown"
    assert script.log[1:] == [("ask", answer) for answer in answers]


@pytest.mark.parametrize("end", sorted(REPEATED))
def test_a_later_loss_hides_no_earlier_one(end):
    script = Script(["unknown", end, end], answers=[True])
    assert script.run() == "proceed unknown"
    assert script.count() == 3


@pytest.mark.parametrize("end", ["deadline", "remote"])
def test_a_later_answer_counts(end):
    assert Script(["unknown", end], answers=[True]).run() == f"proceed {end}"


@pytest.mark.parametrize("kind", ["notify", "stream"])
def test_streams_and_notifications_are_repeated_while_nothing_was_sent(kind):
    script = Script(["connect", "not_sent", "result"])
    assert script.run(kind) == "result"
    for end in ("not_started", "unknown"):
        script = Script([end, "result"], answers=[True])
        assert script.run(kind) == f"proceed {end}"
        assert script.log == [("proceed", end)]


def test_a_stream_that_began_is_not_repeated():
    """Its items may be lost with the connection: that is for its reader to know."""
    streams = []

    def final(call):
        streams.append(call)

        def items():
            yield 1
            raise shmrpc.ConnectionLost("lost", "not_started")

        return items()

    stream = intercepted([Retries()], call_info(kind="stream"), final)
    assert next(stream) == 1
    with pytest.raises(shmrpc.ConnectionLost):
        next(stream)
    assert len(streams) == 1


SCRIPTS = {
    "attempts": st.integers(1, 6),
    "ends": st.lists(st.sampled_from([*REPEATED, *ERRORS, "result"]), max_size=8),
    "answers": st.lists(st.sampled_from([True, False, *REPEATED, "remote"]), max_size=6),
    "later": st.lists(st.booleans(), max_size=8),
}


@settings(deadline=None, max_examples=300)
@given(**SCRIPTS)
def test_any_script(attempts, ends, answers, later):
    """What holds whatever happens, and that both faces and futures do the same."""
    script = Script(ends, answers)
    end = script.run(attempts=attempts)
    log = script.log
    assert 1 <= script.count() <= attempts
    assert len([entry for entry in log if entry[1] not in {"result", True}]) <= attempts
    for number, (what, how) in enumerate(log):
        rest, allowed = log[number + 1 :], ("ask", True) in log[:number]
        if what == "proceed" and how == "unknown" and not allowed and rest:
            assert rest[0][0] == "ask"
        if what == "ask" and how is not True:
            following = rest[0][0] if rest else None
            assert following in ({"ask", None} if how in REPEATED else {None})
        if what == "proceed" and how not in REPEATED:
            assert not rest
    last = log[-1]
    if end == "result":
        assert last == ("proceed", "result")
        outcomes = []
    else:
        failures = [entry for entry in log if entry[1] is not True]
        assert len(failures) == attempts or last[1] not in REPEATED
        outcomes = [how for what, how in log if what == "proceed"]
    if "unknown" in outcomes:
        assert end.removeprefix("proceed ") not in HAS_NOT_RUN

    for other in ({"face": "async"}, {"kind": "submit"}):
        again = Script(ends, answers, later)
        assert (again.run(attempts=attempts, **other), again.log) == (end, log)


# ---- when ----


@settings(max_examples=200)
@given(
    backoff=st.floats(0, 1e6),
    factor=st.floats(1, 1e9),
    failures=st.integers(1, 3000),
    timeout=st.none() | st.floats(0, 1e7),
)
def test_pauses(backoff, factor, failures, timeout):
    """Between nothing and a bound that doubles up to a maximum; never past the timeout."""
    policy = Retries(failures + 1, backoff=backoff, backoff_max=backoff * factor)
    attempts = _Attempts(policy, call_info(timeout=timeout))
    attempts._failures = failures - 1
    before = time.monotonic()
    try:
        pause = attempts.failed(ERRORS["connect"]())
    except shmrpc.ConnectError:
        assert timeout is not None
        return
    assert 0 <= pause <= min(backoff * 2 ** min(failures - 1, 100), backoff * factor)
    if timeout is not None:
        assert pause < timeout + 1e-3
        assert before + pause < time.monotonic() + timeout


def test_pauses_are_spread():
    """Full jitter: many clients that lose one server do not come back together."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    policy = Retries(3, backoff=0.5)
    pauses = [_Attempts(policy, call_info()).failed(ERRORS["connect"]()) for _ in range(300)]
    assert min(pauses) < 0.1
    assert max(pauses) > 0.4


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_rather_than_sleep_past_the_timeout_it_fails(kind):
    random.seed(1)  # the first pause is some 134 s of 1000
    script = Script(["connect", "result"])
    call = call_info("add", kind, timeout=30.0)
    with pytest.raises(shmrpc.ConnectError):
        intercepted([Retries(backoff=1000.0, backoff_max=1000.0)], call, script.proceed)
    assert script.count() == 1


@pytest.mark.parametrize("kind", ["unary", "submit"])
def test_the_timeout_counts_from_the_first_attempt(kind):
    given = []

    def final(call):
        given.append(call.timeout)
        if len(given) < 4:
            fail("connect")
        return finished("result") if kind == "submit" else "result"

    result = intercepted([Retries(9, backoff=0.0)], call_info("x", kind, timeout=50.0), final)
    assert (result.result(10) if kind == "submit" else result) == "result"
    assert given[0] == 50.0
    assert sorted(given, reverse=True) == given
    assert 0 < given[3] < 50.0


def test_an_attempt_whose_time_was_up_before_its_turn():
    """It gets a timeout of zero, not a negative one, which no client accepts."""
    call = call_info(timeout=1.0)
    attempts = _Attempts(Retries(9, backoff=0.0), call)
    attempts.failed(ERRORS["connect"]())
    attempts._until = time.monotonic() - 1
    attempts.begin()
    assert call.timeout == 0.0


def test_without_a_timeout_none_is_passed_on():
    given = []

    def final(call):
        given.append(call.timeout)
        fail("connect")

    with pytest.raises(shmrpc.ConnectError):
        intercepted([Retries(backoff=0.0)], call_info(), final)
    assert given == [None] * 3


@pytest.mark.parametrize(
    "options, text",
    [
        ({"attempts": 0}, "attempts"),
        ({"attempts": -1}, "attempts"),
        ({"backoff": -0.1}, "backoff"),
        ({"backoff": 2.0}, "backoff_max"),
        ({"backoff": float("nan")}, "backoff"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        Retries(**options)


# ---- what the attempts see, and what is left of them ----


def test_each_attempt_gets_the_request_as_it_was():
    """Interceptors further in change it, and must not find their own changes."""

    class Changing:
        def intercept(self, call, proceed):
            call.args = (call.args[0] + 1, "added")
            call.kwargs["key"] = call.kwargs.get("key", 0) + 1
            call.metadata["count"] = call.metadata.get("count", "") + "x"
            return proceed(call)

    seen = []

    def final(call):
        seen.append((call.args, dict(call.kwargs), dict(call.metadata), call.deadline))
        call.deadline = 5.0
        call.trailing_metadata["left"] = "over"
        if len(seen) < 3:
            fail("not_started")
        return call.trailing_metadata

    call = call_info("add", "unary", "client", 1, metadata={"a": "b"})
    result = intercepted([Retries(backoff=0.0), Changing()], call, final)
    assert seen == [((2, "added"), {"key": 1}, {"a": "b", "count": "x"}, None)] * 3
    assert result == {"left": "over"}


def test_no_error_is_kept_alive_by_its_own_traceback():
    """Its frames hold connections, which must not wait for the garbage collector."""

    def final(call):
        if call.args:
            raise shmrpc.ConnectionLost("lost")
        raise shmrpc.ConnectError("nobody there")

    gone = []
    gc.collect()
    gc.disable()
    try:
        for args in ((), ("may have run",)):
            chain = compose([Retries(backoff=0.0)], final)
            try:
                chain(call_info("add", "unary", "client", *args))
            except shmrpc.Error as error:
                gone.append(weakref.ref(error))
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_an_interruption_is_never_repeated():

    def final(call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        intercepted([Retries()], call_info(), final)


def test_async_cancellation_ends_a_pause():
    script = Script(["connect"] * 10)
    random.seed(1)

    async def main():
        retries = Retries(10, backoff=1000.0, backoff_max=1000.0)
        task = asyncio.create_task(intercepted_async([retries], call_info(), script.proceed_async))
        while not script.log:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert script.count() == 1


def test_async_default_answer():
    script = Script(["unknown", "result"])

    async def main():
        await intercepted_async([Retries(backoff=0.0)], call_info(), script.proceed_async)

    with pytest.raises(shmrpc.ConnectionLost):
        asyncio.run(main())
