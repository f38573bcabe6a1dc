"""How the transaction's id gets from the client to the bank, beside the arguments."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from shmrpc.interceptors import CallInfo

carried: ContextVar[str] = ContextVar("carried")


class CarryTransaction:
    """At the client: the calls of this context belong to the transaction that is ``carried``."""

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        call.metadata["xid"] = carried.get()
        return proceed(call)


class OpenBranch:
    """At a bank: the handler runs within the bank's branch, and gets it as first arguments."""

    def __init__(self, branch: Callable[[str], AbstractContextManager[sqlite3.Connection]]) -> None:
        self._branch = branch

    def intercept(self, call: CallInfo, proceed: Callable[[CallInfo], Any]) -> Any:
        xid = str(call.metadata["xid"])
        with self._branch(xid) as database:
            call.args = (xid, database, *call.args)
            return proceed(call)
