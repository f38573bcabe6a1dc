"""Routes: which upstream a method belongs to, and what is done about calls that go there."""

from __future__ import annotations

import bisect
import itertools
import random
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from shmrpc.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    MethodNotFound,
    Overloaded,
    RemoteError,
)

from .policies import Breaker, Concurrency, Rate
from .raw import Request, seconds_left
from .upstream import Upstream, is_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config import RouteConfig
    from .upstream import Endpoint

__all__ = ["Route", "Table"]

T = TypeVar("T")

_RESERVED = b"shmrpc."  # byte streams, and what servers tell of themselves
_NAMES_MAX = 4096
_PAUSE_FIRST, _PAUSE_MAX = 0.01, 1.0
_DESCRIBE_SECONDS = 5.0


class Route:
    """The methods that begin with a prefix."""

    def __init__(self, config: RouteConfig, upstreams: Sequence[Upstream]) -> None:
        """``upstreams`` are those of ``config.weights``, in that order."""
        self.config = config
        self.prefix = config.prefix
        self.timeout = config.timeout
        self.timeout_ns = -1 if config.timeout is None else int(config.timeout * 1e9)
        self.upstreams = upstreams
        self._shares = list(itertools.accumulate(config.weights.values()))
        self._uids = config.allow_uids
        self._concurrency = None
        if config.max_concurrency is not None:
            self._concurrency = Concurrency(config.max_concurrency)
        self._rate = None if config.rate is None else Rate(config.rate, config.burst)
        self.breaker = None
        if config.break_after is not None:
            self.breaker = Breaker(config.break_after, config.break_seconds)
        # Where a call goes about which there is nothing to decide.
        self.direct: Any = None
        only = upstreams[0].endpoints if len(upstreams) == 1 else []
        policies = (self._concurrency, self._rate, self.breaker)
        if len(only) == 1 and not config.retries and self._uids is None and policies == (None,) * 3:
            self.direct = only[0].leg

    def carry(
        self,
        method: str,
        attempt: Callable[[Any, float | None], T],
        *,
        uid: int = -1,
        deadline: float | None = None,
        repeatable: bool = True,
    ) -> tuple[T, Callable[[BaseException | None], None]]:
        """Make a call by ``attempt(leg, timeout)`` and return what that does, within the policies.

        Also returns what is to be called when the call is over, with its error or None. With
        ``repeatable`` an attempt that may have run is repeated if the method is idempotent.
        Raises what the last attempt has, ``Overloaded``, or ``RemoteError`` for who may not call.
        """
        self._admit(method, uid)
        try:
            if self.timeout is not None:
                own = time.monotonic() + self.timeout
                deadline = own if deadline is None else min(own, deadline)
            result = self._attempts(method, attempt, deadline, repeatable)
        except BaseException as error:
            self._over(error)
            raise
        return result, self._over

    def _admit(self, method: str, uid: int) -> None:
        if self._uids is not None and uid not in self._uids:
            who = f"uid {uid}" if uid >= 0 else "who comes by the network"
            msg = f"{who} may not call {method!r}"
            raise RemoteError(msg, type="PermissionDenied", code="PERMISSION_DENIED")
        if self.breaker is not None and not self.breaker.allows():
            msg = f"{method!r} was not passed on: its upstream failed {self.breaker.failures} "
            msg += f"times in a row, and is left alone for {self.breaker.seconds:g} s"
            raise ConnectionLost(msg, "not_started")
        try:
            if self._rate is not None and not self._rate.take():
                msg = f"{method!r} was not passed on: more than {self._rate.rate:g} calls a second"
                raise Overloaded(msg)
            if self._concurrency is not None and not self._concurrency.enter():
                msg = f"{method!r} was not passed on: {self._concurrency.limit} calls run already"
                raise Overloaded(msg)
        except Overloaded:
            if self.breaker is not None:
                self.breaker.spared()
            raise

    def _over(self, error: BaseException | None) -> None:
        if self._concurrency is not None:
            self._concurrency.leave()
        if self.breaker is None:
            return
        if error is None or isinstance(error, RemoteError):
            self.breaker.succeeded()
        elif is_failure(error) or isinstance(error, DeadlineExceeded):
            self.breaker.failed()
        else:
            self.breaker.spared()

    def _pick(self) -> Upstream:
        if len(self.upstreams) == 1:
            return self.upstreams[0]
        share = random.randrange(self._shares[-1])  # noqa: S311 - load, not secrets
        return self.upstreams[bisect.bisect_right(self._shares, share)]

    def _attempts(
        self,
        method: str,
        attempt: Callable[[Any, float | None], T],
        deadline: float | None,
        repeatable: bool,
    ) -> T:
        upstream = self._pick()
        tried: list[Endpoint] = []
        unsure: Error | None = None  # the end of an attempt that may have run
        for left in range(self.config.retries, -1, -1):
            try:
                with upstream.borrow(tried) as endpoint:
                    tried.append(endpoint)
                    return attempt(endpoint.leg, seconds_left(deadline))
            except (ConnectError, ConnectionLost) as error:
                if isinstance(error, ConnectionLost) and error.outcome == "unknown":
                    unsure = error
                    if not left or not repeatable or not self._idempotent(method, upstream):
                        raise
                elif not left or not self._pause(upstream, tried, deadline):
                    raise unsure or error from None
        raise AssertionError  # the last one has returned or raised

    @staticmethod
    def _idempotent(method: str, upstream: Upstream) -> bool:
        """Ask whoever of the upstream answers."""
        request = Request("shmrpc.describe", msgpack.packb([method]))
        for endpoint in upstream.endpoints:
            try:
                reply = endpoint.leg.begin(request, _DESCRIBE_SECONDS).result()
                described = msgpack.unpackb(reply.body) if reply.status == 0 else None
            except (Error, ValueError, TypeError):
                continue
            return isinstance(described, dict) and described.get("idempotent") is True
        return False

    @staticmethod
    def _pause(upstream: Upstream, tried: list[Endpoint], deadline: float | None) -> bool:
        """Before an attempt where one was made already; False if there is no time for it."""
        rounds = len(tried) // len(upstream.endpoints)
        if len(tried) % len(upstream.endpoints):
            return deadline is None or time.monotonic() < deadline  # another one is there
        longest = min(_PAUSE_MAX, _PAUSE_FIRST * 2.0 ** min(rounds, 30))
        pause = random.uniform(0.0, longest)  # noqa: S311 - jitter
        if deadline is not None and time.monotonic() + pause >= deadline:
            return False
        time.sleep(pause)
        return True


class Table:
    """All routes, as of one reading of the configuration."""

    def __init__(self, routes: Sequence[Route], upstreams: Sequence[Upstream]) -> None:
        self.routes = sorted(routes, key=lambda route: len(route.prefix), reverse=True)
        self.upstreams = upstreams
        self._prefixes = [(route.prefix.encode(), route) for route in self.routes]
        self.known: dict[bytes, Route] = {}  # by method's name: callers may invent any number

    def find(self, method: bytes) -> Route:
        """The route with the longest prefix; ``MethodNotFound`` if there is none."""
        route = self.known.get(method)
        if route is not None:
            return route
        if method.startswith(_RESERVED):
            msg = (
                f"{method.decode('utf-8', 'replace')!r} is between neighbours: a sidecar passes on"
            )
            raise MethodNotFound(f"{msg} calls only")
        for prefix, candidate in self._prefixes:
            if method.startswith(prefix):
                if len(self.known) >= _NAMES_MAX:
                    self.known.clear()
                self.known[method] = candidate
                return candidate
        msg = f"no route for {method.decode('utf-8', 'replace')!r}: no prefix of the sidecar's fits"
        raise MethodNotFound(msg)
