"""shmrpc for asyncio: the same names, awaitable, on the standard loop and on uvloop."""

from .calls import Call
from .client import Client, connect
from .server import Server

__all__ = ["Call", "Client", "Server", "connect"]
