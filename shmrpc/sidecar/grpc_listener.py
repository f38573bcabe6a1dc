"""Where calls come in by gRPC, and are passed on like any others."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import grpc
import msgpack

from shmrpc.errors import Cancelled, ConnectError, Error, RemoteError
from shmrpc.metadata import unpack_metadata, unpack_reply_metadata

from .grpc_leg import read_tls
from .grpcs import ITEM, RESULT, SERVICE, as_is, from_grpc, options, place_of, to_grpc, trailers_of
from .raw import Reply, Request, failure_reply, flat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import Config
    from .counts import Cell
    from .routes import Route, Table
    from .service import Sidecar

__all__ = ["GrpcListener"]

_WORKERS = 256
_DESCRIBE = "shmrpc.describe"  # what clients ask before they repeat a call


class _Passage:
    """One call on its way: keeps the table of routes that it uses in being."""

    def __init__(self, listener: GrpcListener, context: Any) -> None:
        self._listener = listener
        self._sidecar = listener.sidecar
        self.context = context
        self.table: Table | None = None
        self.route: Route | None = None
        self._start = perf_counter_ns()

    def __enter__(self) -> _Passage:
        self._sidecar.workers.add(self)
        while self.table is not self._sidecar.table:
            self.table = self._sidecar.table
        return self

    def __exit__(self, *_: object) -> None:
        self.table = None
        self._sidecar.workers.discard(self)

    def request(self, body: bytes) -> Request:
        """The request, and its route; raises ``Error`` for what is none."""
        entries = dict(self.context.invocation_metadata())
        name = entries.get("shmrpc-method-bin") or entries.get("shmrpc-method", "")
        method = name.encode() if isinstance(name, str) else name
        if not 0 < len(method) <= 255:
            msg = "the metadata has no shmrpc-method of 1 to 255 bytes"
            raise RemoteError(msg, type="ValueError", code="INVALID_ARGUMENT")
        assert self.table is not None  # noqa: S101 - we have entered
        if method != _DESCRIBE.encode():
            self.route = self.table.find(method)
        metadata = from_grpc(entries.items())
        left = self.context.time_remaining()
        return Request(
            method.decode("utf-8", "replace"),
            body,
            msgpack.packb(metadata) if metadata else b"",
            entries.get("shmrpc-keywords") == "1",
            None if left is None else time.monotonic() + left,
        )

    def count(self, status: int) -> None:
        """It has ended."""
        prefix = self.route.prefix if self.route is not None else "-"
        self._listener.cell(prefix).count(status, perf_counter_ns() - self._start)

    def end(self, reply: Reply, method: str, *, initial_sent: bool = False) -> None:
        """Tell gRPC how it has ended. The body of a good reply is the caller's to send."""
        trailing, initial = unpack_reply_metadata(reply.metadata)
        if initial and not initial_sent:
            self.context.send_initial_metadata(to_grpc(initial))
        entries = to_grpc(trailing)
        if reply.status != 0:
            code, text, error = trailers_of(reply, method)
            self.context.set_code(code)
            self.context.set_details(text)
            entries.append(("shmrpc-error-bin", error))
        self.context.set_trailing_metadata(entries)
        self.count(reply.status)


def _why_not(place: str) -> str | None:
    """Why nobody can listen there, which gRPC says on stderr only; None if somebody could."""
    host, _, port = place.rpartition(":")
    try:
        for family, kind, _, _, where in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        return str(error.strerror).lower()
    return None


