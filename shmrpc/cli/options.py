"""Checks of arguments and options that several commands take, for click's ``callback=``."""

from __future__ import annotations

import math

import click

import shmrpc
from shmrpc import address as addresses

__all__ = ["check_address", "check_addresses", "check_interval", "check_seconds"]


def check_address(context: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse an address that can't be understood."""
    _ = context, param
    try:
        addresses.parse(value)
    except shmrpc.ConnectError as error:
        raise click.BadParameter(str(error)) from error
    return value


def check_addresses(
    context: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """The same for any number of them."""
    return tuple(check_address(context, param, value) for value in values)


def check_seconds(
    context: click.Context, param: click.Parameter, value: float | None
) -> float | None:
    """Refuse what is no time limit. nan and inf are floats too, and mean nothing here."""
    _ = context, param
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value:g} is not a positive number of seconds.")
    return value


def check_interval(context: click.Context, param: click.Parameter, value: float) -> float:
    """As ``check_seconds``, but no time at all is fine."""
    _ = context, param
    if not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value:g} is not a number of seconds from 0 on.")
    return value
