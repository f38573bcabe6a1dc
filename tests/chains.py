"""Calls through a chain of interceptors without a connection: what clients and servers do."""

import asyncio
import contextlib
import inspect
from concurrent.futures import CancelledError, Future

import shmrpc
from shmrpc.interceptors import CallInfo, compose, compose_async
from shmrpc.retries import Retries


def call_info(method="add", kind="unary", side="client", *args, metadata=None, **options):
    return CallInfo(method, kind, side, args, {}, {} if metadata is None else metadata, **options)


def intercepted(interceptors, call, final):
    """Run one call and finish it when it has ended; ``final`` takes the CallInfo."""
    return drive(compose(interceptors, final), call)


def drive(chain, call):
    try:
        result = chain(call)
    except BaseException as error:
        call.finish(error)
        raise
    if call.kind == "submit":
        result.add_done_callback(lambda future: call.finish(outcome(future)))
    elif inspect.isgenerator(result):
        return until_end(result, call)
    else:
        call.finish()
    return result


def outcome(future):
    return CancelledError() if future.cancelled() else future.exception()


def until_end(generator, call):
    try:
        yield from generator
    except BaseException as error:
        call.finish(error)
        raise
    call.finish()


async def intercepted_async(interceptors, call, final):
    try:
        result = await compose_async(interceptors, final)(call)
    except BaseException as error:
        call.finish(error)
        raise
    if inspect.isasyncgen(result):
        return until_end_async(result, call)
    call.finish()
    return result


async def until_end_async(generator, call):
    try:
        async with contextlib.aclosing(generator):
            async for value in generator:
                yield value
    except BaseException as error:
        call.finish(error)
        raise
    call.finish()


def finished(value=None, error=None):
    """A future that has its outcome."""
    future = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


# ---- a connection that gets lost ----

ERRORS = {
    "connect": lambda: shmrpc.ConnectError("nobody at shm://calc"),
    "not_sent": lambda: shmrpc.ConnectionLost("lost", "not_sent"),
    "not_started": lambda: shmrpc.ConnectionLost("lost", "not_started"),
    "unknown": lambda: shmrpc.ConnectionLost("lost", "unknown"),
    "deadline": lambda: shmrpc.DeadlineExceeded("late"),
    "overloaded": lambda: shmrpc.Overloaded("busy"),
    "remote": lambda: shmrpc.RemoteError("unavailable itself", code="UNAVAILABLE"),
    "closed": lambda: shmrpc.Cancelled("the client is closed"),
    "arguments": lambda: TypeError("argument 1"),
}


def fail(name):
    error = ERRORS[name]()
    raise error


HAS_NOT_RUN = {"connect", "not_sent", "not_started"}
REPEATED = HAS_NOT_RUN | {"unknown"}


class Script:
    """A connection that behaves as told, and a log of what was done with it."""

    def __init__(self, ends, answers=(), later=()):
        self.ends = list(ends)  # of the attempts: names of ERRORS, or anything else: the result
        self.answers = list(answers)  # to the question: names of ERRORS, or bools
        self.later = list(later)  # which futures fail after they were returned
        self.log = []
        self.raised = {}  # id of an error -> what failed
        self.kept = []

    def _play(self, what, script):
        end = script.pop(0) if script else "remote"
        self.log.append((what, end))
        if end in ERRORS:
            error = ERRORS[end]()
            self.kept.append(error)
            self.raised[id(error)] = f"{what} {end}"
            raise error
        return end

    def proceed(self, call):
        return self._play("proceed", self.ends)

    def ask(self):
        return self._play("ask", self.answers)

    def submit(self, call):
        if not (self.later.pop(0) if self.later else True):
            return finished(self.proceed(call))
        future = Future()
        try:
            value = self.proceed(call)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(value)
        return future

    async def proceed_async(self, call):
        return self.proceed(call)

    async def ask_async(self):
        return self.ask()

    def count(self, what="proceed"):
        return [name for name, _ in self.log].count(what)

    def run(self, kind="unary", attempts=3, face="sync", **options):
        """Through ``Retries``; returns what it returned, or the name of what it raised."""
        retries = Retries(attempts, backoff=0.0)
        ask = self.ask_async if face == "async" else self.ask
        call = call_info("add", kind, "client", idempotent=ask, **options)
        try:
            if face == "async":
                return asyncio.run(intercepted_async([retries], call, self.proceed_async))
            if kind == "submit":
                return intercepted([retries], call, self.submit).result(10)
            return intercepted([retries], call, self.proceed)
        except Exception as error:
            return self.raised.get(id(error), "an error of nobody's")
