"""Where asynchronous interceptors meet calls; as ``shmrpc.intercepted``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from shmrpc.callinfo import client_info, send_initial, send_metadata, server_info, set_deadline
from shmrpc.interceptors import AsyncInterceptor, CallInfo, compose_async
from shmrpc.metadata import unpack_reply_metadata

from .calls import Call
from .channel import STREAM, STREAM_ENDED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from shmrpc.context import CallContext
    from shmrpc.metadata import Metadata
    from shmrpc.registry import Method

    from .channel import Channel

__all__ = ["Intercepted", "intercept_handlers"]


class Intercepted:
    """A channel's ``call``, ``notify``, ``stream`` and ``open`` with interceptors."""

    def __init__(
        self,
        channel: Channel,
        interceptors: Iterable[AsyncInterceptor],
        peer: Callable[[], str],
        is_idempotent: Callable[[str], Awaitable[bool]],
    ) -> None:
        interceptors = list(interceptors)
        self._channel = channel
        self._peer = peer
        self._is_idempotent = is_idempotent
        # Taken now: they are about to be replaced by ours.
        self._call_with, self._notify = channel._call_with, channel.notify
        self._interceptors = interceptors
        self._call_chain = compose_async(interceptors, self._proceed_call)
        self._notify_chain = compose_async(interceptors, self._proceed_notify)

    def methods(self) -> dict[str, Any]:
        """What takes the place of the channel's methods."""
        return {
            "call": self.call,
            "notify": self.notify,
            "stream": self.stream,
            "open": self.open,
        }

    def _info(
        self,
        method: str,
        kind: Literal["unary", "notify", "stream"],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        metadata: Metadata | None,
    ) -> CallInfo:
        def idempotent() -> Any:
            return self._is_idempotent(method)

        return client_info(method, kind, args, kwargs, timeout, metadata, self._peer(), idempotent)

    async def call(
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
            result = await self._call_chain(info)
        except BaseException as error:
            info.finish(error)
            raise
        info.finish()
        return result

    async def _proceed_call(self, info: CallInfo) -> Any:
        packed: list[bytes] = []
        set_deadline(info)
        try:
            return await self._call_with(
                info.method, info.args, info.kwargs, info.timeout, info.metadata or None, packed
            )
        finally:
            if packed:
                info.trailing_metadata, info.initial_metadata = unpack_reply_metadata(packed[0])

    async def notify(
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
            await self._notify_chain(info)
        except BaseException as error:
            info.finish(error)
            raise
        info.finish()

    async def _proceed_notify(self, info: CallInfo) -> None:
        set_deadline(info)
        metadata = info.metadata or None
        await self._notify(
            info.method, *info.args, timeout=info.timeout, metadata=metadata, **info.kwargs
        )

    def stream(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """As ``Channel.stream``."""
        info = self._info(method, "stream", args, kwargs, timeout, metadata)
        return self._opening(STREAM_ENDED, info)

    def open(
        self,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **kwargs: Any,
    ) -> Call:
        """As ``Channel.open``."""
        info = self._info(method, "stream", args, kwargs, timeout, metadata)
        return self._opening(STREAM, info)

    def _opening(self, flags: int, info: CallInfo) -> Call:
        async def begin(call: Call) -> Any:
            async def proceed(info: CallInfo) -> Call:
                set_deadline(info)
                deadline = self._channel._deadline(info.timeout)
                metadata = info.metadata or None
                return await self._channel._begin_call(
                    call, flags, info.method, info.args, info.kwargs, deadline, metadata
                )

            def ended(error: BaseException | None) -> None:
                info.trailing_metadata, info.initial_metadata = call.reply_metadata()
                info.finish(error)

            call.observe(ended)
            try:
                result = await compose_async(self._interceptors, proceed)(info)
            except BaseException as error:
                info.finish(error)
                raise
            if result is not call:
                info.finish()  # an interceptor's own: there is no telling when it ends
            return result

        return Call(self._channel, info.method, begin, streams=flags == STREAM_ENDED)


def intercept_handlers(
    interceptors: Iterable[AsyncInterceptor],
) -> Callable[[Method, Any], Any] | None:
    """What runs a method through interceptors; None without any."""
    interceptors = list(interceptors)
    if not interceptors:
        return None

    async def nothing(info: CallInfo) -> CallInfo:
        return info

    compose_async(interceptors, nothing)  # TypeError for what is no interceptor

    def chain(method: Method, invoke: Any) -> Any:
        async def final(info: CallInfo) -> Any:
            return await invoke(method, info.args, info.kwargs)

        composed = compose_async(interceptors, final)

        async def run(args: Any, kwargs: dict[str, Any]) -> Any:
            info, context = server_info(method, tuple(args), kwargs)
            try:
                result = await composed(info)
            except BaseException as error:
                send_metadata(info, context)
                info.finish(error)
                raise
            if method.generator:
                return _items(result, info, context)
            send_metadata(info, context)
            info.finish()
            return result

        return run

    return chain


async def _items(result: Any, info: CallInfo, context: CallContext) -> AsyncIterator[Any]:
    """What a streaming handler yields, and then the end of its call."""
    send_initial(context)
    try:
        async for item in _as_async(result):
            yield item
    except BaseException as error:
        send_metadata(info, context)
        info.finish(error)
        raise
    send_metadata(info, context)
    info.finish()


async def _as_async(items: Any) -> AsyncIterator[Any]:
    try:
        if hasattr(items, "__aiter__"):
            async for item in items:
                yield item
        else:
            for item in items:
                yield item
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
