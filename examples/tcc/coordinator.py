"""The coordinator of transactions: ``coordinator DIRECTORY NAME [HOLD]``."""

from __future__ import annotations

import sys
import threading

import shmrpc
from examples.support import PATIENCE, serve, tell, transaction


class Coordinator:
    """Its log has a row for each transaction and branch."""

    def __init__(self, directory: str, name: str, hold: str = "") -> None:
        self._path = f"{directory}/{name}.db"
        self._hold_at = hold
        self._changed = threading.Condition()
        self._closing = False
        with transaction(self._path) as database:
            database.execute("CREATE TABLE IF NOT EXISTS transactions (xid PRIMARY KEY, decision)")
            database.execute("CREATE TABLE IF NOT EXISTS branches (xid, bank, told)")
            query = "SELECT xid FROM transactions WHERE decision IS NULL"
            undecided = database.execute(query).fetchall()
        for (xid,) in undecided:
            self.decide(xid, "cancel")

    def begin(self, xid: str) -> None:
        """Start a transaction. May be repeated."""
        with transaction(self._path) as database:
            database.execute("INSERT OR IGNORE INTO transactions VALUES (?, NULL)", (xid,))

    def register(self, xid: str, bank: str) -> None:
        """Note that a bank has to be told what is decided, before it tries anything."""
        with transaction(self._path) as database:
            query = "SELECT 1 FROM transactions WHERE xid = ? AND decision IS NULL"
            if not database.execute(query, (xid,)).fetchone():
                raise shmrpc.Abort("ABORTED", f"{xid} is over")
            database.execute("INSERT INTO branches VALUES (?, ?, 0)", (xid, bank))

    def decide(self, xid: str, wish: str) -> str:
        """Decide to ``confirm`` or ``cancel``, unless that is done; return what was decided."""
        with transaction(self._path) as database:
            query = "UPDATE transactions SET decision = ? WHERE xid = ? AND decision IS NULL"
            database.execute(query, (wish, xid))
            query = "SELECT decision FROM transactions WHERE xid = ?"
            (decision,) = database.execute(query, (xid,)).fetchone()
        tell(f"{xid}: decided to {decision}")
        if self._hold_at == "after its decision":
            tell(f"{xid}: the coordinator stays {self._hold_at}")
            threading.Event().wait()
        self._notify()
        return str(decision)

    def attend(self, bank: str) -> None:
        """A bank's standing call: while it lasts, the bank is told what was decided."""
        call = shmrpc.current_call()
        self._notify()  # lets the handler of a connection that the bank has lost see that

        def over() -> bool:
            return self._closing or call.cancelled

        while not over():
            for xid, decision in self._untold(bank):
                call.caller.call(decision, xid, timeout=PATIENCE)
                with transaction(self._path) as database:
                    query = "UPDATE branches SET told = 1 WHERE xid = ? AND bank = ?"
                    database.execute(query, (xid, bank))
                self._notify()
            with self._changed:
                self._changed.wait_for(lambda: over() or self._untold(bank))

    def settle(self) -> None:
        """Wait until every bank has been told every decision."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._untold("%"))

    def _untold(self, bank: str) -> list[tuple[str, str]]:
        with transaction(self._path) as database:
            query = """SELECT xid, decision FROM branches JOIN transactions USING (xid)
                       WHERE bank LIKE ? AND NOT told AND decision NOTNULL"""
            return database.execute(query, (bank,)).fetchall()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End the standing calls."""
        self._closing = True
        self._notify()


if __name__ == "__main__":
    coordinator = Coordinator(*sys.argv[1:])
    server = shmrpc.Server(sys.argv[2])
    for name in ("begin", "register", "decide", "attend", "settle"):
        server.method(getattr(coordinator, name))
    serve(sys.argv[2], server, coordinator.close)
