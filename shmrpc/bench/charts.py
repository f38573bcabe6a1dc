"""The report's drawings, as SVG to put into a page. Needs matplotlib, as nothing else here does."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .verdict import SUBJECT, advantage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .figures import Comparison

__all__ = ["draw_all"]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""What would name matplotlib and its site: the report refers to nothing outside."""
_MARKERS = "osD^v<>pP*XhH"


def _svg(name: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    # The salt makes ids unlike those of the page's other drawings, and the same every time.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _series(
    comparisons: Iterable[Comparison], fact: str, metric: str
) -> dict[str, list[tuple[float, float]]]:
    """Collect points (fact, median of the metric) of each contender."""
    series: dict[str, list[tuple[float, float]]] = {}
    for comparison in comparisons:
        for name in comparison.runs:
            value = comparison.medians(name).get(metric, math.nan)
            if value > 0:
                series.setdefault(name, []).append((comparison.facts[fact], value))
    return series


def _lines(axes: Any, series: dict[str, list[tuple[float, float]]], x: str, y: str) -> None:
    for number, (name, points) in enumerate(series.items()):
        ours = name == SUBJECT
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=2.4 if ours else 1.1,
            color="black" if ours else f"C{number % 10}",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)


def _against(
    name: str,
    comparisons: Sequence[Comparison],
    fact: str,
    axes: Sequence[tuple[str, str]],
    label: str,
) -> str:
    """Draw metrics beside each other against a fact, with one legend for all."""

    def draw(figure: Figure) -> None:
        plots = figure.subplots(1, len(axes), squeeze=False)[0]
        for plot, (metric, title) in zip(plots, axes, strict=True):
            _lines(plot, _series(comparisons, fact, metric), label, title)
        handles, names = plots[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False)

    return _svg(name, draw, (5.0 * len(axes) + 1.5, 4.2))


def _bars(comparison: Comparison) -> str:
    """Draw how many times as good as each alternative shared memory was; the line is a draw."""
    others = {
        name: ratio
        for name in comparison.runs
        if name != SUBJECT and not math.isnan(ratio := advantage(comparison, name))
    }
    names = sorted(others, key=others.__getitem__)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(
            names,
            [others[name] - 1 for name in names],
            left=1,
            color=["C0" if others[name] >= 1 else "C3" for name in names],
        )
        axes.bar_label(bars, [f" {others[name]:.2g}x" for name in names], padding=2)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", title=comparison.case, xlabel=f"{SUBJECT} is so many times better")
        axes.margins(x=0.2)

    return _svg(f"bars {comparison.case}", draw, (5.2, 0.9 + 0.26 * len(names)))


def draw_all(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Give the drawings that can be made of what was measured, each group with its heading."""
    groups: list[tuple[str, list[str]]] = []
    sizes = [one for one in comparisons if one.topic == "sizes" and one.runs]
    if len(sizes) > 1:
        metrics = [("p50_us", "p50, us"), ("cpu_us", "CPU time of both sides, us/call")]
        drawing = _against("sizes", sizes, "size", metrics, "payload, bytes")
        groups.append(("Against size, one call at a time", [drawing]))
    inflight = [one for one in comparisons if one.topic == "inflight" and one.runs]
    if len(inflight) > 1:
        metrics = [("calls_per_s", "calls/s"), ("cpu_us", "CPU time of both sides, us/call")]
        drawing = _against("inflight", inflight, "size", metrics, "payload, bytes")
        groups.append(("Against size, many calls in flight", [drawing]))
    rates = [one for one in comparisons if one.topic == "rates" and one.runs]
    if len(rates) > 1:
        metrics = [
            ("p50_us", "p50, us"),
            ("p99_us", "p99, us"),
            ("cpu_us", "CPU time of both sides, us/call"),
        ]
        drawing = _against("rates", rates, "rate", metrics, "calls/s")
        groups.append(("Against rate, coordinated omission corrected", [drawing]))
    bars = [
        _bars(one)
        for one in comparisons
        if SUBJECT in one.runs and len(one.runs) > 1 and one.topic != "idle"
    ]
    if bars:
        groups.append(("Shared memory against each alternative", bars))
    return groups
