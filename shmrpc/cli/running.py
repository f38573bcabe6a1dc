"""Running a server, synchronous or not, until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING

import shmrpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from shmrpc import aio

    from .targets import AnyServer

__all__ = ["run_server"]


def run_server(
    server: AnyServer,
    grace: float,
    on_start: Callable[[list[str]], None],
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Serve until one of these signals, then stop with this grace; the next interrupts.

    ``on_start`` is called when it serves, with where. Raises ``shmrpc.Error``.
    """
    if not isinstance(server, shmrpc.Server):
        import asyncio  # for those who have an asynchronous server: the others start faster

        asyncio.run(_run_async(server, grace, on_start, signals))
        return
    with _caught(signals) as wait:
        server.start()
        try:
            on_start(server.addresses)
            wait()
        finally:
            server.stop(grace)


async def _run_async(
    server: aio.Server,
    grace: float,
    on_start: Callable[[list[str]], None],
    signals: Sequence[int],
) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in signals:
        loop.add_signal_handler(number, stopped.set)
    try:
        await server.start()
        try:
            on_start(server.addresses)
            await stopped.wait()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            await server.stop(grace)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _caught(signals: Sequence[int]) -> Iterator[Callable[[], None]]:
    """Give a function that waits for one of them.

    Signals are caught from before the server starts (``Server.serve_forever`` would begin later),
    so that there is no moment in which one leaves a socket behind. Those after the wait interrupt.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    waiting = True

    def note(number: int, frame: FrameType | None) -> None:
        _ = frame
        if not waiting:
            raise KeyboardInterrupt(number)

    def wait() -> None:
        nonlocal waiting
        while not set(reader.recv(64)) & set(signals):
            pass
        waiting = False

    before = {number: signal.signal(number, note) for number in signals}
    # A signal wakes the main thread through the socket, whichever thread the kernel gives it to.
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield wait
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
