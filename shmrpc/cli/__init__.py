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
        _open_standard_streams()
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


def _open_standard_streams() -> None:
    """Put /dev/null where we were started without one of them, as by ``shmrpc ls >&-``.

    Else a socket would get that number, and what somebody prints would go to a peer.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115
