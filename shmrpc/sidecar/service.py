"""The sidecar itself: its listeners, its table of routes, reloading and draining.

The table is replaced as a whole. A worker notes which table it uses before it looks into it, so
upstreams of the old one are closed when the last call that uses it has ended: no call is dropped.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import msgpack

from .config import ConfigError, is_grpc
from .counts import Counts
from .endpoint import NativeEndpoint
from .raw import Reply, Request, flat
from .relay import RelayServer
from .routes import Route, Table
from .upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Config, UpstreamConfig
    from .http import HttpServer

__all__ = ["Sidecar"]

_log = logging.getLogger("shmrpc.sidecar")

_QUIET_PAUSE = 0.01


def _grpc(module: str, address: str) -> Any:
    """A module that needs grpcio."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        msg = f"{address}: gRPC needs grpcio ({error}): pip install 'shmrpc[grpc]'"
        raise ConfigError(msg) from error


class Sidecar:
    """Accepts calls at some addresses and passes them on to others.

    ``start``, ``reload`` and ``stop`` belong to one thread; ``status`` is for any.
    """

    def __init__(self, config: Config) -> None:
        """Nothing is opened before ``start``."""
        self.config = config
        self.counts = Counts()
        self.workers: set[Any] = set()  # who uses a table: has ``table`` and ``route``
        self.reloads = 0
        self.draining = False
        self.legs: dict[tuple[Any, ...], Any] = {}
        self.servers: dict[str, Any] = {}
        self._http: HttpServer | None = None
        self._retiring: list[threading.Thread] = []
        self.table = self._make_table(config)

    # ---- the table ----

    def _make_table(self, config: Config) -> Table:
        upstreams = {name: self._upstream(one, config) for name, one in config.upstreams.items()}
        routes = [
            Route(route, [upstreams[name] for name in route.weights]) for route in config.routes
        ]
        return Table(routes, list(upstreams.values()))

    def _upstream(self, config: UpstreamConfig, whole: Config) -> Upstream:
        legs = [self._leg(address, config, whole) for address in config.endpoints]
        return Upstream(
            config.name, legs, eject_after=config.eject_after, eject_seconds=config.eject_seconds
        )

    def _leg(self, address: str, config: UpstreamConfig, whole: Config) -> Any:
        """What passes calls on to this address: the one there is, if it would be the same."""
        limit = whole.max_message_bytes
        key = (address, config.connect_timeout, config.tls, config.keepalive, limit)
        leg = self.legs.get(key)
        if leg is None:
            leg = self.legs[key] = self._make_leg(address, config, limit)
        return leg

    def _make_leg(self, address: str, config: UpstreamConfig, limit: int) -> Any:
        if not is_grpc(address):
            return NativeEndpoint(address, config.connect_timeout, limit, self._renew_ways)
        GrpcLeg = _grpc("grpc_leg", address).GrpcLeg  # noqa: N806 - a class
        return GrpcLeg(address, config.connect_timeout, limit, config.tls, config.keepalive)

    def _renew_ways(self) -> None:
        """No call goes where the core has been told to pass it on to, before."""
        for server in self._relays():
            server.renew_ways()

    def _relays(self) -> list[RelayServer]:
        return [server for server in list(self.servers.values()) if isinstance(server, RelayServer)]

    # ---- running ----

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that the system chose."""
        # A copy: health is asked for by other threads than that which reloads.
        return [address for server in list(self.servers.values()) for address in server.addresses]

    @property
    def http_address(self) -> str | None:
        """Where health and metrics are, as HOST:PORT."""
        return self._http.address if self._http is not None else None

    def start(self) -> None:
        """Listen at all addresses, or at none: ``ConnectError``, also if a port is in use."""
        try:
            self._http = self._start_http(self.config)
            for address in self.config.listen:
                self.servers[address] = self._listen(address, self.config)
        except BaseException:
            self.stop(0.0)
            raise

    def _start_http(self, config: Config) -> HttpServer | None:
        if config.http is None:
            return None
        from .http import HttpServer

        server = HttpServer(self, *config.http)
        server.start()
        return server

    def _listen(self, address: str, config: Config) -> Any:
        server: Any
        if is_grpc(address):
            server = _grpc("grpc_listener", address).GrpcListener(self, address, config)
            server.start()
            return server
        server = RelayServer(
            self,
            address,
            allow_uids=config.allow_uids,
            allow_remote=config.allow_remote,
            max_message_bytes=config.max_message_bytes,
        )
        server.start()
        return server

    def reload(self, config: Config) -> None:
        """Go over to another configuration; raises, and changes nothing, if it can't be.

        Calls that are under way end as they began. Listeners that both have stay as they are.
        """
        before, old_legs = self.config, dict(self.legs)
        started: dict[str, Any] = {}
        try:
            table = self._make_table(config)
            for address in config.listen:
                if address not in self.servers:
                    started[address] = self._listen(address, config)
            http = self._http if config.http == before.http else self._start_http(config)
        except BaseException:
            for server in started.values():
                server.stop(0.0)
            for key in self.legs.keys() - old_legs.keys():
                self.legs.pop(key).close()
            raise
        self._warn_of_listeners(before, config)
        self.config = config
        replaced, self.table = self.table, table
        dropped = [self.servers.pop(a) for a in list(self.servers) if a not in config.listen]
        self.servers.update(started)
        self._renew_ways()
        if http is not self._http:
            old, self._http = self._http, http
            if old is not None:
                old.stop()
        used = {id(e.leg) for upstream in table.upstreams for e in upstream.endpoints}
        legs = [self.legs.pop(k) for k, leg in list(self.legs.items()) if id(leg) not in used]
        self.reloads += 1
        thread = threading.Thread(
            target=self._retire, args=(replaced, legs, dropped), name="shmrpc-sidecar-retire"
        )
        self._retiring = [one for one in self._retiring if one.is_alive()] + [thread]
        thread.start()

    @staticmethod
    def _warn_of_listeners(before: Config, config: Config) -> None:
        def shared(one: Config) -> Any:
            return one.allow_uids, one.allow_remote, one.max_message_bytes, one.tls

        if shared(before) != shared(config):
            _log.warning("listeners keep their allow_uids, sizes and tls until a restart")

    def _retire(self, table: Table, legs: list[Any], servers: list[Any]) -> None:
        """Close what is not used any more, when it is not."""
        for server in servers:
            server.stop()
        self.wait_unused(table, lambda: not self.draining)
        for leg in legs:
            leg.close()

    def wait_unused(self, table: Table, goes_on: Callable[[], bool]) -> None:
        """Wait until no call uses this table."""
        while goes_on() and (
            any(worker.table is table for worker in list(self.workers))
            or any(server.goes_old_ways for server in self._relays())
        ):
            time.sleep(_QUIET_PAUSE)

    def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, let those under way end within ``grace`` seconds, hang up."""
        self.draining = True
        threads = [
            threading.Thread(target=server.stop, args=(grace,), name="shmrpc-sidecar-stop")
            for server in self.servers.values()
        ]
        for thread in threads:
            thread.start()
        for thread in [*threads, *self._retiring]:
            thread.join()
        for leg in self.legs.values():
            leg.close()
        self.legs.clear()
        if self._http is not None:
            self._http.stop()
            self._http = None

    # ---- what it knows ----

    def describe(self, method: str) -> dict[str, Any] | None:
        """What the server of a method tells of it, such as whether it may run twice."""
        route = self.table.find(method.encode())
        request = Request("shmrpc.describe", msgpack.packb([method]))

        def attempt(leg: Any, timeout: float | None) -> Reply:
            reply: Reply = leg.begin(request, timeout).result()
            return reply

        reply, over = route.carry(method, attempt)
        over(None)
        described = msgpack.unpackb(flat(reply.body)) if reply.status == 0 and reply.body else None
        return described if isinstance(described, dict) else None

    def status(self) -> dict[str, Any]:
        """What /health says."""
        table = self.table
        return {
            "status": "draining" if self.draining else "ok",
            "listen": self.addresses,
            "reloads": self.reloads,
            "in_flight": self.in_flight(),
            "upstreams": {
                upstream.name: [
                    {
                        "address": endpoint.address,
                        "running": endpoint.running,
                        "failures": endpoint.failures,
                        "ejected": upstream.ejected(endpoint),
                    }
                    for endpoint in upstream.endpoints
                ]
                for upstream in table.upstreams
            },
            "open_breakers": [
                route.prefix
                for route in table.routes
                if route.breaker is not None and route.breaker.is_open
            ],
        }

    def in_flight(self) -> dict[str, int]:
        """Calls that are being passed on now, by route."""
        flights = dict.fromkeys((route.prefix for route in self.table.routes), 0)
        for worker in list(self.workers):
            route = worker.route
            if route is not None:
                flights[route.prefix] = flights.get(route.prefix, 0) + 1
        for prefix, total in self.counts.totals().items():
            if total.running:
                flights[prefix] = flights.get(prefix, 0) + total.running
        return flights
