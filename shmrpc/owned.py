"""Freeing what is the core's, no sooner than the last of those who use it is gone."""

from __future__ import annotations

import atexit
import weakref
from typing import TYPE_CHECKING, Any

from ._native import ffi

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["free_after", "free_with"]


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


class _Watch(weakref.ref[Any]):
    """A reference that is itself and no other: two to equal pointers are equal by default."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_owners: dict[_Watch, Any] = {}
_disown = _owners.pop


def free_after(data: Any, free: Callable[[Any], None]) -> None:
    """Call ``free(pointer)`` when nothing refers to ``data``, a pointer to the same, any more.

    For memory that users see, whose ``__del__`` may look at it: as ``free_with``, but nothing of
    this is Python code, in which a signal handler could raise before the memory is given back.
    """
    _owners[_Watch(data, _disown)] = ffi.gc(ffi.cast("void *", data), free)


@atexit.register
def _keep_all() -> None:
    """Free nothing while the interpreter ends: who still sees it may be finalized after us."""
    for owner in list(_owners.values()):
        ffi.gc(owner, None)
