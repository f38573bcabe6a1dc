"""What interceptors see of a call, and what becomes of what they set: the same for both worlds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from .context import CallContext, current_call
from .interceptors import CallInfo
from .metadata import check_metadata
from .poller import check_timeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from .metadata import Metadata
    from .registry import Method

__all__ = ["client_info", "send_initial", "send_metadata", "server_info", "set_deadline"]


def client_info(
    method: str,
    kind: Literal["unary", "submit", "notify", "stream"],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float | None,
    metadata: Metadata | None,
    peer: str,
    idempotent: Callable[[], Any],
) -> CallInfo:
    """A call that is about to be made; TypeError or ValueError for what can't be sent with it."""
    if metadata is not None:
        check_metadata(metadata)
    if timeout is not None:
        timeout = check_timeout(timeout)
    return CallInfo(
        method,
        kind,
        "client",
        args,
        kwargs,
        dict(metadata or {}),
        timeout=timeout,
        peer=peer,
        idempotent=idempotent,
    )


def set_deadline(info: CallInfo) -> None:
    """As its timeout is now, when it is sent."""
    info.deadline = None if info.timeout is None else time.monotonic() + info.timeout


def server_info(
    method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CallInfo, CallContext]:
    """The call that is about to be handled, and its context."""
    context = current_call()
    kind: Literal["unary", "notify"] = "notify" if context.one_way else "unary"
    info = CallInfo(
        method.name,
        "stream" if method.streams else kind,
        "server",
        args,
        kwargs,
        context.metadata,
        deadline=context.deadline,
        peer=context.connection.peer if context.connection is not None else "a peer that is gone",
    )
    context.initial_default = info.initial_metadata
    return info, context


def send_initial(context: CallContext) -> None:
    """Send what interceptors want sent before the first reply, unless the handler has."""
    if context.initial_default and context.initial_metadata is None:
        context.send_initial_metadata({})


def send_metadata(info: CallInfo, context: CallContext) -> None:
    """What interceptors want sent with the reply; the handler's own of the same key wins."""
    send_initial(context)
    if info.trailing_metadata:
        context.set_trailing_metadata({**info.trailing_metadata, **context.trailing_metadata})
