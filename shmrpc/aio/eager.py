"""Running a coroutine at once, which becomes a task only if it has to wait.

Python 3.12 has that: ``asyncio.Task(eager_start=True)``. On 3.11 the first step runs here, as if in
a task that is kept ready for it; the task takes the coroutine over if that suspends. Before 3.11 a
task's context can't be chosen, and every coroutine gets a task as usual.
"""

from __future__ import annotations

import asyncio
import sys
import types
from typing import TYPE_CHECKING, Any

from shmrpc.context import enter_task, leave_task

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Awaitable, Callable, Coroutine, Generator

__all__ = ["Starter", "start_task", "starter_of"]

_enter_task, _leave_task = asyncio._enter_task, asyncio._leave_task


class _Spare:
    """A task that waits for a coroutine to take over. Nobody sees it before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self.context = context.copy()
        self.gate: asyncio.Future[None] = loop.create_future()
        self.coroutine: Coroutine[Any, Any, None] | None = None
        self.cancelled: asyncio.CancelledError | None = None  # before it could run on
        # Registered and complained about as a task only once it is somebody's.
        task: Any = asyncio.Task(_take_over(self), loop=loop, context=self.context)  # type: ignore[arg-type, call-arg, unused-ignore]
        asyncio._unregister_task(task)
        task._log_destroy_pending = False
        self.task = task

    def adopt(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run this coroutine."""
        self.coroutine = coroutine
        asyncio._register_task(self.task)
        self.task._log_destroy_pending = True
        if not self.gate.done():
            self.gate.set_result(None)
        task: asyncio.Task[None] = self.task
        return task


@types.coroutine
def _take_over(spare: _Spare) -> Generator[Any, Any, None]:
    """What a spare task runs."""
    try:
        yield from spare.gate
    except asyncio.CancelledError as error:
        if spare.coroutine is None:
            raise
        spare.cancelled = error
    if spare.coroutine is not None:
        yield from spare.coroutine.__await__()


class Work:
    """What a driver is to run, and what became of it."""

    __slots__ = ("error", "result", "source")

    def __init__(self) -> None:
        self.source: Any = None  # of current_call()
        self.result: Any = None
        self.error: BaseException | None = None


@types.coroutine
def _drive(work: Work) -> Generator[Any, Any, None]:
    """Run the coroutines that are sent, one after the other, and yield what they wait for.

    ``work`` says that one has ended: so nothing has to be raised for that, as a coroutine does by
    itself. (None is what a coroutine yields that lets others run for a turn.)
    """
    while True:
        coroutine = yield work
        token = enter_task(work.source)
        try:
            work.result = yield from coroutine
        except (Exception, asyncio.CancelledError) as error:
            work.error = error
        leave_task(token)  # not if we are closed, perhaps in another context
        del coroutine, token


@types.coroutine
def _resume(driver: Any, work: Work, awaited: Any, spare: _Spare) -> Generator[Any, Any, Any]:
    """The rest of a coroutine that has suspended for ``awaited``, and its result."""
    try:
        if spare.cancelled is not None:
            awaited = driver.throw(spare.cancelled)
        while awaited is not work:
            try:
                sent = yield awaited
            except GeneratorExit:
                raise
            except BaseException as error:
                awaited = driver.throw(error)
            else:
                awaited = driver.send(sent)
    finally:
        driver.close()
    if work.error is not None:
        raise work.error
    return work.result


class Starter:
    """Runs the first steps of coroutines, on 3.11. Belongs to its loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        """Each coroutine gets a copy of ``context``."""
        self._loop = loop
        self._context = context
        self._renew()

    def _renew(self) -> None:
        self._spare = _Spare(self._loop, self._context)
        self.work = Work()
        self._driver: Any = _drive(self.work)
        self._send: Callable[[Any], Any] = self._driver.send
        self._send(None)

    def step(self, source: Any, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Begin the coroutine as if in its task, in which ``source`` runs the call.

        Returns what it waits for: ``adopt`` has to follow. ``work`` if it has ended: that has its
        result or error then, to be taken from there. No task may run.
        """
        spare = self._spare
        if spare.gate.done() or spare.context != self._context:
            self.close()  # the last coroutine cancelled it, or changed its context
            self._renew()
            spare = self._spare
        self.work.source = source
        _enter_task(self._loop, spare.task)
        try:
            return spare.context.run(self._send, coroutine)
        except BaseException:  # Ctrl-C: it ends the driver, too
            self._renew()
            raise
        finally:
            _leave_task(self._loop, spare.task)

    def adopt(
        self, run: Callable[[Awaitable[Any]], Coroutine[Any, Any, None]], awaited: Any
    ) -> asyncio.Task[None]:
        """The task that runs ``run(rest)``, where awaiting ``rest`` runs the coroutine on."""
        spare, driver, work = self._spare, self._driver, self.work
        self._renew()
        return spare.adopt(run(_resume(driver, work, awaited, spare)))

    def close(self) -> None:
        """Give the spare task up."""
        self._driver.close()
        self._spare.task.cancel()


def starter_of(loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> Starter | None:
    """One for this loop; None where tasks have to do, or can start eagerly by themselves."""
    if sys.version_info[:2] == (3, 11) and loop.get_task_factory() is None:
        return Starter(loop, context)
    return None


if sys.version_info >= (3, 12):

    def start_task(
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        run: Coroutine[Any, Any, None],
    ) -> asyncio.Task[None] | None:
        """Run the coroutine; one that ends without suspending never becomes a scheduled task."""
        task = asyncio.Task(run, loop=loop, context=context.copy(), eager_start=True)
        return None if task.done() else task

else:

    def start_task(
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        run: Coroutine[Any, Any, None],
    ) -> asyncio.Task[None] | None:
        """Run the coroutine in a task."""
        task: asyncio.Task[None] = context.run(loop.create_task, run)  # it copies the context
        return task
