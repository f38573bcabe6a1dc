"""The methods that one side offers: functions by name, and what kind of call each of them is."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from .poller import Poller

    Around = Callable[["Method", Callable[..., Any]], Callable[..., Any]]

__all__ = ["OTHER", "Method", "Registry", "make_name"]

OTHER = -1  # the number of every method that is not registered


def make_name(method: str) -> Any:
    """A method's name as the core wants it; ``ValueError`` if it is empty or too long."""
    try:
        text = method.encode()
    except UnicodeEncodeError:
        text = b""
    if not 0 < len(text) <= lib.SHMRPC_METHOD_MAX:
        msg = f"method name {method!r}: 1 to {lib.SHMRPC_METHOD_MAX} bytes of UTF-8 are allowed"
        raise ValueError(msg) from None  # not from looking it up in vain
    return ffi.new("shmrpc_name *", {"bytes": len(text), "text": text})


class Method(NamedTuple):
    """One method as it was registered."""

    name: str
    function: Callable[..., Any]
    requests: bool  # its first parameter iterates over the caller's messages
    generator: bool  # it streams its results
    idempotent: bool
    is_async: bool = False  # a coroutine function or an asynchronous generator function
    inline: bool = False  # a plain function that an event loop may call itself
    direct: bool = False  # an event loop may call it itself, and it has one result

    @property
    def streams(self) -> bool:
        """Whether it has to be called by ``stream`` or ``open``."""
        return self.requests or self.generator


def _unwrapped(function: Any, test: Callable[[Any], bool]) -> bool:
    """Ask of a function what inspect can tell: also for objects that are called, and partials."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return test(function) or test(getattr(type(function), "__call__", None))  # noqa: B004


class Registry:
    """Methods by number (the core's) and by name. Safe to use from any thread."""

    def __init__(
        self,
        wrap: Callable[[Method], Callable[..., Any]] | None = None,
        *,
        takes_async: bool = False,
    ) -> None:
        """``wrap`` makes the function that is called in a method's place."""
        self._takes_async = takes_async
        # Whether requests for methods that are not here are admitted, under the number OTHER.
        self.admits_others = False
        self._lock = threading.Lock()
        self._wrap = wrap
        self.functions: list[Callable[..., Any]] = []  # what is called, by number
        self.methods: list[Method] = []
        self._added: list[tuple[Method, Callable[..., Any]]] = []  # the same, without `around`
        self._around: Around | None = None
        self._indexes: dict[str, int] = {}
        self._poller: Poller | None = None

    def __len__(self) -> int:
        return len(self._indexes)

    def find(self, name: str) -> Method | None:
        """The method of this name, or None."""
        index = self._indexes.get(name)
        return self.methods[index] if index is not None else None

    def number(self, name: str) -> int | None:
        """The number of this name, or None."""
        return self._indexes.get(name)

    def add(
        self,
        function: Any,
        name: str | None,
        *,
        requests: bool = False,
        idempotent: bool = False,
        inline: bool = False,
    ) -> None:
        """Offer a function; a name that is taken means the new one from now on."""
        if not callable(function):
            msg = f"a method must be callable, not {function!r}"
            raise TypeError(msg)
        name = function.__name__ if name is None else name
        streams_async = _unwrapped(function, inspect.isasyncgenfunction)
        is_async = streams_async or _unwrapped(function, inspect.iscoroutinefunction)
        if is_async and not self._takes_async:
            msg = f"method {name!r} is async; a synchronous Server or Client can't run it"
            raise TypeError(msg)
        make_name(name)
        generator = streams_async or _unwrapped(function, inspect.isgeneratorfunction)
        direct = (is_async or inline) and not requests and not generator
        method = Method(name, function, requests, generator, idempotent, is_async, inline, direct)
        with self._lock:
            index = len(self.methods)
            called = self._wrap(method) if self._wrap is not None else function
            self._added.append((method, called))
            self.methods.append(method)
            self.functions.append(called)
            self._set(index)
            self._indexes[name] = index
            if self._poller is not None:
                self._add_to_core(self._poller, name, index)

    def surround(self, around: Around | None) -> None:
        """Call ``around(method, function)`` in each function's place; None calls it itself again.

        From the next call on; workers go on using the same lists. What begins with ``shmrpc.`` is
        left alone.
        """
        with self._lock:
            self._around = around
            for index in range(len(self._added)):
                self._set(index)

    def _set(self, index: int) -> None:
        """With the lock held: what is called for this number."""
        method, called = self._added[index]
        around = None if method.name.startswith("shmrpc.") else self._around
        if self._takes_async:  # which calls what is in the method
            function = method.function if around is None else around(method, method.function)
            self.methods[index] = method._replace(function=function)
        else:
            self.functions[index] = called if around is None else around(method, called)

    def names(self) -> dict[str, int]:
        """The number of each name."""
        with self._lock:
            return dict(self._indexes)

    def bind(self, poller: Poller | None) -> None:
        """Offer the methods on this poller, those that are added later, too."""
        with self._lock:
            self._poller = poller
            if poller is not None:
                if self.admits_others:
                    poller.add_method(b"", OTHER, fast=True)
                for name, index in self._indexes.items():
                    self._add_to_core(poller, name, index)

    def _add_to_core(self, poller: Poller, name: str, index: int) -> None:
        poller.add_method(name.encode(), index, fast=not self.methods[index].streams)
