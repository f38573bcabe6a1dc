"""The project's own benchmarks: topics with targets, and what needs more than the public API.

bench_*.py, __main__.py    the two ways in: `pytest benchmarks` and `python -m benchmarks`
topics.py, targets.py      what is compared, and the ratios to reach
policy.py                  the waiting policy's targets, regime by regime
floor.py                   what any RPC over these rings pays at least: rings and msgpack
report.py, conftest.py     tables for people, JSON by pytest-benchmark

Processes, measuring and contenders are those of `shmrpc bench`, in shmrpc/bench.
"""

from shmrpc.bench import contenders

contenders.register("floor", "benchmarks.floor:FLOOR")
