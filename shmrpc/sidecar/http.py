"""Health and metrics over HTTP: ``/health`` as JSON, ``/metrics`` for Prometheus."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from shmrpc.errors import STATUS_NAMES, ConnectError

from .counts import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .service import Sidecar

__all__ = ["HttpServer"]

_READ_SECONDS = 5.0  # for a client that connects and says nothing


class HttpServer:
    """Serves in a thread of its own."""

    def __init__(self, sidecar: Sidecar, host: str, port: int) -> None:
        """``ConnectError`` if the port is in use."""
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            msg = f"can't serve health and metrics at {host}:{port}: {error.strerror or error}"
            raise ConnectError(msg) from error
        self._server.sidecar = sidecar
        self._server.exposition = _exposition(sidecar)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="shmrpc-sidecar-http", daemon=True
        )

    @property
    def address(self) -> str:
        """HOST:PORT."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Serve no more."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    sidecar: Sidecar
    exposition: Callable[[], tuple[str, bytes]] | None


class _Handler(BaseHTTPRequestHandler):
    timeout = _READ_SECONDS
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            status = self.server.sidecar.status()
            body = json.dumps(status, indent=1).encode() + b"\n"
            self._answer(200 if status["status"] == "ok" else 503, "application/json", body)
        elif path == "/metrics" and self.server.exposition is not None:
            kind, body = self.server.exposition()
            self._answer(200, kind, body)
        elif path == "/metrics":
            text = b"metrics need prometheus_client: pip install 'shmrpc[prometheus]'\n"
            self._answer(501, "text/plain", text)
        else:
            self._answer(404, "text/plain", b"there are /health and /metrics\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: probes come every few seconds."""


def _exposition(sidecar: Sidecar) -> Callable[[], tuple[str, bytes]] | None:
    """What makes the page, if prometheus_client is there."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    except ImportError:
        return None
    registry = CollectorRegistry()
    registry.register(_Collector(sidecar))
    return lambda: (CONTENT_TYPE_LATEST, generate_latest(registry))


class _Collector:
    """The sidecar's counters, as prometheus_client wants them."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        sidecar = self._sidecar
        calls = CounterMetricFamily(
            "shmrpc_sidecar_calls",
            "Calls that were passed on or refused.",
            labels=["route", "code"],
        )
        seconds = HistogramMetricFamily(
            "shmrpc_sidecar_call_seconds", "How long calls took, here.", labels=["route"]
        )
        for prefix, cell in sidecar.counts.totals().items():
            for status, count in enumerate(cell.codes):
                if count:
                    calls.add_metric([prefix, STATUS_NAMES[status]], count)
            seconds.add_metric([prefix], _cumulative(cell.buckets), cell.nanoseconds / 1e9)
        yield calls
        yield seconds
        running = GaugeMetricFamily(
            "shmrpc_sidecar_calls_in_flight", "Calls under way.", labels=["route"]
        )
        for prefix, count in sidecar.in_flight().items():
            running.add_metric([prefix], count)
        yield running
        ejected = GaugeMetricFamily(
            "shmrpc_sidecar_endpoint_ejected",
            "Whether an endpoint is left out because it failed.",
            labels=["upstream", "endpoint"],
        )
        for upstream in sidecar.table.upstreams:
            for endpoint in upstream.endpoints:
                ejected.add_metric([upstream.name, endpoint.address], upstream.ejected(endpoint))
        yield ejected
        yield CounterMetricFamily(
            "shmrpc_sidecar_reloads", "Configurations taken over.", value=sidecar.reloads
        )


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    """Prometheus's buckets: from 1 us on, each bound twice the one before."""
    total = 0
    bounds: list[tuple[str, float]] = []
    for bits in range(BUCKETS - 1):
        total += buckets[bits]
        if bits >= 10:
            bounds.append((str((1 << bits) / 1e9), float(total)))
    return [*bounds, ("+Inf", float(sum(buckets)))]
