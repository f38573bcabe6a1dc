"""The story: what is shared while somebody kills, and how long that takes."""

import random
import sys
import tempfile
import threading
from functools import partial
from statistics import median
from timeit import timeit
from typing import Any

import rich.table

import shmrpc
from examples.contract_vm.chain import Chain

KEYS = [f"key-{number}" for number in range(100)]


def attempt(chain: Chain, *args: Any) -> bool:
    """Invoke; an error has changed nothing. Whether the contract is alive."""
    before = chain.state()
    try:
        chain.invoke(*args)
    except shmrpc.Error as error:
        print(error)
        assert chain.state() == before, "what was written has not been dropped"
        return not isinstance(error, shmrpc.ConnectionLost)
    return True


def tell(chain: Chain, seed: int) -> None:
    chain.invoke("issue", 1000, *KEYS)
    print("-- All goes well, until there is not enough for all: then nobody gets anything.")
    attempt(chain, "share", 9, *KEYS)
    attempt(chain, "share", 2, *KEYS)
    print("-- The contract is killed when it has written.")
    attempt(chain, "die", *KEYS)
    print(f"-- It is killed at any moment, 20 times, seed {seed}.")
    chosen = random.Random(seed)
    for _ in range(20):
        threading.Timer(chosen.uniform(0, 0.02), chain.process.kill).start()
        while attempt(chain, "share", 1, *chosen.sample(KEYS, 50)):
            pass
    print(f"{sum(chain.state().values())} of {1000 * len(KEYS)} are there in the end.")


def compare(chains: dict[str, Chain]) -> rich.table.Table:
    table = rich.table.Table("state reads", *chains, title="us per invocation (multiple of shm's)")
    for reads in (1, 10, 100):
        tasks = [partial(chain.invoke, "total", *KEYS[:reads]) for chain in chains.values()]
        count = 5 + 100 // reads
        turns = [[timeit(task, number=count) / count for task in tasks] for _ in range(5)]
        times = [median(times) for times in zip(*turns, strict=True)]
        table.add_row(str(reads), *(f"{t * 1e6:.0f} ({t / times[0]:.1f}x)" for t in times))
    return table


if __name__ == "__main__":
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(1 << 32)
    with tempfile.TemporaryDirectory() as directory:
        chains = {"shm": Chain(directory, f"shm://{directory}/chain")}
        chains["tcp"] = Chain(directory, "tcp://127.0.0.1:0")
        try:
            from examples.contract_vm.over_grpc import GrpcChain

            chains["gRPC"] = GrpcChain(directory, "")
        except ImportError as error:
            print(f"-- gRPC is left out: {error}; pip install grpcio")
        tell(chains["shm"], seed)
        rich.print(compare(chains))
        for chain in chains.values():
            chain.close()
