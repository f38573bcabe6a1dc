"""Completion of arguments by the shell: which services and methods there are.

Nothing here may complain: what can't be found out has no completions.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from click.shell_completion import CompletionItem

import shmrpc

from .errors import one_line
from .places import live_addresses

if TYPE_CHECKING:
    import click

__all__ = ["complete_address", "complete_method"]

_PATIENCE_SECONDS = 1.0
_PLAIN = re.compile(r"[\w.:/@%+,=-]+")  # names that no shell takes for more than one word


def complete_address(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The services that have a name and live."""
    _ = context, param
    found = []
    with contextlib.suppress(Exception):
        for address, _uid in live_addresses():
            name = address.removeprefix("shm://")
            shown = address if incomplete.startswith("shm:") else name
            if not name.startswith("/") and shown.startswith(incomplete):
                found.append(CompletionItem(shown))
    return found


def complete_method(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The methods of the server whose address is already there."""
    _ = param
    with contextlib.suppress(Exception):
        address = context.params["address"]
        with shmrpc.inspect(address, timeout=_PATIENCE_SECONDS) as inspector:
            return [
                CompletionItem(method["name"], help=_help(method))
                for method in inspector.describe()
                if method["name"].startswith(incomplete) and _PLAIN.fullmatch(method["name"])
            ]
    return []


def _help(method: dict[str, str]) -> str:
    first = method["doc"].partition("\n")[0]
    return one_line(f"{method['signature']} {first}")
