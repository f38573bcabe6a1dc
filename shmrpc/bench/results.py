"""Results as files: JSON as pytest-benchmark writes it. Its tools read ours, and we read its.

A benchmark there has rounds in seconds. Ours are the runs of one contender in one case: the median
latency of each, or the CPU time where nobody called. All figures are in `extra_info`.
"""

from __future__ import annotations

import json
import math
import platform
import socket
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import mean, median, quantiles, stdev
from typing import TYPE_CHECKING, Any

from .figures import Comparison, known

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .limits import Limit
    from .machine import Environment

__all__ = ["ResultsError", "document", "extra_info", "read", "seconds_of", "write"]

_VERSION = "5.0.0"  # of pytest-benchmark's format


class ResultsError(Exception):
    """A file has no results that could be compared."""


def extra_info(comparison: Comparison, contender: str) -> dict[str, Any]:
    """Give all figures of one contender, as they go into the JSON."""
    return {
        "topic": comparison.topic,
        "case": comparison.case,
        "contender": contender,
        "facts": comparison.facts,
        "medians": known(comparison.medians(contender)),
        "runs": [known(run) for run in comparison.runs[contender]],
    }


def seconds_of(comparison: Comparison, contender: str) -> list[float]:
    """Give each run as the seconds that pytest-benchmark compares."""
    metric, scale = (
        ("p50_us", 1e6) if "p50_us" in comparison.runs[contender][0] else ("cpu_ms", 1e3)
    )
    return [value / scale for value in comparison.values(contender, metric)]


def document(
    comparisons: Sequence[Comparison], environment: Environment, limits: Sequence[Limit] = ()
) -> dict[str, Any]:
    """Make the file's contents."""
    return {
        "machine_info": {
            "node": socket.gethostname(),
            "machine": platform.machine(),
            "system": platform.system(),
            "release": platform.release(),
            "python_implementation": platform.python_implementation(),
            "python_version": platform.python_version(),
            **asdict(environment),
            "limits": [asdict(limit) for limit in limits],
        },
        "commit_info": {},
        "benchmarks": [
            _benchmark(comparison, contender)
            for comparison in comparisons
            for contender in comparison.runs
        ],
        "absent": {_id(comparison): comparison.absent for comparison in comparisons},
        "failed": {_id(comparison): comparison.failed for comparison in comparisons},
        "datetime": datetime.now(timezone.utc).isoformat(),
        "version": _VERSION,
    }


def _id(comparison: Comparison) -> str:
    return f"{comparison.topic}: {comparison.case}"


def _benchmark(comparison: Comparison, contender: str) -> dict[str, Any]:
    seconds = seconds_of(comparison, contender)
    name = f"{comparison.topic}[{comparison.case}-{contender}]"
    return {
        "group": _id(comparison),
        "name": name,
        "fullname": f"shmrpc.bench::{name}",
        "params": None,
        "param": None,
        "extra_info": extra_info(comparison, contender),
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": len(seconds)},
        "stats": _statistics(seconds),
    }


def _statistics(data: list[float]) -> dict[str, Any]:
    low, middle, high = quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    fence = 1.5 * (high - low)
    inside = [value for value in data if low - fence <= value <= high + fence]
    deviation = stdev(data) if len(data) > 1 else 0.0
    far = sum(abs(value - mean(data)) > deviation for value in data)
    outside = len(data) - len(inside)
    return {
        "min": min(data),
        "max": max(data),
        "mean": mean(data),
        "stddev": deviation,
        "rounds": len(data),
        "median": median(data),
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": outside,
        "stddev_outliers": far,
        "outliers": f"{far};{outside}",
        "ld15iqr": min(inside, default=middle),
        "hd15iqr": max(inside, default=middle),
        "ops": 1 / mean(data) if mean(data) else 0.0,
        "total": sum(data),
        "data": data,
        "iterations": 1,
    }


def write(path: Path, contents: dict[str, Any]) -> None:
    """Write a results file."""
    path.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> list[Comparison]:
    """Read what was measured, by `shmrpc bench` or by pytest; raises ResultsError or OSError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        found: dict[tuple[str, str], Comparison] = {}
        for entry in entries:
            info = entry["extra_info"]
            if "runs" not in info:  # a benchmark of another kind
                continue
            key = str(info["topic"]), str(info["case"])
            comparison = found.setdefault(key, Comparison(*key, facts=info.get("facts", {})))
            comparison.runs[str(info["contender"])] = [
                {metric: math.nan if value is None else value for metric, value in run.items()}
                for run in info["runs"]
            ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"{path} is no results file of shmrpc bench or pytest-benchmark ({error!r})"
        ) from error
    if not found:
        raise ResultsError(f"{path} has no benchmarks of shmrpc in it")
    return list(found.values())
