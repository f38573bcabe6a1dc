"""The command group, and how whatever goes wrong becomes one line and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

import shmrpc

from .bench import bench
from .call import call
from .demo import demo
from .errors import Ended, failure_of, one_line
from .ls import ls
from .ping import ping
from .serve import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


class _Group(click.Group):
    """A group that says nothing about Ctrl-C: click's own would print an empty line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Ended(signal.SIGINT) from None


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(shmrpc.__version__, prog_name="shmrpc", message="%(prog)s %(version)s")
@click.pass_context
def shmrpc_command(context: click.Context) -> None:
    """RPC between processes on one host over shared memory.

    An ADDRESS is a service's name such as calc, or shm:///PATH, unix:///PATH or tcp://HOST:PORT.
    Named services are found in $SHMRPC_DIR, else in $XDG_RUNTIME_DIR/shmrpc, else in
    /tmp/shmrpc-UID.

    \b
    Examples:
      shmrpc demo                      compare shared memory, Unix sockets and TCP, here
      shmrpc bench --quick             the same with pipes, on one CPU, at a steady rate
      shmrpc serve calc:server         run the server that calc.py defines
      shmrpc call calc add 1 2         call a method of it
      shmrpc ls                        which servers are alive
      shmrpc ping calc -c 5            how long a round trip takes

    Exit status: 0 done; 1 the call failed at the server; 2 wrong usage or input, or no
    connection; 130 interrupted.
    """  # noqa: D301 - click wants the character \b itself
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (demo, bench, serve, call, ping, ls):
    shmrpc_command.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status; complaints are one line on stderr."""
    try:
        result = shmrpc_command.main(list(arguments), prog_name="shmrpc", standalone_mode=False)
    except Ended as ended:
        return 128 + ended.number
    except click.ClickException as error:
        _complain(_where(error), error.format_message(), _hint(error))
        return error.exit_code
    except shmrpc.Error as error:
        failure = failure_of(error)
        _complain("shmrpc", failure.message)
        return failure.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        _complain("shmrpc", _os_error(error))
        return 1
    except Exception as error:
        # Ours to mend, and yet no reason to fill the user's terminal with it.
        _complain("shmrpc", f"internal error: {type(error).__name__}: {error}")
        return 1
    return result if isinstance(result, int) else 0


def _where(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return context.command_path if context is not None else "shmrpc"


def _hint(error: click.ClickException) -> str:
    """Where to read on, for who got the usage wrong."""
    return f" (see {_where(error)} --help)" if isinstance(error, click.UsageError) else ""


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "can't write the output: no space is left"
    where = f": {os.fspath(error.filename)!r}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _complain(who: str, message: str, hint: str = "") -> None:
    text = one_line(message).rstrip(".")
    sys.stdout.flush()
    click.echo(f"{who}: {text}{hint}", err=True)
