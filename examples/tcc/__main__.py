"""The story: somebody who moves money, and somebody who kills."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import shmrpc
from examples.support import PATIENCE, Processes, run, transaction
from examples.tcc.bank import OPENING_BALANCE
from examples.tcc.interceptors import CarryTransaction, carried

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = {"coordinator": ["coordinator"], "north": ["bank"], "south": ["bank"]}


class Story:
    """What happens, and whether the books agree with it afterwards."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._moved: dict[str, int] = {}
        self._coordinator = shmrpc.connect("coordinator", timeout=PATIENCE)
        carry = [CarryTransaction()]
        self._north = shmrpc.connect("north", timeout=PATIENCE, interceptors=carry)
        self._south = shmrpc.connect("south", timeout=PATIENCE, interceptors=carry)

    def _ask(self, method: str, *arguments: str) -> str:
        """Ask the coordinator until it answers. Whatever is asked so may be asked twice."""
        while True:
            with contextlib.suppress(shmrpc.ConnectionLost):
                return str(self._coordinator.call(method, *arguments))

    def _move(self, xid: str, amount: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Move money from the north to the south, all or nothing."""
        self._ask("begin", xid)
        carried.set(xid)
        wish = "confirm"
        try:
            self._south.call("deposit", amount, timeout=PATIENCE)
            self._north.call("withdraw", amount, timeout=PATIENCE)
        except (shmrpc.RemoteError, shmrpc.ConnectionLost) as error:
            self._processes.tell(f"{xid}: given up, {error}".splitlines()[0])
            wish = "cancel"  # that is right whether or not it has run
        meanwhile()
        self._moved[xid] = amount if self._ask("decide", xid, wish) == "confirm" else 0

    def _scene(self, text: str) -> None:
        self._ask("settle")
        self._processes.tell(f"-- {text}")

    def scenes(self) -> None:
        """One transfer for each thing that can go wrong."""
        self._scene("All goes well.")
        self._move("move-1", 100)

        self._scene("Not enough money: what was announced is cancelled, and what was not paid.")
        self._move("move-2", 2000)

        self._scene("The south dies between Try and Confirm.")
        self._move("move-3", 100, meanwhile=lambda: self._processes.kill("south"))
        self._processes.until("move-3: north has confirmed")
        self._processes.start("south")

        for xid, when in (("move-4", "before"), ("move-5", "after")):
            self._scene(f"The south dies {when} it has confirmed, and is told again.")
            self._processes.start("south", f"{when} it has confirmed")
            self._move(xid, 100)
            self._processes.until("south stays")
            self._processes.restart("south")

        self._scene("The coordinator dies between Try and its decision.")
        self._move("move-6", 100, meanwhile=lambda: self._processes.restart("coordinator"))

        for xid, point in (("move-7", "after its decision"), ("move-8", "during Try")):
            self._scene(f"The coordinator dies {point}.")
            for name in ("coordinator", "north"):  # one of them knows that point
                self._processes.start(name, point)
            with ThreadPoolExecutor() as customer:
                move = customer.submit(self._move, xid, 100)
                self._processes.until("stays")
                self._processes.restart("coordinator")
                move.result(PATIENCE)
        self._ask("settle")

    def once(self, name: str, amount: int) -> None:
        """What customers do in the storm."""
        self._move(name, amount)

    def close(self) -> None:
        """Wait for the last phase two; nobody moves anything any more."""
        self._ask("settle")
        for client in (self._coordinator, self._north, self._south):
            client.close()

    def check_sums(self, directory: str) -> str:
        """Compare what we were told with the books of the banks."""
        moved = sum(self._moved.values())
        for bank, change in (("north", -moved), ("south", moved)):
            with transaction(f"{directory}/{bank}.db") as database:
                (balance,) = database.execute("SELECT balance FROM account").fetchone()
            if balance != OPENING_BALANCE + change:
                sys.exit(f"{bank} has {balance}, but {moved} were moved: {self._moved}")
        confirmed = sum(amount > 0 for amount in self._moved.values())
        return f"The sums hold: {confirmed} of {len(self._moved)} moves, {moved} in all."


if __name__ == "__main__":
    run("examples.tcc", COMMANDS, Story)
