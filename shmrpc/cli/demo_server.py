"""The demo's server: ``python -m shmrpc.cli.demo_server DIRECTORY ADDRESS...``.

Prints a line of JSON when it listens, and serves until its standard input ends. That happens also
when the demo is killed, so neither this process nor its sockets nor their directory outlive it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TypeVar

import shmrpc

__all__ = ["main"]

T = TypeVar("T")


def echo(value: T) -> T:
    """Return the value."""
    return value


def main(directory: str, *addresses: str) -> None:
    """Serve ``echo`` at the addresses, then remove the directory they lie in."""
    try:
        server = shmrpc.Server(*addresses)
        server.method(echo)
        server.start()
    except (shmrpc.Error, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    try:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"addresses": server.addresses}), flush=True)
            sys.stdin.buffer.read()
    finally:
        server.stop(grace=1.0)
        with contextlib.suppress(OSError):  # the demo was first, or something else lies in there
            os.rmdir(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
