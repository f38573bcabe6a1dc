"""The drawing in docs/large-values.md: latency of an echo against the size of the array."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.large import ECHOERS, SIZES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmrpc.bench.figures import Comparison

DRAWING = Path(__file__).parent.parent / "docs" / "large-values.svg"
_CASES = {f"echo of {size}": nbytes for size, nbytes in SIZES.items()}
_MARKERS = "osD^v"


def draw(comparisons: Iterable[Comparison], path: Path = DRAWING) -> None:
    """Draw the median of each contender's runs, with a bar from the least to the largest."""
    echoes = [comparison for comparison in comparisons if comparison.case in _CASES]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "large", "font.size": 9}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for name, marker in zip(ECHOERS, _MARKERS, strict=True):
            points = [
                (_CASES[comparison.case], runs)
                for comparison in echoes
                if (runs := comparison.values(name, "p50_us"))
            ]
            middles = [median(runs) for _, runs in points]
            below = [middle - min(runs) for middle, (_, runs) in zip(middles, points, strict=True)]
            above = [max(runs) - middle for middle, (_, runs) in zip(middles, points, strict=True)]
            sizes = [size for size, _ in points]
            axes.errorbar(sizes, middles, (below, above), marker=marker, markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(SIZES.values()), list(SIZES))
        axes.set_xlabel("numpy array, written by the client, read by the server and the client")
        axes.set_ylabel("microseconds for an echo, p50")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
