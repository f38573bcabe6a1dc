"""A service and its client in one file: typed calls, errors, one-way calls, futures.

python examples/calculator.py          starts the service in a second process and calls it
python examples/calculator.py serve    only the service, until Ctrl-C
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Protocol

import shmrpc

NAME = "calculator"


class Calculator(Protocol):
    """What both sides agree on; the client's proxy is checked against it."""

    def add(self, a: float, b: float) -> float: ...
    def divide(self, a: float, b: float) -> float: ...
    def history(self) -> list[str]: ...


class Service:
    """The implementation: every public method can be called."""

    def __init__(self) -> None:
        self._history: list[str] = []

    def add(self, a: float, b: float) -> float:
        self._history.append(f"{a} + {b}")
        return a + b

    def divide(self, a: float, b: float) -> float:
        if b == 0:
            raise shmrpc.Abort("INVALID_ARGUMENT", "division by zero", details={"a": a})
        self._history.append(f"{a} / {b}")
        return a / b

    def remark(self, text: str) -> None:
        self._history.append(f"# {text}")

    def history(self) -> list[str]:
        return self._history


def serve() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    server = shmrpc.Server(NAME)
    server.add_service(Service())
    server.serve_forever()


def call() -> None:
    """Call the service in a few ways."""
    with shmrpc.connect(NAME) as client:
        calculator = client.proxy(Calculator)
        print("1 + 2 =", calculator.add(1, 2))
        try:
            calculator.divide(1, 0)
        except shmrpc.RemoteError as error:
            print("1 / 0:", error.code, error.message, error.details)
        futures = [client.submit("add", number, number) for number in range(3)]
        print("doubled:", [future.result() for future in futures])
        client.notify("remark", "that is all")
        print("history:", calculator.history())


def main() -> None:
    """Run the service beside us, and call it."""
    service = subprocess.Popen([sys.executable, __file__, "serve"])
    try:
        for _ in range(100):
            try:
                return call()
            except shmrpc.ConnectError:
                time.sleep(0.05)  # it is still starting
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
