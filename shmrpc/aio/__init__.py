"""shmrpc for asyncio: the same names, awaitable, on the standard loop and on uvloop."""

from .calls import Call
from .client import Client, connect
from .install import install, new_event_loop, socket_path
from .server import Server
from .streams import create_connection, create_server, open_connection, start_server

__all__ = [
    "Call",
    "Client",
    "Server",
    "connect",
    "create_connection",
    "create_server",
    "install",
    "new_event_loop",
    "open_connection",
    "socket_path",
    "start_server",
]
