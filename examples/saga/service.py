"""A service that sells something: ``service DIRECTORY NAME STOCK [HOLD]``."""

from __future__ import annotations

import sys
import threading

import shmrpc
from examples.support import serve, tell, transaction


class Service:
    """Its public methods can be called. Each is one transaction."""

    def __init__(self, directory: str, name: str, stock: str, hold: str = "") -> None:
        self._path = f"{directory}/{name}.db"
        self._name = name
        self._hold_at = hold
        self._overtaken = threading.Event()
        with transaction(self._path) as database:
            database.execute("CREATE TABLE IF NOT EXISTS stock (free CHECK (free >= 0))")
            database.execute(
                "CREATE TABLE IF NOT EXISTS bookings (trip PRIMARY KEY, state, amount)"
            )
            database.execute(
                "INSERT INTO stock SELECT ? WHERE NOT EXISTS (SELECT 1 FROM stock)", (int(stock),)
            )

    def book(self, trip: str, amount: int) -> None:
        """Take so much from the stock for a trip. The coordinator asks for it once at most."""
        self._hold("before", trip)
        with transaction(self._path) as database:
            if database.execute("SELECT 1 FROM bookings WHERE trip = ?", (trip,)).fetchone():
                # Suspension: what was taken back before it came must not be booked any more.
                tell(f"{trip}: {self._name} got the booking after its cancellation, and refuses")
                raise shmrpc.Abort("ABORTED", "cancelled already")
            (free,) = database.execute("SELECT free FROM stock").fetchone()
            if free < amount:
                raise shmrpc.Abort("FAILED_PRECONDITION", f"only {free} left")
            database.execute("UPDATE stock SET free = free - ?", (amount,))
            database.execute("INSERT INTO bookings VALUES (?, 'booked', ?)", (trip, amount))
        self._hold("after", trip)

    def cancel(self, trip: str) -> str:
        """Undo the booking of a trip if it has happened, keep it out if not. May be repeated."""
        with transaction(self._path) as database:
            # Null compensation: there is nothing to undo, but the row keeps the booking out.
            database.execute("INSERT OR IGNORE INTO bookings VALUES (?, 'cancelled', 0)", (trip,))
            booked = "SELECT amount FROM bookings WHERE trip = ? AND state = 'booked'"
            (amount,) = database.execute(booked, (trip,)).fetchone() or (0,)
            database.execute("UPDATE stock SET free = free + ?", (amount,))
            database.execute("UPDATE bookings SET state = 'cancelled' WHERE trip = ?", (trip,))
        self._overtaken.set()
        return f"takes {amount} back" if amount else "has nothing to take back"

    def _hold(self, point: str, trip: str) -> None:
        """If the story wants it, stay here until killed or overtaken by a cancellation."""
        if point == self._hold_at:
            tell(f"{trip}: {self._name} stays where it was {point} booking")
            self._overtaken.wait()


if __name__ == "__main__":
    server = shmrpc.Server(sys.argv[2])
    server.add_service(Service(*sys.argv[1:]))
    serve(sys.argv[2], server)
