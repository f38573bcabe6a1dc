"""The coordinator of sagas: ``coordinator DIRECTORY NAME SERVICE...``."""

from __future__ import annotations

import sys

import shmrpc
from examples.support import PATIENCE, serve, tell, transaction


class Coordinator:
    """Books all steps of a trip or none. What it does is in its log before it does it."""

    def __init__(self, directory: str, name: str, *services: str) -> None:
        self._path = f"{directory}/{name}.db"
        self._services = {
            service: shmrpc.connect(service, timeout=PATIENCE) for service in services
        }
        with transaction(self._path) as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS log (id INTEGER PRIMARY KEY, trip, event, service)"
            )
            unfinished = database.execute(
                "SELECT trip FROM log GROUP BY trip "
                "HAVING NOT max(event IN ('booked', 'cancelled'))"
            ).fetchall()
        for (trip,) in unfinished:
            tell(f"{trip}: found unfinished in the log")
            self._compensate(trip)

    def travel(self, trip: str, amounts: dict[str, int], seconds: float) -> str:
        """Book so much of each service, each in so many seconds: ``booked`` or ``cancelled``."""
        done = all(self._book(trip, name, amount, seconds) for name, amount in amounts.items())
        return self._log(trip, "booked") if done else self._compensate(trip)

    def outcome(self, trip: str) -> str:
        """What became of a trip; of one that it never heard of, nothing will become."""
        with transaction(self._path) as database:
            last = "SELECT event FROM log WHERE trip = ? ORDER BY id DESC"
            return str((database.execute(last, (trip,)).fetchone() or ("cancelled",))[0])

    def _book(self, trip: str, service: str, amount: int, seconds: float) -> bool:
        self._log(trip, "started", service)
        while True:
            try:
                call = self._services[service].submit("book", trip, amount, timeout=seconds)
                tell(f"{trip}: {service} is asked for {amount}")
                call.result()
            except shmrpc.RemoteError as error:
                tell(f"{trip}: {service} refuses: {error.message}")
                self._log(trip, "refused", service)
                return False
            except shmrpc.ConnectionLost as error:
                tell(f"{trip}: {service} was lost, outcome {error.outcome}")
                if error.outcome == "unknown":
                    return False
                # It has certainly not run: to ask again can't book twice.
            except (shmrpc.ConnectError, shmrpc.DeadlineExceeded) as error:
                tell(f"{trip}: {service} gives no answer: {error.code}")
                return False
            else:
                return True

    def _compensate(self, trip: str) -> str:
        """Take back what may have happened, the last first, until every service has answered."""
        with transaction(self._path) as database:
            open_steps = database.execute(
                "SELECT service FROM log WHERE trip = ? GROUP BY service "
                "HAVING NOT max(event IN ('refused', 'compensated')) ORDER BY max(id) DESC",
                (trip,),
            ).fetchall()
        for (service,) in open_steps:
            tell(f"{trip}: {service} {self._cancel(trip, service)}")
            self._log(trip, "compensated", service)
        return self._log(trip, "cancelled")

    def _cancel(self, trip: str, service: str) -> str:
        while True:
            try:
                return str(self._services[service].call("cancel", trip, timeout=PATIENCE))
            except (shmrpc.ConnectError, shmrpc.ConnectionLost, shmrpc.DeadlineExceeded) as error:
                # Whatever became of it: a cancellation may be repeated.
                tell(f"{trip}: {service} can't be told to cancel yet: {error}")

    def _log(self, trip: str, event: str, service: str | None = None) -> str:
        with transaction(self._path) as database:
            database.execute(
                "INSERT INTO log (trip, event, service) VALUES (?, ?, ?)", (trip, event, service)
            )
        if service is None:
            tell(f"{trip}: {event}")
        return event


if __name__ == "__main__":
    server = shmrpc.Server(sys.argv[2])
    server.add_service(Coordinator(*sys.argv[1:]))
    serve(sys.argv[2], server)
