"""Tables and numbers on the terminal, or in the pipe that takes its place."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["console", "microseconds"]

_PIPE_COLUMNS = 250  # no table is that wide; in a pipe nothing may be cut off or wrapped


def console() -> Console:
    """Return a console for stdout. Words are printed as they are, without markup or colouring."""
    return Console(
        width=None if sys.stdout.isatty() else _PIPE_COLUMNS,
        highlight=False,
        markup=False,
        emoji=False,
    )


def microseconds(seconds: float) -> str:
    """Return a duration in microseconds with three digits that mean something."""
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
