"""A bank with one account, a server for Try and a client for the rest.

``bank DIRECTORY NAME [HOLD]``
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

import shmrpc
from examples.support import PATIENCE, serve, tell, transaction
from examples.tcc.interceptors import OpenBranch

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

OPENING_BALANCE = 1000


class Bank:
    """An account, and for each branch of a transaction what the account gets when it ends."""

    def __init__(self, directory: str, name: str, hold: str = "") -> None:
        self._path = f"{directory}/{name}.db"
        self._name = name
        self._hold_at = hold
        self._overtaken = threading.Event()
        with transaction(self._path) as database:
            database.execute("CREATE TABLE IF NOT EXISTS account (id PRIMARY KEY, balance)")
            database.execute("INSERT OR IGNORE INTO account VALUES (1, ?)", (OPENING_BALANCE,))
            database.execute(
                "CREATE TABLE IF NOT EXISTS branches (xid PRIMARY KEY, state, confirmed, cancelled)"
            )
        self._coordinator = shmrpc.connect("coordinator", timeout=PATIENCE)
        self._coordinator.method(name="confirm")(lambda xid: self._end(xid, "confirmed"))
        self._coordinator.method(name="cancel")(lambda xid: self._end(xid, "cancelled"))
        threading.Thread(target=self._attend).start()

    def _attend(self) -> None:
        """Be there for the coordinator; when it was lost, for the one that comes after it."""
        with contextlib.suppress(shmrpc.Cancelled):  # closed
            while True:
                with contextlib.suppress(shmrpc.ConnectionLost, shmrpc.ConnectError):
                    self._coordinator.call("attend", self._name)

    @contextlib.contextmanager
    def branch(self, xid: str) -> Iterator[sqlite3.Connection]:
        """Register with the coordinator, so that its decision comes to us, and begin."""
        self._coordinator.call("register", xid, self._name, timeout=PATIENCE)
        self._hold("during Try", xid)
        with transaction(self._path) as database:
            if database.execute("SELECT 1 FROM branches WHERE xid = ?", (xid,)).fetchone():
                # Suspension: what was cancelled before it came must not be reserved any more.
                raise shmrpc.Abort("ABORTED", f"{xid} is over")
            yield database

    def withdraw(self, xid: str, database: sqlite3.Connection, amount: int) -> None:
        """Try: take the money away; it comes back if cancelled."""
        query = "UPDATE account SET balance = balance - ? WHERE balance >= ?"
        if not database.execute(query, (amount, amount)).rowcount:
            raise shmrpc.Abort("FAILED_PRECONDITION", f"{self._name} has less than {amount}")
        database.execute("INSERT INTO branches VALUES (?, 'tried', 0, ?)", (xid, amount))

    def deposit(self, xid: str, database: sqlite3.Connection, amount: int) -> None:
        """Try: announce the money; it comes if confirmed."""
        database.execute("INSERT INTO branches VALUES (?, 'tried', ?, 0)", (xid, amount))

    def _end(self, xid: str, state: str) -> None:
        """Confirm or cancel: the same however often it is called."""
        self._hold(f"before it has {state}", xid)
        with transaction(self._path) as database:
            # Null compensation: a Try that has not come is kept out. All that are confirmed have.
            database.execute("INSERT OR IGNORE INTO branches VALUES (?, 'tried', 0, 0)", (xid,))
            query = f"SELECT {state} FROM branches WHERE xid = ? AND state = 'tried'"
            (amount,) = database.execute(query, (xid,)).fetchone() or (0,)
            database.execute("UPDATE account SET balance = balance + ?", (amount,))
            database.execute("UPDATE branches SET state = ? WHERE xid = ?", (state, xid))
        self._hold(f"after it has {state}", xid)
        tell(f"{xid}: {self._name} has {state}, and got {amount}")
        self._overtaken.set()

    def _hold(self, point: str, xid: str) -> None:
        """If the story wants it, stay here until killed, or overtaken by phase two."""
        if point == self._hold_at:
            tell(f"{xid}: {self._name} stays {point}")
            self._overtaken.wait()

    def close(self) -> None:
        """Leave the coordinator, which ends the standing call and its thread."""
        self._coordinator.close()


if __name__ == "__main__":
    bank = Bank(*sys.argv[1:])
    server = shmrpc.Server(sys.argv[2], interceptors=[OpenBranch(bank.branch)])
    server.method(bank.withdraw)
    server.method(bank.deposit)
    serve(sys.argv[2], server)
    bank.close()
