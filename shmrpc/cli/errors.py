"""Failures of a command: one line for the user, and an exit status for scripts."""

from __future__ import annotations

import re

import click

import shmrpc

__all__ = ["CallFailed", "Ended", "Failure", "explain", "failure_of", "one_line", "printable"]

# Everything that would start a new line, make the terminal do something, or is no character at all.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Failure(click.ClickException):
    """Wrong input, or nobody there: ends the command with this line on stderr."""

    exit_code = 2


class CallFailed(click.ClickException):
    """The input was right and what was asked for did not work: ends the command likewise."""

    exit_code = 1


class Ended(BaseException):
    """A signal asked the command to end; it has cleaned up on its way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def one_line(text: str) -> str:
    r"""Make text safe to print as one line: a line break in it shows as ``\n``."""
    return printable(text.strip())


def printable(line: str) -> str:
    """Show control characters as escapes: what others send must not act on the terminal."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], line)


def explain(error: shmrpc.Error) -> str:
    """Say what happened, without the traceback that a remote error's text ends with."""
    if isinstance(error, shmrpc.RemoteError):
        return f"{error.code}: {error.type}: {error.message}"
    return f"{error.code}: {error}"


def failure_of(error: shmrpc.Error) -> click.ClickException:
    """Tell wrong input and missing servers from what went wrong at a server that was there."""
    if isinstance(
        error,
        (
            shmrpc.ConnectError,
            shmrpc.ConnectionLost,
            shmrpc.MethodNotFound,
            shmrpc.ProtocolError,
        ),
    ):
        return Failure(explain(error))
    return CallFailed(explain(error))
