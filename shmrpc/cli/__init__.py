"""The ``shmrpc`` command. ``main`` is its entry point; each subcommand is a module of its own.

It uses what ``import shmrpc`` offers to everybody, and nothing below that.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

_INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended


def main() -> None:
    """Run the command that ``sys.argv`` names and exit.

    Exit status: 0 done; 1 the server was reached and the call failed (``ping``: not all were
    answered); 2 wrong usage or input, or no connection; 130 interrupted.
    """
    try:
        # Here, so that Ctrl-C is no traceback even while click is being imported.
        from .root import run

        status = run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        # `shmrpc ls | head -1`: nobody reads any more. Python flushes stdout once more at exit,
        # which must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)
