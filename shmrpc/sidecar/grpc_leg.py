"""An upstream that is reached by gRPC: TLS, DNS round-robin, HTTP/2 flow control are grpcio's."""

from __future__ import annotations

import collections
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc

from shmrpc.errors import Cancelled, ConnectError, ConnectionLost, DeadlineExceeded
from shmrpc.metadata import pack_reply_metadata

from .grpcs import (
    METHODS,
    RESULT,
    as_is,
    error_of,
    from_grpc,
    options,
    place_of,
    reply_of_error,
    request_metadata,
)
from .raw import Reply, Request, flat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmrpc.session import Body, Stream

    from .config import TlsConfig

__all__ = ["GrpcLeg", "read_tls"]

_QUEUED_MAX = 16  # messages that wait for grpcio to send them
_KEEPALIVE_TIMEOUT_MS = 10000
_WHY_SECONDS = 1.0


def read_file(path: str | None, what: str) -> bytes | None:
    """A certificate or key; ``ConnectError`` if it can't be read."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        msg = f"can't read the {what} {path}: {error.strerror}"
        raise ConnectError(msg) from error


def read_tls(tls: TlsConfig) -> tuple[bytes | None, bytes | None, bytes | None]:
    """What is in the CA's file, the key's and the certificate's.

    ``ConnectError`` if they are of no use: gRPC would only say later that something failed.
    """
    ca, key = read_file(tls.ca, "CA certificate"), read_file(tls.key, "key")
    certificate = read_file(tls.cert, "certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if tls.ca is not None:
        try:
            context.load_verify_locations(tls.ca)
        except ssl.SSLError as error:
            msg = f"can't use the CA certificate {tls.ca}: {_reason(error)}"
            raise ConnectError(msg) from error
    if tls.cert is not None:
        try:
            # Without a password: nobody is there to be asked for one.
            context.load_cert_chain(tls.cert, tls.key, password="")
        except ssl.SSLError as error:
            msg = f"can't use the certificate {tls.cert} with the key {tls.key}: {_reason(error)}"
            raise ConnectError(msg) from error
    return ca, key, certificate


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL says, in words."""
    if error.reason in {None, "NO_START_LINE", "NO_CERTIFICATE_OR_CRL_FOUND"}:
        return "not what a PEM file has to hold"
    return error.reason.replace("_", " ").lower()


