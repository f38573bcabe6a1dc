"""`pytest benchmarks`: how long to measure, and what is said at the end beside the usual table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.replay import CLOCK, replay
from benchmarks.report import machine, table, verdict_table
from benchmarks.targets import judge
from benchmarks.topics import cpus_wanted
from shmrpc.bench.harness import Effort

if TYPE_CHECKING:
    from benchmarks.replay import Record
    from shmrpc.bench.figures import Comparison

_COMPARISONS = pytest.StashKey[list["Comparison"]]()
_MACHINE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shmrpc benchmarks")
    group.addoption("--bench-runs", type=int, default=Effort.runs, help="runs of each contender")
    group.addoption("--bench-seconds", type=float, default=Effort.seconds, help="of each run")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COMPARISONS] = []
    config.stash[_MACHINE] = machine()
    saving = ("benchmark_save", "benchmark_autosave", "benchmark_json")
    if not any(getattr(config.option, option, None) for option in saving):
        config.option.benchmark_save = "shmrpc"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let our clock time the benchmarks, and no timeout of the tests cut them short."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    comparisons = config.stash[_COMPARISONS]
    if not comparisons:
        return
    terminalreporter.section("shmrpc benchmarks")
    terminalreporter.line(config.stash[_MACHINE])
    for comparison in comparisons:
        terminalreporter.line(f"\n{table(comparison)}")
    verdicts = [verdict for comparison in comparisons for verdict in judge(comparison)]
    terminalreporter.line(f"\n{verdict_table(verdicts)}")


@pytest.fixture(scope="session")
def effort(pytestconfig: pytest.Config) -> Effort:
    """How long to measure."""
    return Effort(
        runs=pytestconfig.getoption("--bench-runs"),
        seconds=pytestconfig.getoption("--bench-seconds"),
    )


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> str:
    """Where the two sides run; a module that asks for it is parametrized with `topics.PLACES`."""
    wanted: str = request.param
    if len(os.sched_getaffinity(0)) < cpus_wanted(wanted):
        pytest.skip(f"{wanted}: not so many CPUs here")
    return wanted


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Record:
    """Give a contender's part of a comparison to pytest-benchmark, by the metric it is to show."""

    def take(comparison: Comparison, contender: str, metric: str) -> None:
        if comparison not in pytestconfig.stash[_COMPARISONS]:
            pytestconfig.stash[_COMPARISONS].append(comparison)
        if contender in comparison.absent:
            pytest.skip(f"{contender} is not here: {comparison.absent[contender]}")
        if contender in comparison.failed:
            pytest.fail(comparison.failed[contender])
        replay(benchmark, comparison, contender, metric)

    return take
