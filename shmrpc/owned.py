"""Freeing what is the core's, no sooner than the last of those who use it is gone."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ._native import ffi

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["free_with"]


def free_with(c: Any, free: Callable[[Any], None]) -> weakref.finalize[..., Any]:
    """Free this pointer when nothing refers to ``c`` any more; or before, by calling the result.

    ``ffi.gc`` would not do. The garbage collector runs its destructors together with all
    ``__del__`` methods of what it has found, in any order: such as of an open call, which still
    tells the peer, or a user's that closes a client. A pointer, which the collector does not know
    of, outlives them.
    """
    finalizer = weakref.finalize(c, free, ffi.cast("void *", c))
    finalizer.atexit = False  # threads may be using it
    return finalizer
