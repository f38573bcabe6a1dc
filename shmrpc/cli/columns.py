"""A table that shows all of its columns whole, however narrow the terminal is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Columns"]

_KEY_MIN = 8


class Columns:
    """Rows of text under a heading. What has no room beside the rest comes below it.

    There it stands beside the first columns again, which say whose figures these are. Where even
    that is too wide, the first column is folded: figures are never cut off.
    """

    def __init__(
        self,
        cells: Sequence[Sequence[str]],
        *,
        title: str = "",
        keys: int = 1,
        left: Collection[str] = (),
    ) -> None:
        """``cells`` begins with the heading; ``left`` names columns of words, beside the first."""
        self._cells = cells
        self._title = title
        self._keys = list(range(keys))
        self._left = left
        columns = list(zip(*cells, strict=True))
        self._wide = [max(map(cell_len, column)) for column in columns]
        self._narrow = [
            max(map(cell_len, [*column[0].split(), *column[1:]]), default=0) for column in columns
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Make the tables for this width."""
        title = self._title
        for columns, widths in self._parts(options.max_width):
            yield self._table(columns, widths, title)
            title = ""

    def _parts(self, width: int) -> list[tuple[list[int], list[int]]]:
        """The columns of each table, and how wide they are."""
        columns = list(range(len(self._wide)))
        for widths in (self._wide, self._narrow):
            if _total(widths) <= width:
                return [(columns, widths)]
        widths = self._narrow.copy()
        others = columns[len(self._keys) :]
        most = max((widths[column] for column in others), default=0)
        too_wide = _total([*(widths[key] for key in self._keys), most]) - width
        widths[0] = max(min(_KEY_MIN, widths[0]), widths[0] - max(too_wide, 0))
        parts = [self._keys.copy()]
        for column in others:
            wanted = [widths[other] for other in [*parts[-1], column]]
            if _total(wanted) > width and len(parts[-1]) > len(self._keys):
                parts.append(self._keys.copy())
            parts[-1].append(column)
        return [(part, [widths[column] for column in part]) for part in parts]

    def _table(self, columns: list[int], widths: list[int], title: str) -> Table:
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
        heading, *rows = self._cells
        for column, width in zip(columns, widths, strict=True):
            name = heading[column]
            is_left = column == 0 or name in self._left
            justify = "left" if is_left else "right"
            table.add_column(name, justify=justify, width=width, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(Text(row[column]) for column in columns))
        return table


def _total(widths: Sequence[int]) -> int:
    """How wide a table of such columns is, with a space on each side of each and between them."""
    return sum(widths) + 3 * len(widths) + 1
