"""Finding the server that a module defines."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, TypeGuard

import shmrpc

from .errors import Failure

if TYPE_CHECKING:
    from types import ModuleType

    from shmrpc import aio

    AnyServer = shmrpc.Server | aio.Server

__all__ = ["find_server"]

_DEFAULT_NAME = "server"


def find_server(target: str) -> AnyServer:
    """Import the module and return its server; ``Failure`` says what is wrong."""
    module_name, separator, name = target.partition(":")
    if not module_name or (separator and not name):
        raise Failure(f"{target!r}: expected MODULE or MODULE:SERVER, such as calc:server")
    module = _import(module_name)
    found = _attribute(module, name or _DEFAULT_NAME)
    label = f"{module_name}:{name or _DEFAULT_NAME}"
    if not _is_server(found):
        found = _make(found, label)
    if not _is_server(found):
        raise Failure(
            f"{label} is no shmrpc.Server or shmrpc.aio.Server, but of type {type(found).__name__}"
        )
    return found


def _is_server(found: Any) -> TypeGuard[AnyServer]:
    if isinstance(found, shmrpc.Server):
        return True
    # Whoever made one has imported its module, and asyncio: most have not.
    aio = sys.modules.get("shmrpc.aio")
    return aio is not None and isinstance(found, aio.Server)


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
            servers = [key for key, item in vars(module).items() if _is_server(item)]
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
