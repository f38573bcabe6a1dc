"""The contract process: ``contract ADDRESS``. Of the chain it knows ``get`` and ``put``."""

import signal
import sys
from functools import partial
from typing import Any

import shmrpc


class Contract:
    """One invocation of it; its methods call the chain back."""

    def __init__(self, chain: Any, number: int) -> None:
        self._get = partial(chain, "get", number)
        self._put = partial(chain, "put", number)

    def issue(self, value: int, *keys: str) -> None:
        for key in keys:
            self._put(key, value)

    def share(self, amount: int, giver: str, *receivers: str) -> None:
        for receiver in receivers:
            left = self._get(giver)
            if left < amount:
                raise shmrpc.Abort("FAILED_PRECONDITION", f"{giver} has only {left} for {receiver}")
            self._put(giver, left - amount)
            self._put(receiver, self._get(receiver) + amount)

    def total(self, *keys: str) -> int:
        return sum(map(self._get, keys))

    def die(self, *keys: str) -> None:
        self.issue(0, *keys)
        signal.raise_signal(signal.SIGKILL)


def invoke(chain: Any, number: int, method: str, *args: Any) -> Any:
    return getattr(Contract(chain, number), method)(*args)


if __name__ == "__main__":
    if sys.argv[1].startswith("grpc:"):
        from examples.contract_vm import over_grpc

        chain = over_grpc.caller(sys.argv[1])
        address, _stop = over_grpc.serve(invoke=partial(invoke, chain))
        chain("ready", address)
        sys.stdin.read()
    else:
        with shmrpc.connect(sys.argv[1]) as client:
            client.method(name="invoke")(partial(invoke, client.call))
            client.call("ready")
            sys.stdin.read()  # ends with the chain
