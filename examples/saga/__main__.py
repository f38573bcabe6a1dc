"""The story: customers, and somebody who kills."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import shmrpc
from examples.support import PATIENCE, Processes, run, transaction

STOCKS = {"car": 100, "hotel": 100, "payment": 1000}
COMMANDS = {
    **{service: ["service", str(stock)] for service, stock in STOCKS.items()},
    "coordinator": ["coordinator", *STOCKS],
}
TRIP = {"car": 1, "hotel": 2, "payment": 300}


class Story:
    """What happens, and whether the books agree with it afterwards."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._amounts: dict[str, dict[str, int]] = {}
        self._results: dict[str, str] = {}
        self._customers = ThreadPoolExecutor(1)
        self._client = shmrpc.connect("coordinator", timeout=PATIENCE)

    def _travel(self, trip: str, amounts: dict[str, int], seconds: float = PATIENCE) -> None:
        """Book a trip and note the result. For a customer too, the outcome decides what to do."""
        self._amounts[trip] = amounts
        call = functools.partial(self._client.call, "travel", trip, amounts, seconds)
        while trip not in self._results:
            try:
                self._results[trip] = call()
            except shmrpc.ConnectionLost as error:
                if error.outcome == "unknown":  # from now on only ask what became of it
                    call = functools.partial(self._client.call, "outcome", trip)

    def scenes(self) -> None:
        """One trip for each thing that can go wrong."""
        tell, until = self._processes.tell, self._processes.until
        tell("-- All goes well.")
        self._travel("trip-1", TRIP)

        tell("-- Not enough money: what was booked is taken back, the last first.")
        self._travel("trip-2", {**TRIP, "payment": 2000})

        tell("-- The hotel dies before it looks at the booking: it is asked again.")
        self._processes.pause("hotel")
        trip = self._customers.submit(self._travel, "trip-3", TRIP)
        until("trip-3: hotel is asked")
        self._processes.restart("hotel")
        trip.result(PATIENCE)

        for name, point in (("trip-4", "before"), ("trip-5", "after")):
            tell(f"-- The hotel dies {point} it has booked. Nobody knows: all is cancelled.")
            self._processes.start("hotel", point)
            trip = self._customers.submit(self._travel, name, TRIP)
            until("hotel stays")
            self._processes.restart("hotel")
            trip.result(PATIENCE)

        tell("-- The hotel is slow, and the cancellation overtakes the booking.")
        self._processes.start("hotel", "before")
        self._travel("trip-6", {"hotel": 2}, seconds=1)
        until("after its cancellation")

        for name, point in (("trip-7", "before"), ("trip-8", "after")):
            tell(f"-- The coordinator dies {point} the hotel has booked.")
            self._processes.start("hotel", point)
            trip = self._customers.submit(self._travel, name, TRIP)
            until("hotel stays")
            self._processes.restart("coordinator")
            trip.result(PATIENCE)
        self._processes.start("hotel")

    def once(self, name: str, amount: int) -> None:
        """What customers do in the storm."""
        self._travel(name, {**TRIP, "payment": amount})

    def close(self) -> None:
        """No customer is left."""
        self._customers.shutdown()
        self._client.close()

    def check_sums(self, directory: str) -> str:
        """Compare what customers were told with each service's books."""
        booked = {trip for trip, result in self._results.items() if result == "booked"}
        for service, stock in STOCKS.items():
            with transaction(f"{directory}/{service}.db") as database:
                (free,) = database.execute("SELECT free FROM stock").fetchone()
                found = "SELECT trip, amount FROM bookings WHERE state = 'booked'"
                sold = dict(database.execute(found).fetchall())
            wanted = {trip: self._amounts[trip][service] for trip in booked}
            if sold != wanted or free + sum(sold.values()) != stock:
                sys.exit(f"{service}: sold {sold}, not {wanted}; {free} of {stock} are left")
        return f"The sums hold: {len(booked)} of {len(self._results)} trips booked, all paid."


if __name__ == "__main__":
    run("examples.saga", COMMANDS, Story)
