"""A worker of ``shmrpc serve --processes``: ``python -m shmrpc.cli.worker`` and five arguments.

TARGET, GRACE, REACH (``remote`` or ``local``), FD (a socket to the supervisor), its PID.
"""

from __future__ import annotations

import signal
import sys
import threading

import click

import shmrpc
from shmrpc.supervisor import GROUP_SIGNALS, die_with_parent, join_supervisor

from .errors import failure_of, one_line
from .running import run_server
from .targets import find_server

__all__ = ["main"]


def main(target: str, grace: str, reach: str, fd: str, supervisor: str) -> int:
    """Serve until the supervisor says SIGTERM; returns the exit status."""
    die_with_parent(int(supervisor))
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)  # the supervisor has blocked them
    try:
        server = find_server(target)
        if reach == "remote":
            server.allow_remote()
        shared, tell_ready = join_supervisor(int(fd), server)
        threading.Thread(target=shared.attend, name="shmrpc-supervised", daemon=True).start()
        run_server(server, float(grace), lambda _where: tell_ready(), [signal.SIGTERM])
    except click.ClickException as error:
        return _complain(error)
    except shmrpc.Error as error:
        return _complain(failure_of(error))
    except KeyboardInterrupt:  # a second SIGTERM
        return 128 + signal.SIGTERM
    return 0


def _complain(error: click.ClickException) -> int:
    text = one_line(error.format_message()).rstrip(".")
    click.echo(f"shmrpc serve: {text}", err=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
