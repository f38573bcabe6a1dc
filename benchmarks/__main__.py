"""`python -m benchmarks [TOPIC ...]`: every topic in brief, as tables, within three minutes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import bench_bytes, event_loops, large, topics
from benchmarks.report import machine, policy_table, table, verdict_table
from benchmarks.targets import judge
from shmrpc.bench.figures import as_json
from shmrpc.bench.harness import Effort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmrpc.bench.figures import Comparison


def _unary(effort: Effort) -> Iterator[Comparison]:
    for place in _places():
        yield topics.unary(effort, place)


def _layer(effort: Effort) -> Iterator[Comparison]:
    for place in _places():
        yield topics.layer(effort, place)


def _sidecar(effort: Effort) -> Iterator[Comparison]:
    for place in _places():
        yield topics.sidecar(effort, place)


def _threads(effort: Effort) -> Iterator[Comparison]:
    yield topics.threads(effort)


def _pairs(effort: Effort) -> Iterator[Comparison]:
    for count in topics.PAIR_COUNTS:
        yield topics.pairs(effort, count)


def _streams(effort: Effort) -> Iterator[Comparison]:
    for direction in topics.DIRECTIONS:
        for place in _places():
            yield topics.streams(effort, direction, place)


def _idle(_: Effort) -> Iterator[Comparison]:
    yield topics.idle()


def _places() -> list[str]:
    cpus = len(os.sched_getaffinity(0))
    return [place for place in topics.PLACES if topics.cpus_wanted(place) <= cpus]


def _bytes(effort: Effort) -> Iterator[Comparison]:
    yield bench_bytes.compare(effort)


def _large(effort: Effort) -> Iterator[Comparison]:
    yield from large.compare(effort, large.SOME_SIZES)


_TOPICS: dict[str, Callable[[Effort], Iterator[Comparison]]] = {
    "unary": _unary,
    "layer": _layer,
    "sidecar": _sidecar,
    "threads": _threads,
    "pairs": _pairs,
    "streams": _streams,
    "bytes": _bytes,
    "large": _large,
    "idle": _idle,
    "aio": event_loops.compare,
    "policy": topics.policy,
}
_DEFAULT = [name for name in _TOPICS if name not in {"aio", "policy"}]  # each takes minutes


def main() -> None:
    """Measure the topics that were asked for and print what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "topic", nargs="*", help=f"any of {', '.join(_TOPICS)}; all but aio and policy by default"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each contender (default: 3)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each run (default: 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    options = parser.parse_args()
    unknown = set(options.topic) - set(_TOPICS)
    if unknown:
        parser.error(f"no such topic: {', '.join(sorted(unknown))}")
    effort = Effort(options.runs, options.seconds)
    print(machine())
    comparisons = []
    for name in options.topic or _DEFAULT:
        for comparison in _TOPICS[name](effort):
            print(f"\n{table(comparison)}", flush=True)
            comparisons.append(comparison)
    verdicts = [verdict for comparison in comparisons for verdict in judge(comparison)]
    usual = [verdict for verdict in verdicts if verdict.target.topic != "policy"]
    if usual or not verdicts:
        print(f"\n{verdict_table(usual)}")
    if policy := [verdict for verdict in verdicts if verdict.target.topic == "policy"]:
        print(f"\n{policy_table(policy)}")
    if options.json:
        figures = {"machine": machine(), "comparisons": [*map(as_json, comparisons)]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
