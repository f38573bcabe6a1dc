"""Objects whose methods are remote calls, typed after a class or Protocol."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Proxy", "make_proxy", "public_methods"]


def public_methods(interface: object) -> list[str]:
    """Names of the methods that a class or object offers: callable, without an underscore."""
    names = [name for name in dir(interface) if not name.startswith("_")]
    kinds = (functools.partialmethod, functools.partial)
    return [
        name
        for name in names
        if inspect.isroutine(value := inspect.getattr_static(interface, name))
        or isinstance(value, kinds)
    ]


class Proxy:
    """Attributes are remote methods."""

    def __init__(
        self, call: Callable[..., Any], names: frozenset[str] | None, prefix: str, label: str
    ) -> None:
        self._call = call
        self._names = names
        self._prefix = prefix
        self._label = label

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or (self._names is not None and name not in self._names):
            msg = f"{self._label} has no method {name!r}"
            raise AttributeError(msg)
        method = functools.partial(self._call, self._prefix + name)
        self.__dict__[name] = method
        return method

    def __dir__(self) -> list[str]:
        return sorted(self._names or ())

    def __repr__(self) -> str:
        return f"<shmrpc proxy of {self._label}>"


def make_proxy(call: Callable[..., Any], interface: type[Any] | None, prefix: str) -> Proxy:
    """See ``Client.proxy``."""
    if interface is None:
        return Proxy(call, None, prefix, prefix or "any method")
    if not inspect.isclass(interface):
        msg = f"proxy() takes a class or Protocol, not {interface!r}"
        raise TypeError(msg)
    return Proxy(call, frozenset(public_methods(interface)), prefix, interface.__qualname__)
