"""The chain: its state, and the contract process that reads and writes it."""

import itertools
import queue
import sqlite3
import subprocess
import sys
from typing import Any

import shmrpc
from examples.support import PATIENCE


class Chain:
    """Runs one invocation at a time."""

    def __init__(self, directory: str, address: str) -> None:
        path = f"{directory}/state"  # read in the server's threads as well, by the contract
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("CREATE TABLE IF NOT EXISTS state (key PRIMARY KEY, value)")
        self._numbers = itertools.count(1)
        self._writes: dict[int, dict[str, int]] = {}  # by the number of the invocation that runs
        self._contracts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._address, self._stop_serving = self._serve(address)
        self._start_contract()

    def _serve(self, address: str) -> tuple[str, Any]:
        server = shmrpc.Server(address)
        for method in (self.get, self.put, self.ready):
            server.method(method)
        server.start()
        return server.addresses[0], server.stop

    def _start_contract(self) -> None:
        command = [sys.executable, "-m", "examples.contract_vm.contract", self._address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._contract = self._contracts.get(timeout=PATIENCE)

    def ready(self) -> None:
        self._contracts.put(shmrpc.current_call().caller.call)

    def get(self, number: int, key: str) -> Any:
        if key in self._writes[number]:
            return self._writes[number][key]
        rows = self._database.execute("SELECT value FROM state WHERE key = ?", (key,))
        return (rows.fetchone() or (0,))[0]

    def put(self, number: int, key: str, value: int) -> None:
        self._writes[number][key] = value

    def invoke(self, method: str, *args: Any) -> Any:
        """Run a method of the contract; apply what it wrote when it has returned, else nothing."""
        number = next(self._numbers)
        self._writes[number] = {}
        try:
            with self._database:  # ends with COMMIT, after an error with ROLLBACK
                self._database.execute("BEGIN")  # one state for all that it reads
                result = self._contract("invoke", number, method, *args)
                writes = list(self._writes[number].items())
                self._database.executemany("REPLACE INTO state VALUES (?, ?)", writes)
        except shmrpc.ConnectionLost:
            self.process.communicate(timeout=PATIENCE)
            status, dropped = self.process.returncode, len(self._writes[number])
            print(f"invocation {number}: contract ended with {status}, {dropped} writes dropped")
            self._start_contract()
            raise
        finally:
            del self._writes[number]
        return result

    def state(self) -> dict[str, int]:
        return dict(self._database.execute("SELECT key, value FROM state"))

    def close(self) -> None:
        self.process.communicate(timeout=PATIENCE)
        self._stop_serving()
        self._database.close()
