"""``shmrpc call``: one call from the shell, of any kind."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import click

import shmrpc

from .completing import complete_address, complete_method
from .errors import CallFailed, Failure, explain, failure_of, printable
from .options import check_address, check_seconds
from .values import parse_json, read_json, show_json

if TYPE_CHECKING:
    from shmrpc.calls import Call

__all__ = ["call"]

_CONNECT_SECONDS = 5.0
_SHOWN_MAX = 60
# Keywords that Client.call takes for itself.
_RESERVED = ("timeout", "metadata")
_BUILT_IN = ("shmrpc.describe", "shmrpc.health", "shmrpc.stats")
_Argument = tuple[Any] | None  # None: what is on standard input


# Unknown options are taken for arguments, so that -1 is a number; _value tells the two apart.
@click.command(name="call", context_settings={"ignore_unknown_options": True})
@click.argument("address", callback=check_address, shell_complete=complete_address)
@click.argument("method", shell_complete=complete_method)
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

    A method that streams its results has each of them on a line, as soon as it comes.

    Each argument is JSON, so text needs quotes of its own: '"text"'. What JSON has no notation for
    is written, and shown, as an object with one key:

    \b
      {"$bytes": "aGVsbG8="}          bytes, in base64
      {"$float": "nan"}               nan, inf and -inf
      {"$map": [[1, "a"], [2, "b"]]}  a map with keys that are no strings

    The argument - stands for standard input: the JSON values there, one after the other, are
    arguments in its place. A method that takes a stream always gets those as its messages, and
    each as soon as its line is complete.

    What begins with shmrpc. is asked of the server itself, which answers also while its handlers
    are busy or stuck: shmrpc.health, shmrpc.stats, shmrpc.describe.

    \b
    Examples:
      shmrpc call calc add 1 2
      shmrpc call calc greet '"World"' -k polite=true
      jq -c '.[]' numbers.json | shmrpc call calc total -
      shmrpc call calc shmrpc.describe '"add"'
      shmrpc call tcp://127.0.0.1:7001 store '{"$bytes": "aGVsbG8="}' --timeout 2

    Exit status: 0 with a result; 1 when the server was reached and the call failed (the error's
    code, type and message are on stderr); 2 for wrong input, an unknown method, or no connection.
    """  # noqa: D301 - click wants the character \b itself
    texts = [
        None if text == "-" else (_value(f"argument {n}", text),)
        for n, text in enumerate(json_arguments, 1)
    ]
    kwargs = _keywords(keywords)
    patience = _CONNECT_SECONDS if timeout is None else min(timeout, _CONNECT_SECONDS)
    try:
        if method in _BUILT_IN and not kwargs:
            _inspect(address, method, texts, timeout or _CONNECT_SECONDS)
            return
        with shmrpc.connect(address, timeout=patience) as client:
            _call(client, method, texts, kwargs, timeout)
    except shmrpc.RemoteError as error:
        raise _remote_failure(error, show_traceback=traceback) from error
    except shmrpc.Error as error:
        raise failure_of(error) from error
    except (TypeError, ValueError, RecursionError) as error:  # what can't be sent
        raise Failure(str(error)) from error


def _inspect(address: str, method: str, texts: list[_Argument], timeout: float) -> None:
    """What the server tells of itself, without waiting for a worker."""
    args = _arguments(texts)
    with shmrpc.inspect(address, timeout=timeout) as inspector:
        if method == "shmrpc.describe" and len(args) < 2:
            _print(inspector.describe(*args))
        elif not args:
            stats = method == "shmrpc.stats"
            _print(inspector.stats() if stats else {"status": inspector.health()})
        else:
            raise Failure(f"{method} takes fewer than {len(args)} arguments")


def _call(
    client: shmrpc.Client,
    method: str,
    texts: list[_Argument],
    kwargs: dict[str, Any],
    timeout: float | None,
) -> None:
    known = _describe(client, method, timeout)
    if known.get("requests"):
        if texts.count(None) > 1 or None in texts[:-1]:
            raise Failure("the messages on standard input (-) come after the arguments")
        args = _arguments([text for text in texts if text is not None])
        with client.open(method, *args, timeout=timeout, **kwargs) as call:
            _converse(call, streams=bool(known.get("streams")))
        return
    args = _arguments(texts)
    if known.get("streams"):
        for item in client.stream(method, *args, timeout=timeout, **kwargs):
            _print(item)
    else:
        _print(client.call(method, *args, timeout=timeout, **kwargs))


def _describe(client: shmrpc.Client, method: str, timeout: float | None) -> dict[str, Any]:
    """What kind of call this is; a server in another language may not tell."""
    try:
        known = client.call("shmrpc.describe", method, timeout=timeout)
    except shmrpc.MethodNotFound:
        return {}
    return known if isinstance(known, dict) else {}


def _converse(call: Call, *, streams: bool) -> None:
    """Send what comes on standard input, and print what comes back meanwhile."""
    failures: list[BaseException] = []

    def send() -> None:
        try:
            for value in read_json(sys.stdin):
                call.send(value)
            call.close_send()
        except shmrpc.Error:  # the call has ended, which is told below
            pass
        except BaseException as error:
            failures.append(error)
            call.cancel()

    # A daemon: standard input may never end, but the call does.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        if streams:
            for item in call:
                _print(item)
        else:
            # Until the call has ended, however it did: result() would end our sending at once.
            with contextlib.suppress(shmrpc.Error, StopIteration):
                next(call)
            _print(call.result())
    except shmrpc.Cancelled:
        if not failures:
            raise
    if failures:
        raise Failure(f"standard input: {failures[0]}") from failures[0]


def _arguments(texts: list[_Argument]) -> list[Any]:
    """The arguments, with what is on standard input in the place of ``-``."""
    args: list[Any] = []
    for text in texts:
        if text is not None:
            args += text
            continue
        try:
            args += read_json(sys.stdin)
        except ValueError as error:
            raise Failure(f"standard input: {error}") from error
    return args


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
    sys.stdout.flush()
