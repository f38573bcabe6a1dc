"""Tables and numbers on the terminal, or in the pipe that takes its place."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["console", "count", "duration", "microseconds", "seconds_text", "size_text"]

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


def count(value: float | None, *, grouped: bool = True) -> str:
    """Return a whole number, or a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if grouped else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Return a time of seconds to days as people say it: 12s, 3m20s, 5h07m, 2d04h."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def seconds_text(seconds: float | None) -> str:
    """Return a time of microseconds to seconds with its unit."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def size_text(nbytes: float) -> str:
    """Return a number of bytes with its unit: 512 B, 64 KiB, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"
