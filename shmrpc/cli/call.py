"""``shmrpc call``: one call from the shell."""

from __future__ import annotations

import sys
from typing import Any

import click

import shmrpc

from .errors import CallFailed, Failure, explain, failure_of, printable
from .options import check_address, check_seconds
from .values import parse_json, show_json

__all__ = ["call"]

_CONNECT_SECONDS = 5.0
_SHOWN_MAX = 60
# Keywords that Client.call takes for itself.
_RESERVED = ("timeout", "metadata")


# Unknown options are taken for arguments, so that -1 is a number; _value tells the two apart.
@click.command(name="call", context_settings={"ignore_unknown_options": True})
@click.argument("address", callback=check_address)
@click.argument("method")
@click.argument("json_arguments", metavar="[JSON]...", nargs=-1)
@click.option(
    "keywords",
    "-k",
    "--keyword",
    metavar="KEY=JSON",
    multiple=True,
    help="A keyword argument. May be repeated.",
)
@click.option(
    "--timeout",
    type=float,
    callback=check_seconds,
    metavar="SECONDS",
    help="Give up after so many seconds, connecting included. Default: 5 seconds to connect, "
    "no limit for the call.",
)
@click.option("--traceback", is_flag=True, help="Show the handler's traceback if it raised.")
def call(
    *,
    address: str,
    method: str,
    json_arguments: tuple[str, ...],
    keywords: tuple[str, ...],
    timeout: float | None,
    traceback: bool,
) -> None:
    """Call METHOD of the server at ADDRESS and print its result as JSON.

    Each argument is JSON, so text needs quotes of its own: '"text"'. What JSON has no notation for
    is written, and shown, as an object with one key:

    \b
      {"$bytes": "aGVsbG8="}          bytes, in base64
      {"$float": "nan"}               nan, inf and -inf
      {"$map": [[1, "a"], [2, "b"]]}  a map with keys that are no strings

    \b
    Examples:
      shmrpc call calc add 1 2
      shmrpc call calc greet '"World"' -k polite=true
      shmrpc call tcp://127.0.0.1:7001 store '{"$bytes": "aGVsbG8="}' --timeout 2

    Exit status: 0 with a result; 1 when the server was reached and the call failed (the error's
    code, type and message are on stderr); 2 for wrong input, an unknown method, or no connection.
    """  # noqa: D301 - click wants the character \b itself
    args = [_value(f"argument {n}", text) for n, text in enumerate(json_arguments, 1)]
    kwargs = _keywords(keywords)
    patience = _CONNECT_SECONDS if timeout is None else min(timeout, _CONNECT_SECONDS)
    try:
        with shmrpc.connect(address, timeout=patience) as client:
            result = client.call(method, *args, timeout=timeout, **kwargs)
    except shmrpc.RemoteError as error:
        raise _remote_failure(error, show_traceback=traceback) from error
    except shmrpc.Error as error:
        raise failure_of(error) from error
    except (TypeError, ValueError, RecursionError) as error:  # what can't be sent
        raise Failure(str(error)) from error
    _print(result)


def _value(label: str, text: str) -> Any:
    """Parse one argument, or say which one was wrong and why."""
    try:
        return parse_json(text)
    except ValueError as error:
        if text.startswith("-"):
            raise click.NoSuchOption(text, ctx=click.get_current_context()) from error
        shown = text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
        bare_word = text[:1].isalpha() and "expecting value" in str(error)
        hint = "; text needs quotes: '\"text\"'" if bare_word else ""
        msg = f"{label} is not valid JSON: {error}: {shown}{hint}"
        raise Failure(msg) from error


def _keywords(texts: tuple[str, ...]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise Failure(f"keyword {text!r}: expected KEY=JSON")
        if key in kwargs:
            raise Failure(f"keyword {key!r} is given twice")
        if key in _RESERVED:
            raise Failure(f"keyword {key!r} is the client's own and can't be sent")
        kwargs[key] = _value(f"keyword {key!r}", value)
    return kwargs


def _remote_failure(error: shmrpc.RemoteError, *, show_traceback: bool) -> CallFailed:
    message = explain(error)
    if error.details is not None:
        message += f" (details: {show_json(error.details)})"
    if show_traceback:
        lines = error.remote_traceback.splitlines() or ["(the server sent no traceback)"]
        click.echo("\n".join(map(printable, lines)), err=True)
    return CallFailed(message)


def _print(result: Any) -> None:
    try:
        text = show_json(result)
    except RecursionError as error:
        raise CallFailed("the result is nested too deeply to be shown") from error
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = show_json(result, ascii_only=True)
    click.echo(text)