class GrpcListener:
    """A gRPC server with the generic methods; with the faces of ``RelayServer``."""

    def __init__(self, sidecar: Sidecar, address: str, config: Config) -> None:
        """``ConnectError`` if it can't listen, or a certificate can't be read."""
        self.sidecar = sidecar
        place, secure = place_of(address)
        self._cells = threading.local()
        self._executor = ThreadPoolExecutor(_WORKERS, "shmrpc-sidecar-grpc")
        settings = [*options(config.max_message_bytes), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(self._executor, options=settings)
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary, as_is, as_is),
            "Notify": grpc.unary_unary_rpc_method_handler(self._notify, as_is, as_is),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream, as_is, as_is),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            port = self._bind(place, secure, config)
        except (RuntimeError, ValueError) as error:
            msg = f"can't listen at {address}: {_why_not(place) or error}"
            raise ConnectError(msg) from error
        self.addresses = [f"{address.rpartition(':')[0]}:{port}"]

    def _bind(self, place: str, secure: bool, config: Config) -> int:
        port: int
        if not secure:
            port = self._server.add_insecure_port(place)
        else:
            ca, key, certificate = read_tls(config.tls)
            credentials = grpc.ssl_server_credentials(
                [(key, certificate)], ca, require_client_auth=ca is not None
            )
            port = self._server.add_secure_port(place, credentials)
        if port == 0:
            raise RuntimeError("the port is in use, or the host is not this one")
        return port

    def start(self) -> None:
        """Serve from now on."""
        self._server.start()

    def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, let those under way end, hang up."""
        self._server.stop(grace).wait()
        self._executor.shutdown()

    def cell(self, prefix: str) -> Cell:
        """Where this thread counts."""
        cells: dict[str, Cell] = self._cells.__dict__
        cell = cells.get(prefix)
        if cell is None:
            cell = cells[prefix] = self.sidecar.counts.cell(prefix)
        return cell

    # ---- calls ----

    def _unary(self, body: bytes, context: Any) -> bytes:
        with _Passage(self, context) as passage:
            request = Request("", body)
            try:
                request = passage.request(body)
                if request.method == _DESCRIBE:
                    (name,) = msgpack.unpackb(body)
                    reply = Reply(body=msgpack.packb(self.sidecar.describe(name)))
                else:
                    reply = _carry(passage, request)
                    reply.body = flat(reply.body)
            except Exception as error:
                reply = failure_reply(error)
            passage.end(reply, request.method)
            return flat(reply.body) if reply.status == 0 else b""

    def _notify(self, body: bytes, context: Any) -> bytes:
        with _Passage(self, context) as passage:
            request = Request("", body)
            try:
                request = passage.request(body)
                assert passage.route is not None  # noqa: S101
                _, over = passage.route.carry(
                    request.method,
                    lambda leg, timeout: leg.notify(request, timeout),
                    deadline=request.deadline,
                    repeatable=False,
                )
                over(None)
                reply = Reply()
            except Exception as error:
                reply = failure_reply(error)
            passage.end(reply, request.method)
            return b""

    def _stream(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with _Passage(self, context) as passage:
            request, told = Request("", b""), False
            call: Any = None
            try:
                request = passage.request(next(messages, b""))
                assert passage.route is not None  # noqa: S101
                call, over = passage.route.carry(
                    request.method,
                    lambda leg, timeout: leg.open(request, timeout, ended=False),
                    deadline=request.deadline,
                    repeatable=False,
                )
                try:
                    up = threading.Thread(
                        target=_send_up,
                        args=(messages, call),
                        name="shmrpc-sidecar-up",
                        daemon=True,
                    )
                    up.start()
                    if not context.add_callback(call.cancel):
                        call.cancel()
                    while (items := call.take()) is not None:
                        if not told and call.initial is not None:
                            context.send_initial_metadata(to_grpc(unpack_metadata(call.initial)))
                            told = True
                        for item in items:
                            yield ITEM + flat(item)
                    reply = call.reply()
                except BaseException as error:
                    over(error)
                    raise
                over(None)
                reply.body = flat(reply.body)
            except Exception as error:
                reply = failure_reply(error)
            finally:
                if call is not None:
                    call.close()
            if reply.status == 0 and reply.body:
                yield RESULT + flat(reply.body)
            passage.end(reply, request.method, initial_sent=told)


def _carry(passage: _Passage, request: Request) -> Reply:
    """A unary call within its route's policies; it is cancelled with the RPC."""
    assert passage.route is not None  # noqa: S101

    def attempt(leg: Any, timeout: float | None) -> Reply:
        pending = leg.begin(request, timeout)
        if not passage.context.add_callback(pending.cancel):
            pending.cancel()
        try:
            reply: Reply = pending.result()
        except Error:
            raise
        except Exception as error:  # concurrent.futures.CancelledError, or grpcio's
            msg = f"the caller of {request.method!r} does not wait any more"
            raise Cancelled(msg) from error
        return reply

    reply, over = passage.route.carry(request.method, attempt, deadline=request.deadline)
    over(None)
    return reply


def _send_up(messages: Iterator[bytes], call: Any) -> None:
    """Pass on what the caller sends; in a thread of its own."""
    try:
        for message in messages:
            call.send(message)
        call.close_send()
    except Exception as error:  # of grpcio, when the RPC is over: it has no type of its own
        if isinstance(error, Error) and not isinstance(error, Cancelled):
            call.fail(error)
        else:
            call.cancel()