class GrpcLeg:
    """One address, behind which DNS may have many hosts. It connects when the first call comes."""

    native = False
    connected = None

    def __init__(
        self,
        address: str,
        connect_timeout: float,
        max_message_bytes: int,
        tls: TlsConfig,
        keepalive: float | None,
    ) -> None:
        """``ConnectError`` if a certificate can't be read."""
        self.address = address
        self._timeout = connect_timeout
        place, secure = place_of(address)
        settings = [
            *options(max_message_bytes),
            ("grpc.lb_policy_name", "round_robin"),
            # Whoever answers for the name could make us repeat calls.
            ("grpc.service_config_disable_resolution", 1),
        ]
        if keepalive is not None:
            settings += [
                ("grpc.keepalive_time_ms", int(keepalive * 1000)),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        if not secure:
            self._channel = grpc.insecure_channel(place, settings)
        else:
            if tls.server_name is not None:
                settings.append(("grpc.ssl_target_name_override", tls.server_name))
            credentials = grpc.ssl_channel_credentials(*read_tls(tls))
            self._channel = grpc.secure_channel(place, credentials, settings)
        channel = self._channel
        self._unary = channel.unary_unary(METHODS["Unary"], as_is, as_is)
        self._notify = channel.unary_unary(METHODS["Notify"], as_is, as_is)
        self._stream = channel.stream_stream(METHODS["Stream"], as_is, as_is)
        self._state = grpc.ChannelConnectivity.IDLE
        self._changed = threading.Condition()
        self._watching = False

    # ---- connecting ----

    def _note_state(self, state: Any) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _connect(self, timeout: float | None) -> None:
        """Make sure that there is a connection: what fails here was never sent."""
        ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
        if self._state is ready:
            return
        limit = self._timeout if timeout is None else min(timeout, self._timeout)
        with self._changed:
            if not self._watching:
                self._watching = True
                self._channel.subscribe(self._note_state, try_to_connect=True)
            self._changed.wait_for(lambda: self._state in {ready, failed}, limit)
        if self._state is not ready:
            self._explain(limit)

    def _explain(self, limit: float) -> None:
        """Find out why there is no connection; raises ``ConnectError``, or there is one now."""
        ask = self._channel.unary_unary("/grpc.health.v1.Health/Check", as_is, as_is)
        try:
            ask(b"", timeout=min(limit, _WHY_SECONDS))
        except grpc.RpcError as error:
            if error.code() in {
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.CANCELLED,
            }:
                msg = f"can't connect to {self.address}: {error.details()}"
                raise ConnectError(msg) from None

    # ---- calls ----

    def begin(self, request: Request, timeout: float | None) -> _Pending:
        """Start a unary call; raises ``ConnectError``."""
        until = None if timeout is None else time.monotonic() + timeout
        self._connect(timeout)
        left = None if until is None else max(0.0, until - time.monotonic())
        entries = request_metadata(request.method, request.metadata, keywords=request.keywords)
        future = self._unary.future(flat(request.body), timeout=left, metadata=entries)
        return _Pending(self, request.method, future)

    def notify(self, request: Request, timeout: float | None) -> None:
        """Pass a notification on, and wait until the other side has taken it."""
        self._connect(timeout)
        entries = request_metadata(request.method, request.metadata, keywords=request.keywords)
        try:
            self._notify(flat(request.body), timeout=timeout, metadata=entries)
        except grpc.RpcError as error:
            raise self.lost(error, request.method) from None

    def open(self, request: Request, timeout: float | None, *, ended: bool) -> GrpcCall:
        """Start a stream."""
        until = None if timeout is None else time.monotonic() + timeout
        self._connect(timeout)
        left = None if until is None else max(0.0, until - time.monotonic())
        entries = request_metadata(request.method, request.metadata, keywords=request.keywords)
        outgoing = _Outgoing(flat(request.body))
        if ended:
            outgoing.end()
        rpc = self._stream(iter(outgoing), timeout=left, metadata=entries)
        return GrpcCall(self, request.method, rpc, outgoing)

    def lost(self, rpc: Any, method: str) -> Exception:
        """The error for a call that no handler has ended."""
        code, text = rpc.code(), rpc.details()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{method!r} on {self.address} took longer than its timeout")
        if code is grpc.StatusCode.CANCELLED:
            return Cancelled(f"{method!r} on {self.address} was cancelled")
        # It may have been sent before the connection was lost: nobody can tell.
        return ConnectionLost(f"lost {self.address} during {method!r}: {text}", "unknown")

    def reply(self, rpc: Any, method: str, body: bytes) -> Reply:
        """The reply of a finished call; raises what is no answer."""
        trailing = rpc.trailing_metadata()
        status: int = rpc.code().value[0]
        initial = from_grpc(rpc.initial_metadata())
        metadata = _packed(from_grpc(trailing), initial)
        if status == 0:
            return Reply(0, metadata, body)
        known = error_of(trailing)
        if known is not None:
            return Reply(status, metadata, known)
        transport = {
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
        }
        if rpc.code() in transport:
            raise self.lost(rpc, method)
        answer = reply_of_error(status, rpc.details() or "")
        return Reply(status, metadata, answer.body)

    def close(self) -> None:
        """Hang up. Calls under way end with an error."""
        self._channel.close()

    def __repr__(self) -> str:
        return f"<GrpcLeg {self.address}>"


def _packed(trailing: dict[str, str | bytes], initial: dict[str, str | bytes]) -> bytes:
    return pack_reply_metadata(trailing, initial) if trailing or initial else b""


class _Pending:
    """A unary call under way."""

    def __init__(self, leg: GrpcLeg, method: str, future: Any) -> None:
        self._leg = leg
        self._method = method
        self._future = future
        self._ended = threading.Event()
        future.add_done_callback(lambda _: self._ended.set())

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        return self._ended.wait(seconds)

    def cancel(self) -> None:
        """Give it up; the other side is told."""
        self._future.cancel()

    def result(self) -> Reply:
        """Wait for the reply; raises what is none."""
        self._ended.wait()
        body = b""
        if self._future.code() is grpc.StatusCode.OK:
            body = self._future.result()
        return self._leg.reply(self._future, self._method, body)


class _Outgoing:
    """What a stream's caller sends, as grpcio fetches it: when HTTP/2 has room for it."""

    def __init__(self, first: bytes) -> None:
        self._messages = collections.deque([first])
        self._changed = threading.Condition()
        self._ended = False
        self._dropped = False

    def put(self, message: bytes) -> bool:
        """Waits for room; False if nobody fetches any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._dropped or len(self._messages) < _QUEUED_MAX)
            if self._dropped or self._ended:
                return False
            self._messages.append(message)
            self._changed.notify_all()
            return True

    def end(self, *, drop: bool = False) -> None:
        """Nothing more comes; with ``drop`` not even what is here."""
        with self._changed:
            self._ended = True
            self._dropped = self._dropped or drop
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self._ended or self._dropped)
                if self._dropped or not self._messages:
                    return
                message = self._messages.popleft()
                self._changed.notify_all()
            yield message


class GrpcCall:
    """A stream under way; with the faces of ``RawCall``."""

    def __init__(self, leg: GrpcLeg, method: str, rpc: Any, outgoing: _Outgoing) -> None:
        self.method = method
        self.initial: bytes | None = None
        self._leg = leg
        self._rpc = rpc
        self._outgoing = outgoing
        self._began = False
        self._result = b""
        self._failed: BaseException | None = None
        rpc.add_callback(lambda: outgoing.end(drop=True))

    def send(self, item: Body) -> None:
        """Pass on one message of the caller."""
        if not self._outgoing.put(flat(item)):
            msg = f"the call of {self.method!r} is over, its handler takes no more messages"
            raise Cancelled(msg)

    def close_send(self) -> None:
        """No more come."""
        self._outgoing.end()

    def woken(self, caller: Stream) -> None:
        """See ``RawCall``: nothing but the end of the call ends a wait for its messages."""
        if caller.cancelled:
            self._rpc.cancel()

    def take(self, _caller: Stream | None = None) -> list[bytes] | None:
        """See ``RawCall.take``."""
        if not self._began:
            self._began = True
            initial = from_grpc(self._rpc.initial_metadata())
            if initial:
                import msgpack

                self.initial = msgpack.packb(initial)
                return []
        try:
            message = next(self._rpc)
        except (StopIteration, grpc.RpcError):
            return None
        if message[:1] == RESULT:
            self._result = message[1:]
            return self.take()
        return [message[1:]]

    def reply(self) -> Reply:
        """See ``RawCall.reply``."""
        if self._failed is not None:
            raise self._failed
        reply = self._leg.reply(self._rpc, self.method, self._result)
        if self.initial is None or not reply.metadata:
            return reply
        trailing = from_grpc(self._rpc.trailing_metadata())
        return Reply(reply.status, _packed(trailing, {}), reply.body)

    def fail(self, error: BaseException) -> None:
        """See ``RawCall.fail``."""
        if self._rpc.is_active():
            self._failed = error
            self._rpc.cancel()

    def cancel(self) -> bool:
        """Give it up; the other side is told."""
        self._outgoing.end(drop=True)
        cancelled: bool = self._rpc.cancel()
        return cancelled

    def close(self) -> None:
        """Cancel it unless it is over."""
        self.cancel()
