"""The report: one HTML file that needs nothing else, for reading and for handing on."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .tables import notes, rows
from .verdict import conclusions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figures import Comparison
    from .limits import Limit
    from .machine import Environment

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin-top: 2.2rem; } table { border-collapse: collapse; margin: .4rem 0 1rem; }
th, td { padding: .15rem .7rem; text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #888; font-weight: 600; } th:first-child, td:first-child
  { text-align: left; } .wide { overflow-x: auto; } .note { color: #666; font-size: .9em; }
svg { max-width: 100%; height: auto; vertical-align: top; } code { background: #f3f3f3; }
"""
_METHOD = """Every contender ran in processes of its own, in turns with the others; figures are
medians over the runs, and the last column says how far those were apart. Each call wrote, sent and
read the payload on both sides; both sides counted, and the counts agreed. sys/call and wake/call
are system calls and sleeps of both sides; "?" is what this machine lets nobody count."""


def _table(cells: Sequence[Sequence[str]]) -> str:
    heading, *body = cells
    lines = ["<div class=wide><table><thead><tr>"]
    lines += [f"<th>{escape(cell)}</th>" for cell in heading]
    lines.append("</tr></thead><tbody>")
    for row in body:
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def page(
    comparisons: Sequence[Comparison],
    environment: Environment,
    limits: Sequence[Limit],
    drawings: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """Write the report; `drawings` are groups of SVG with a heading each."""
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    busy = " (busy: figures are worse than the machine can)" if environment.busy else ""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>shmrpc bench</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>shmrpc beside its alternatives</h1>",
        f"<p>{escape(environment.description)}<br>{escape(versions)}<br>",
        f"<code>{escape(environment.command)}</code>; load before: ",
        f"{environment.load_before:.2f}{busy}</p>",
        "<h2>In short</h2><ul>",
        *(f"<li>{escape(sentence)}</li>" for sentence in conclusions(comparisons)),
        f"</ul><p class=note>{escape(_METHOD)}</p>",
    ]
    for heading, group in drawings:
        parts += [f"<h2>{escape(heading)}</h2>", *group]
    parts.append("<h2>Figures</h2>")
    for comparison in comparisons:
        parts.append(f"<h3>{escape(comparison.topic)}: {escape(comparison.case)}</h3>")
        cells = rows(comparison)
        if cells:
            parts.append(_table(cells))
        parts += [f"<p class=note>{escape(note)}</p>" for note in notes(comparison)]
    if limits:
        cells = [["", "", "", ""]]
        cells += [[one.name, one.where, f"{one.value:,.2f}", one.unit] for one in limits]
        parts += ["<h2>The machine's limits, from Python</h2>", _table(cells)]
    return "\n".join([*parts, "</body></html>", ""])
