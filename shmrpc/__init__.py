"""RPC between processes on one host over shared memory."""

from .buffers import Buffer
from .client import Client
from .codec import Codec, MsgpackCodec
from .connecting import connect
from .context import CallContext, current_call
from .errors import (
    Abort,
    Cancelled,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    ForkedError,
    MessageTooLarge,
    MethodNotFound,
    Overloaded,
    ProtocolError,
    RemoteError,
)
from .inspector import Inspector, inspect
from .logs import configure as _configure_logs
from .pool import Pool
from .server import Server

__version__ = "0.1.0"

__all__ = [
    "Abort",
    "Buffer",
    "CallContext",
    "Cancelled",
    "Client",
    "Codec",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Error",
    "ForkedError",
    "Inspector",
    "MessageTooLarge",
    "MethodNotFound",
    "MsgpackCodec",
    "Overloaded",
    "Pool",
    "ProtocolError",
    "RemoteError",
    "Server",
    "connect",
    "current_call",
    "inspect",
]

_configure_logs()
