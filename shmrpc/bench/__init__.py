"""Measures shmrpc beside what people use today, on the user's own machine: ``shmrpc bench``.

It is built on the public API alone, as any other contender's program would be.

suite.py, regimes.py            what is measured, and under which circumstances
harness.py, team.py, peers.py   the comparison, a contender's processes, and their own side
measure.py, pace.py, usage.py   one window of calls, calls at a steady rate, what they cost
work.py, figures.py             the payload and who counts it; the numbers that come out
lifetime.py                     processes that end with the one that started them
contenders.py                   what a contender is, and where each one lives
rpc.py, rpc_aio.py, flows.py    shmrpc itself: calls, the same on asyncio, streams
sockets.py, loops.py, multiproc.py, zeromq.py, grpc_unix.py, iceoryx.py, nng.py, thrift.py,
rpyc_unix.py                    the others
limits.py, machine.py           what the machine itself can do, and what it is
results.py, changes.py          files of results, and two of them compared
tables.py, charts.py, page.py   for people: the terminal and the report
"""
