"""RPC between processes on one host over shared memory."""

from .buffers import Buffer
from .client import Client, connect
from .codec import Codec, MsgpackCodec
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
    "MessageTooLarge",
    "MethodNotFound",
    "MsgpackCodec",
    "Overloaded",
    "ProtocolError",
    "RemoteError",
    "Server",
    "connect",
    "current_call",
]
