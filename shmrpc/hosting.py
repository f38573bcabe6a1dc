"""What servers of threads and of event loops have in common."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from .codec import MsgpackCodec
from .inspection import Inspection
from .link import check_waiting
from .proxy import public_methods

if TYPE_CHECKING:
    from .acceptor import Acceptor
    from .codec import Codec
    from .handshake import Terms
    from .poller import Connection, Wait
    from .registry import Registry

__all__ = ["Hosting"]


class Hosting:
    """A server's options, its methods and its addresses."""

    _kind: ClassVar[str]  # the class as its users know it

    def __init__(
        self,
        terms: list[Terms],
        registry: Registry,
        *,
        max_concurrency: int,
        show_tracebacks: bool | None,
        wait: Wait,
        spin_budget: float | None,
        codec: Codec | None,
    ) -> None:
        """ValueError for options that make no sense."""
        if not terms:
            msg = "Server() needs at least one address, such as Server('calc')"
            raise ValueError(msg)
        if max_concurrency < 1:
            msg = "max_concurrency must be at least 1"
            raise ValueError(msg)
        check_waiting(wait, spin_budget)
        self._terms = terms
        self.registry = registry
        self._max_concurrency = max_concurrency
        self._show_tracebacks = show_tracebacks
        self._wait: Wait = wait
        self._spin_budget = spin_budget
        self.codec: Codec = codec if codec is not None else MsgpackCodec()
        self._inspection = Inspection(registry)
        self._acceptor: Acceptor | None = None

    def add_service(self, service: object, prefix: str = "") -> None:
        """Offer every public method of an object, with ``prefix`` before its name."""
        names = public_methods(service)
        if not names:
            msg = f"{service!r} has no public methods"
            raise ValueError(msg)
        for name in names:
            self.registry.add(getattr(service, name), prefix + name)

    def allow_remote(self) -> None:
        """Let ``tcp`` addresses be other than loopback when it starts, as the parameter does."""
        self._terms = [replace(terms, allow_remote=True) for terms in self._terms]

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that the system chose. Empty when it does not."""
        return self._acceptor.addresses if self._acceptor is not None else []

    def shows_tracebacks(self, connection: Connection) -> bool:
        """Whether this peer sees tracebacks."""
        if self._show_tracebacks is not None:
            return self._show_tracebacks
        return connection.credentials.uid == os.geteuid()

    def __repr__(self) -> str:
        at = self.addresses or [str(terms.address) for terms in self._terms]
        state = "listening" if self.addresses else "not listening"
        return f"<{self._kind} {' '.join(at)} {state}>"
