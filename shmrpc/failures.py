"""What a caller is told of a call that failed in its handler, or before or after it."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Literal

from .codec import MsgpackCodec
from .errors import STATUS_NUMBERS, Error, RemoteError
from .timing import TRANSPARENT

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Failure", "Stage", "call_checked", "unsendable_item"]

Stage = Literal["arguments", "handler", "result"]

_TRACEBACK_MAX = 32768
_SHORT = 256
_UNKNOWN = STATUS_NUMBERS["UNKNOWN"]


class Failure:
    """The error that goes into a reply."""

    def __init__(
        self, kind: str, text: str, code: str, details: Any = None, shown: str = ""
    ) -> None:
        self.number = STATUS_NUMBERS.get(code, _UNKNOWN)
        self._fields: dict[str, Any] = {"type": _plain(kind), "message": _plain(text)}
        if shown:
            self._fields["traceback"] = _plain(shown)
        self._details = details

    @classmethod
    def of(cls, error: BaseException, stage: Stage, method: str, shows: bool) -> Failure:
        """What is said of an exception; ``shows`` is whether the caller may see the traceback.

        The exception's first frame is the one that called the handler.
        """
        kind = type(error)
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        while frames is not None and frames.tb_frame.f_code in TRANSPARENT:
            frames = frames.tb_next
        if stage == "arguments":
            text = f"the arguments of {method!r} can't be read: {error}"
            return cls(name, text, "INVALID_ARGUMENT")
        if stage == "result" and isinstance(error, Error):  # no room for it, mostly
            return cls(name, str(error), error.code)
        if stage == "result":
            return cls(name, f"{method!r} returned what can't be sent: {error}", "INTERNAL")
        if isinstance(error, RemoteError):
            return cls(error.type, error.message, error.code, error.details)
        if frames is None and isinstance(error, TypeError):
            # Raised by calling it: the arguments do not fit its signature.
            return cls(name, str(error), "INVALID_ARGUMENT")
        shown = ""
        if shows:
            shown = "".join(traceback.format_exception(kind, error, frames))[-_TRACEBACK_MAX:]
        code = error.code if isinstance(error, Error) else "UNKNOWN"
        return cls(name, str(error), code, shown=shown)

    def pack(self) -> bytes:
        """The body of the reply."""
        encode = MsgpackCodec().encoder()
        if self._details is None:
            return encode(self._fields)
        try:
            return encode({**self._fields, "details": self._details})
        except (TypeError, ValueError, OverflowError):
            return MsgpackCodec().encoder()(
                {**self._fields, "details": _plain(repr(self._details))}
            )

    def pack_short(self) -> bytes:
        """The same for a caller that accepts no more."""
        short = {name: self._fields[name][:_SHORT] for name in ("type", "message")}
        return MsgpackCodec().encoder()(short)


def call_checked(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a handler; arguments that do not fit its signature raise what the caller will see."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        text, code = str(error), "INVALID_ARGUMENT"
        raise RemoteError(text, type="TypeError", code=code) from None


def _plain(text: object) -> str:
    """Text that every codec can carry, whatever the handler put into its exception."""
    return str(text).encode("utf-8", "replace").decode()


def unsendable_item(method: str, item: object, error: Exception) -> RemoteError:
    """What the caller gets if a handler yields something that is no value."""
    kind = type(item).__qualname__
    text = f"{method!r} yielded what can't be sent: {error} (of type {kind})"
    return RemoteError(text, type=type(error).__qualname__, code="INTERNAL")
