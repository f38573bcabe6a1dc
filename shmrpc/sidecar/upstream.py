"""Upstreams: several endpoints of one service, of which each call goes to the one least busy.

An endpoint that fails again and again is left out for a while (outlier ejection), unless it is the
last one.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shmrpc.errors import ConnectError, ConnectionLost, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

__all__ = ["Endpoint", "Upstream", "is_failure"]

_EJECTIONS_MAX = 6  # doublings of the time for which an endpoint is left out


def is_failure(error: BaseException) -> bool:
    """Whether the endpoint is to blame: it is not there, or was lost."""
    return isinstance(error, (ConnectError, ConnectionLost, ProtocolError))


class Endpoint:
    """One address, with what is known of its health and load."""

    def __init__(self, leg: Any) -> None:
        self.leg = leg
        self.running = 0  # guarded by the upstream's lock
        self.failures = 0  # in a row
        self.ejections = 0  # in a row
        self.ejected_until = 0.0

    @property
    def address(self) -> str:
        """Where it is."""
        address: str = self.leg.address
        return address


class Upstream:
    """Endpoints that are as good as each other."""

    def __init__(
        self,
        name: str,
        legs: Sequence[Any],
        *,
        eject_after: int = 5,
        eject_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.endpoints = [Endpoint(leg) for leg in legs]
        self.eject_after = eject_after
        self.eject_seconds = eject_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0

    def _choose(self, tried: Collection[Endpoint]) -> Endpoint:
        """The least busy (our lock is held), of those that are well, and not tried yet if any."""
        now = self._clock()
        well = [endpoint for endpoint in self.endpoints if endpoint.ejected_until <= now]
        # With nobody well, all are tried: being wrong about one must not cost the last.
        candidates = well or self.endpoints
        candidates = [e for e in candidates if e not in tried] or candidates
        self._turn += 1  # takes turns among those that are equally busy
        shift = self._turn % len(candidates)
        return min(candidates[shift:] + candidates[:shift], key=lambda one: one.running)

    @contextmanager
    def borrow(self, tried: Collection[Endpoint] = ()) -> Iterator[Endpoint]:
        """An endpoint for one call, whose end says how the endpoint is."""
        with self._lock:
            endpoint = self._choose(tried)
            endpoint.running += 1
        try:
            yield endpoint
        except BaseException as error:
            if is_failure(error):
                self.note_failure(endpoint)
            raise
        else:
            self.note_success(endpoint)
        finally:
            with self._lock:
                endpoint.running -= 1

    @staticmethod
    def note_success(endpoint: Endpoint) -> None:
        """It has answered."""
        if endpoint.failures or endpoint.ejections:
            endpoint.failures = endpoint.ejections = 0
            endpoint.ejected_until = 0.0

    def note_failure(self, endpoint: Endpoint) -> None:
        """It has not, or is not there."""
        with self._lock:
            endpoint.failures += 1
            if endpoint.failures < self.eject_after or len(self.endpoints) == 1:
                return
            longer: int = 1 << min(endpoint.ejections, _EJECTIONS_MAX)
            endpoint.ejections += 1
            endpoint.failures = 0
            endpoint.ejected_until = self._clock() + self.eject_seconds * longer

    def ejected(self, endpoint: Endpoint) -> bool:
        """Whether it is left out now."""
        return endpoint.ejected_until > self._clock()
