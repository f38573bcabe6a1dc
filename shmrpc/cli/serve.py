"""``shmrpc serve``: run a server that a module defines."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

import shmrpc

from .errors import Failure, failure_of
from .options import check_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, ModuleType

__all__ = ["serve"]

_DEFAULT_NAME = "server"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command(name="serve")
@click.argument("target", metavar="MODULE[:SERVER]")
@click.option(
    "--grace",
    type=float,
    callback=check_interval,
    metavar="SECONDS",
    default=5.0,
    show_default=True,
    help="Seconds that calls under way get to end when the server stops.",
)
def serve(*, target: str, grace: float) -> None:
    """Run the server that MODULE defines, until SIGTERM or Ctrl-C.

    SERVER is the name of a shmrpc.Server in the module, or of a function without arguments that
    makes one; by default it is "server". The current directory is searched for the module first.

    On SIGTERM or Ctrl-C it refuses new calls, lets those under way end, and exits with status 0;
    a second one ends it at once.

    \b
    Examples:
      shmrpc serve calc                the object "server" of calc.py
      shmrpc serve app.services:make   what make() of app/services.py returns
    """  # noqa: D301 - click wants the character \b itself
    server = _find_server(target)
    with _signals() as wait:
        try:
            server.start()
        except shmrpc.Error as error:
            raise failure_of(error) from error
        try:
            where = ", ".join(server.addresses)
            click.echo(f"serving {target} at {where} (pid {os.getpid()})", err=True)
            wait()
        finally:
            server.stop(grace)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Give a function that waits for SIGTERM or SIGINT.

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
        while not set(reader.recv(64)) & set(_SIGNALS):
            pass
        waiting = False

    before = {number: signal.signal(number, note) for number in _SIGNALS}
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


def _find_server(target: str) -> shmrpc.Server:
    module_name, separator, name = target.partition(":")
    if not module_name or (separator and not name):
        raise Failure(f"{target!r}: expected MODULE or MODULE:SERVER, such as calc:server")
    module = _import(module_name)
    found = _attribute(module, name or _DEFAULT_NAME)
    label = f"{module_name}:{name or _DEFAULT_NAME}"
    if not isinstance(found, shmrpc.Server):
        found = _make(found, label)
    if not isinstance(found, shmrpc.Server):
        raise Failure(f"{label} is no shmrpc.Server, but of type {type(found).__name__}")
    return found


def _import(name: str) -> ModuleType:
    if name.endswith(".py") or "/" in name or not all(name.split(".")):
        msg = f"{name!r}: expected a module's name, such as 'calc' for calc.py, not a file's"
        raise Failure(msg)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise Failure(f"no module named {error.name!r} in {os.getcwd()} or sys.path") from error
        raise _user_failure(f"importing {name!r}", error) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _user_failure(f"importing {name!r}", error) from error


def _attribute(module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            servers = [key for key, item in vars(module).items() if isinstance(item, shmrpc.Server)]
            names = " or ".join(f"{module.__name__}:{key}" for key in servers)
            hint = f"; there is {names}" if servers else ""
            msg = f"module {module.__name__!r} has no {name!r}{hint}"
            raise Failure(msg) from None
    return value


def _make(factory: Any, label: str) -> Any:
    """Call a factory; anything that is none is returned as it is."""
    if not callable(factory):
        return factory
    with contextlib.suppress(ValueError):  # some built-in functions don't tell
        signature = inspect.signature(factory)
        try:
            signature.bind()
        except TypeError as error:
            msg = f"{label} is a function that needs arguments: {label}{signature}"
            raise Failure(msg) from error
    try:
        return factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _user_failure(f"calling {label}()", error) from error


def _user_failure(what: str, error: BaseException) -> Failure:
    """Say what the user's own code raised and where, on one line."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and os.path.dirname(frame.filename) != _HERE
    ]
    own = [frame for frame in frames if not frame.filename.startswith(_STANDARD_LIBRARY)]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return Failure(f"{what} failed: {type(error).__name__}: {error}{place}")


_HERE = os.path.dirname(__file__)
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
