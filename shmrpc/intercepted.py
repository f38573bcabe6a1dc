"""Where interceptors meet calls: around a channel's methods, and a server's handlers."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Literal

from .callinfo import client_info, send_initial, send_metadata, server_info, set_deadline
from .calls import Call
from .failures import call_checked
from .futures import CallFuture
from .interceptors import CallInfo, Interceptor, compose
from .metadata import unpack_reply_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .channel import Channel
    from .context import CallContext
    from .metadata import Metadata
    from .registry import Method

__all__ = ["Intercepted", "intercept_handlers"]


class Intercepted:
    """A channel's ``call``, ``notify``, ``submit``, ``stream`` and ``open`` with interceptors."""

    def __init__(
        self,
        channel: Channel,
        interceptors: Iterable[Interceptor],
        peer: Callable[[], str],
        is_idempotent: Callable[[str], bool],
    ) -> None:
        interceptors = list(interceptors)
        self._peer = peer
        self._is_idempotent = is_idempotent
        # Taken now: they are about to be replaced by ours.
        self._call_with, self._notify = channel._call_with, channel.notify
        self._submit, self._stream, self._open = channel.submit, channel.stream, channel.open
        self._call_chain = compose(interceptors, self._proceed_call)
        self._notify_chain = compose(interceptors, self._proceed_notify)
        self._submit_chain = compose(interceptors, self._proceed_submit)
        self._stream_chain = compose(interceptors, self._proceed_stream)
        self._open_chain = compose(interceptors, self._proceed_open)

    def methods(self) -> dict[str, Any]:
        """What takes the place of the channel's methods."""
        return {
            "call": self.call,
            "notify": self.notify,
            "submit": self.submit,
            "stream": self.stream,
            "open": self.open,
        }

    def _info(
        self,
        method: str,
        kind: Literal["unary", "submit", "notify", "stream"],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> CallInfo:
        def idempotent() -> Any:
            return self._is_idempotent(method)

        return client_info(method, kind, args, kwargs, timeout, metadata, self._peer(), idempotent)

    def call(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Channel.call``."""
        info = self._info(method, "unary", args, kwargs, timeout, metadata)
        try:
            result = self._call_chain(info)
        except BaseException as error:
            info.finish(error)
            raise
        info.finish()
        return result

    def _proceed_call(self, info: CallInfo) -> Any:
        packed: list[bytes] = []
        set_deadline(info)
        try:
            return self._call_with(
                info.method, info.args, info.kwargs, info.timeout, info.metadata or None, packed
            )
        finally:
            if packed:
                info.trailing_metadata, info.initial_metadata = unpack_reply_metadata(packed[0])

    def notify(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``Channel.notify``."""
        info = self._info(method, "notify", args, kwargs, timeout, metadata)
        try:
            self._notify_chain(info)
        except BaseException as error:
            info.finish(error)
            raise
        info.finish()

    def _proceed_notify(self, info: CallInfo) -> None:
        set_deadline(info)
        metadata = info.metadata or None
        self._notify(
            info.method, *info.args, timeout=info.timeout, metadata=metadata, **info.kwargs
        )

    def submit(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Channel.submit``."""
        info = self._info(method, "submit", args, kwargs, timeout, metadata)
        future = self._begin(self._submit_chain, info)
        if isinstance(future, CallFuture):
            future.observe(info.finish)  # unlike a callback it needs no background reader
        elif hasattr(future, "add_done_callback"):
            future.add_done_callback(lambda done: info.finish(_error_of(done)))
        else:
            info.finish()
        return future

    def _proceed_submit(self, info: CallInfo) -> CallFuture:
        set_deadline(info)
        metadata = info.metadata or None
        future = self._submit(
            info.method, *info.args, timeout=info.timeout, metadata=metadata, **info.kwargs
        )

        def note(_error: BaseException | None) -> None:
            info.trailing_metadata, info.initial_metadata = future.reply_metadata()

        future.observe(note)
        return future

    def stream(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Channel.stream``."""
        info = self._info(method, "stream", args, kwargs, timeout, metadata)
        return self._watch(self._begin(self._stream_chain, info), info)

    def open(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``Channel.open``."""
        info = self._info(method, "stream", args, kwargs, timeout, metadata)
        return self._watch(self._begin(self._open_chain, info), info)

    def _proceed_stream(self, info: CallInfo) -> Call:
        return self._proceed_opening(self._stream, info)

    def _proceed_open(self, info: CallInfo) -> Call:
        return self._proceed_opening(self._open, info)

    def _proceed_opening(self, begin: Callable[..., Call], info: CallInfo) -> Call:
        set_deadline(info)
        metadata = info.metadata or None
        call = begin(
            info.method, *info.args, timeout=info.timeout, metadata=metadata, **info.kwargs
        )

        def note(_error: BaseException | None) -> None:
            info.trailing_metadata, info.initial_metadata = call.reply_metadata()

        call.observe(note)
        return call

    def _begin(self, chain: Callable[[CallInfo], Any], info: CallInfo) -> Any:
        try:
            return chain(info)
        except BaseException as error:
            info.finish(error)
            raise

    def _watch(self, call: Any, info: CallInfo) -> Any:
        if isinstance(call, Call):
            call.observe(info.finish)
        else:
            info.finish()  # an interceptor's own: there is no telling when it ends
        return call


def _error_of(future: Any) -> BaseException | None:
    if future.cancelled():
        return CancelledError()
    error: BaseException | None = future.exception()
    return error


def intercept_handlers(
    interceptors: Iterable[Interceptor],
) -> Callable[[Method], Callable[..., Any]]:
    """What makes the functions that are called in place of methods.

    TypeError for what is no interceptor.
    """
    interceptors = list(interceptors)
    compose(interceptors, lambda info: info)

    def wrap(method: Method) -> Callable[..., Any]:
        if not interceptors or method.name.startswith("shmrpc."):
            return method.function
        return _intercepted_handler(method, interceptors)

    return wrap


def _intercepted_handler(method: Method, interceptors: list[Interceptor]) -> Callable[..., Any]:
    def proceed(info: CallInfo) -> Any:
        return call_checked(method.function, info.args, info.kwargs)

    chain = compose(interceptors, proceed)

    def handle(*args: Any, **kwargs: Any) -> Any:
        info, context = server_info(method, args, kwargs)
        try:
            result = chain(info)
        except BaseException as error:
            send_metadata(info, context)
            info.finish(error)
            raise
        if method.generator:
            return _items(result, info, context)
        send_metadata(info, context)
        info.finish()
        return result

    return handle


def _items(result: Any, info: CallInfo, context: CallContext) -> Iterator[Any]:
    """What a streaming handler yields, and then the end of its call."""
    send_initial(context)
    try:
        yield from result
    except BaseException as error:
        send_metadata(info, context)
        info.finish(error)
        raise
    send_metadata(info, context)
    info.finish()
