"""The project's own benchmarks: topics with targets, and what needs more than the public API.

bench_*.py, __main__.py    the two ways in: `pytest benchmarks` and `python -m benchmarks`
topics.py, targets.py      what is compared, and the ratios to reach
event_loops.py, web.py     calls, bytes and HTTP of event loops
middlemen.py, uds_proxy.py  a process between client and server
floor.py                   what any RPC over these rings pays at least: rings and msgpack
report.py, conftest.py     tables for people, JSON by pytest-benchmark

Processes, measuring and contenders are those of `shmrpc bench`, in shmrpc/bench.
"""

from shmrpc.bench import contenders

contenders.register("floor", "benchmarks.floor:FLOOR")
contenders.register("sidecar", "benchmarks.middlemen:SIDECAR")
contenders.register("uds-proxy", "benchmarks.middlemen:UDS_PROXY")
contenders.register("shm 1 MB", "benchmarks.middlemen:SHM_LARGE")
contenders.register("sidecar 1 MB", "benchmarks.middlemen:SIDECAR_LARGE")
contenders.register("fastapi", "benchmarks.web:SHM")
contenders.register("fastapi-uds", "benchmarks.web:UDS")
