"""Benchmarks of shmrpc beside what people use today; README.md tells how to run and read them.

bench_*.py, __main__.py    the two ways in: `pytest benchmarks` and `python -m benchmarks`
topics.py, targets.py      what is compared, and the ratios to reach
harness.py, peers.py       the processes: started, pinned and told what to do; their own side
measure.py, figures.py     one window of calls or items; the numbers of many of them
contenders.py              what a contender is, and where each one lives
baselines.py, rpc.py       the contenders: bare sockets, shmrpc over each transport
flows.py                   items one way, as a stream and as calls
report.py, conftest.py     tables for people, JSON by pytest-benchmark
"""
