"""The loggers, one for each layer, and what ``SHMRPC_LOG`` does.

    shmrpc.client        connections made and lost
    shmrpc.server        starting and stopping; handlers that fail with nobody to tell
    shmrpc.acceptor      new connections, and those that come to nothing
    shmrpc.handover      listening sockets from systemd and predecessors
    shmrpc.supervisor    worker processes
    shmrpc.sidecar       upstreams that fail and come back, reloads
    shmrpc.tunnel        connections that come to nothing
    shmrpc.poller        threads, connections that end
    shmrpc.interceptors  callbacks of interceptors that raise
    shmrpc.retries       calls that are repeated
    shmrpc.aio           byte streams
    shmrpc.access        a line a call, of those who use interceptors.AccessLog

Nothing but the last says anything at INFO for each call.
"""

from __future__ import annotations

import logging
import os

__all__ = ["configure"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"


class _UnlessHandled(logging.Filter):
    """Lets records pass while the program has not configured logging itself."""

    def filter(self, _record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers


def configure() -> None:
    """Log to stderr from the level in ``SHMRPC_LOG`` on: debug, info, warning or error.

    A program that has handlers of its own at the root logger gets the records there instead, of
    that level. Without the variable nothing changes.
    """
    wanted = os.environ.get("SHMRPC_LOG", "").strip().lower()
    if not wanted:
        return
    logger = logging.getLogger("shmrpc")
    if wanted not in _LEVELS:
        logger.warning("SHMRPC_LOG is %r; use %s", wanted, ", ".join(_LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_UnlessHandled())
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[wanted])
