"""Measures contenders against each other, in turns and in processes of their own.

Every contender has its processes from the start to the end of a comparison, and every run has a
connection of its own: between its turns a server waits for the next one, and disturbs nobody.
Runs are interleaved (A, B, C, A, B, C ...), because a machine is not the same a second later.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from .contenders import UnsupportedError, why_absent
from .team import Crowd, Effort, Load, Peer, PeerError, Placement, Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .figures import Comparison

    Step = Callable[[str], None]
    """Told what was just done, for who shows progress."""

__all__ = [
    "Crowd",
    "Effort",
    "Load",
    "PeerError",
    "Placement",
    "compare",
    "compare_flows",
    "compare_loads",
    "compare_quiet",
    "compare_rows",
]


class _Teams:
    """The contenders that are still in it, and the rows of a comparison that each one fills."""

    def __init__(self, rows: Mapping[str, Sequence[str]], step: Step | None = None) -> None:
        self._rows = rows
        self._step = step
        self._stack = ExitStack()
        self._teams: dict[str, Team] = {}
        self._out: dict[str, str] = {}
        self._absent: dict[str, str] = {}

    def __enter__(self) -> _Teams:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, placement: Placement, crowd: Crowd, *, disturbed: bool = False) -> None:
        for name in self._rows:
            reason = why_absent(name)
            if reason is not None:
                self._absent[name] = reason
                continue
            try:
                self._teams[name] = Team(name, placement, crowd)
            except UnsupportedError as error:
                self._absent[name] = str(error)
            except (PeerError, OSError) as error:
                self._out[name] = str(error)
            else:
                self._stack.callback(self._teams[name].close)
        if disturbed:
            other = Peer("disturb")
            self._stack.callback(other.reap)
            self._stack.callback(other.end)
            other.answer()

    def each(self, comparison: Comparison, action: Callable[[str, Team], None]) -> None:
        """Do it with every team in turn; who fails is out, and ended before the next one's turn.

        Who does not have what is measured is absent from this comparison only.
        """
        for name in self._rows:
            if name in self._teams and not self._is_absent(comparison, name):
                self._do(comparison, name, action)
        for name, rows in self._rows.items():
            for row in rows:
                if name in self._absent:
                    comparison.absent[row] = self._absent[name]
                if name in self._out:
                    comparison.failed[row] = self._out[name]
                    comparison.runs.pop(row, None)

    def _is_absent(self, comparison: Comparison, name: str) -> bool:
        return any(row in comparison.absent for row in self._rows[name])

    def _do(self, comparison: Comparison, name: str, action: Callable[[str, Team], None]) -> None:
        team = self._teams[name]
        try:
            try:
                action(name, team)
            except UnsupportedError as error:
                for row in self._rows[name]:
                    comparison.absent[row] = str(error)
                    comparison.runs.pop(row, None)
                team.hang_up()
        except (PeerError, OSError) as error:
            del self._teams[name]
            self._out[name] = team.explain(error)
            team.close()
        if self._step:
            self._step(f"{comparison.topic}: {comparison.case}: {name}")


def compare(
    comparison: Comparison,
    contenders: Sequence[str],
    effort: Effort,
    placement: Placement,
    crowd: Crowd,
    load: Load | None = None,
    *,
    disturbed: bool = False,
    step: Step | None = None,
) -> Comparison:
    """Measure the contenders run by run into `comparison`.

    With `disturbed` one more process keeps a CPU busy.
    """
    cases = [(comparison, load or Load())]
    for _ in compare_loads(
        cases, contenders, effort, placement, crowd, disturbed=disturbed, step=step
    ):
        pass
    return comparison


def compare_loads(
    cases: Sequence[tuple[Comparison, Load]],
    contenders: Sequence[str],
    effort: Effort,
    placement: Placement,
    crowd: Crowd,
    *,
    disturbed: bool = False,
    step: Step | None = None,
) -> Iterator[Comparison]:
    """Measure the contenders under several loads, with the same processes; gives each when done."""
    with _Teams({name: (name,) for name in contenders}, step) as teams:
        teams.start(placement, crowd, disturbed=disturbed)
        for comparison, load in cases:
            _measure_load(teams, comparison, load, effort)
            yield comparison


def _measure_load(teams: _Teams, comparison: Comparison, load: Load, effort: Effort) -> None:
    def run(name: str, team: Team) -> None:
        figures = team.run(effort, load)
        comparison.runs.setdefault(name, []).append(figures)

    def count(name: str, team: Team) -> None:
        system_calls = team.count_system_calls(load)
        for figures in comparison.runs.get(name, ()):
            figures["system_calls"] = system_calls

    for _ in range(effort.runs):
        teams.each(comparison, run)
    teams.each(comparison, count)


def compare_flows(
    comparison: Comparison,
    direction: str,
    flows: Mapping[str, Sequence[str]],
    effort: Effort,
    placement: Placement,
) -> Comparison:
    """As `compare`, with several flows of each contender, in each run over one connection."""
    rows = {name: [f"{name} {flow}" for flow in chosen] for name, chosen in flows.items()}

    def run(name: str, team: Team) -> None:
        measured = team.run_flows(effort, direction, flows[name])
        for row, figures in zip(rows[name], measured, strict=True):
            comparison.runs.setdefault(row, []).append(figures)

    with _Teams(rows) as teams:
        teams.start(placement, Crowd())
        for _ in range(effort.runs):
            teams.each(comparison, run)
    return comparison


def compare_rows(
    comparison: Comparison,
    rows: Mapping[str, Mapping[str, Load]],
    effort: Effort,
    placement: Placement,
) -> Comparison:
    """As `compare`, with several loads of each contender, in each run one after the other.

    `rows` has the rows that a contender fills, and the load of each.
    """

    def run(name: str, team: Team) -> None:
        for row, load in rows[name].items():
            figures = team.run(effort, load)
            del figures["system_calls"]  # which are counted in runs of their own, if at all
            comparison.runs.setdefault(row, []).append(figures)

    with _Teams({name: list(loads) for name, loads in rows.items()}) as teams:
        teams.start(placement, Crowd())
        for _ in range(effort.runs):
            teams.each(comparison, run)
    return comparison


def compare_quiet(
    comparison: Comparison,
    contenders: Sequence[str],
    quiet_seconds: float,
    crowd: Crowd | None = None,
    *,
    step: Step | None = None,
) -> Comparison:
    """Measure what connected pairs burn while nobody calls, all contenders in the same seconds.

    And what memory a connection takes, where there are many: their first call is behind them then.
    """
    crowd = crowd or Crowd()
    before: dict[str, int] = {}

    def call(name: str, team: Team) -> None:
        team.connect(1)
        team.measure(Effort(seconds=0.2), Load())
        more = crowd.connections - 1
        if more:
            before[name] = team.memory_bytes()
            team.connect(more)
            team.greet()

    def fall_silent(name: str, team: Team) -> None:
        team.begin_rest(quiet_seconds)

    def read(name: str, team: Team) -> None:
        figures = {"cpu_ms": team.end_rest(quiet_seconds) / 1e6}
        if name in before:
            used = team.memory_bytes() - before[name]
            figures["connection_kib"] = used / 1024 / (crowd.connections - 1)
        comparison.runs[name] = [figures]

    with _Teams({name: (name,) for name in contenders}, step) as teams:
        teams.start(Placement(), crowd)
        for action in (call, fall_silent, read):
            teams.each(comparison, action)
    return comparison
