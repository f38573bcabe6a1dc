"""A service for several processes: ``shmrpc serve calc --processes 2``."""

import os

import shmrpc

server = shmrpc.Server("calc")


@server.method(idempotent=True)
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@server.method
def pid() -> int:
    """Tell which process answers."""
    return os.getpid()
