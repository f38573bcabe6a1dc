"""``shmrpc bench``: shmrpc beside what people use today, on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shmrpc.bench import contenders, suite
from shmrpc.bench.changes import changes
from shmrpc.bench.harness import Effort
from shmrpc.bench.limits import measure_limits
from shmrpc.bench.machine import environment
from shmrpc.bench.results import ResultsError, document, read, write
from shmrpc.bench.tables import notes, rows
from shmrpc.bench.verdict import conclusions

from .columns import Columns
from .errors import CallFailed, Failure
from .options import check_seconds
from .output import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from shmrpc.bench.changes import Change
    from shmrpc.bench.figures import Comparison
    from shmrpc.bench.limits import Limit
    from shmrpc.bench.machine import Environment

__all__ = ["bench"]

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(name="bench")
@click.argument("topics", nargs=-1, type=click.Choice([*suite.TOPICS, "limits"]))
@click.option("--quick", is_flag=True, help="Is it worth it here? Less than a minute.")
@click.option("-c", "--contender", "names", multiple=True, metavar="NAME", help="Only these.")
@click.option("--runs", type=click.IntRange(1, 1000), help="Of each contender.  [default: 3]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 60),
    callback=check_seconds,
    help="Of each run.  [default: 0.3]",
)
@click.option("--json", "json_file", type=_FILE, help="Write all figures there.")
@click.option("--html", "html_file", type=_FILE, help="Write the report there.")
@click.option("--compare", "old_file", type=_FILE, help="Show what changed since that JSON.")
def bench(
    *,
    topics: tuple[str, ...],
    quick: bool,
    names: tuple[str, ...],
    runs: int | None,
    seconds: float | None,
    json_file: Path | None,
    html_file: Path | None,
    old_file: Path | None,
) -> int:
    """Compare shmrpc with sockets, pipes and other libraries, on this machine.

    Measures those that are installed; `pip install shmrpc[bench]` brings the others. All TOPICS
    take about half an hour.

    \b
    Topics:
      sizes      echo of 64 B to 16 MB, one call at a time
      inflight   the same with 64 calls in flight
      regimes    CPUs shared with others: pairs, clients, a busy process, a busy thread
      rates      100 to 50,000 calls/s, coordinated omission corrected
      idle       what connections cost that nobody uses
      limits     what the machine itself can do

    Exit status: 0 done; 1 something got slower than in --compare, or nothing could be measured; 2
    wrong usage; 130 interrupted.
    """  # noqa: D301 - click wants the character \b itself
    _check(topics, names, quick=quick)
    _check_outputs(json_file, html_file)
    old = _read(old_file) if old_file else []
    out = console()
    here = environment(shlex.join(["shmrpc", *sys.argv[1:]]))
    out.print(here.description, soft_wrap=True)
    if here.busy:
        out.print(f"Busy (load {here.load_before:.2f}): figures are worse than it can.")
    default = suite.QUICK_EFFORT if quick else Effort(runs=3, seconds=0.3)
    effort = Effort(runs or default.runs, seconds or default.seconds, default.warm_up_seconds)
    if quick:
        plans = suite.quick_plans(effort, names or suite.QUICK, asked=bool(names))
    else:
        measured = [topic for topic in topics if topic != "limits"]
        wanted = measured or not topics
        plans = suite.plans(measured, effort, names, asked=bool(names)) if wanted else []
    limits = measure_limits() if "limits" in topics or not (topics or quick) else []
    _print_limits(out, limits)
    comparisons = _measure(out, plans)
    if plans and not any(comparison.runs for comparison in comparisons):
        raise CallFailed("nobody could be measured")
    for sentence in conclusions(comparisons):
        out.print(f"- {sentence}", soft_wrap=True)
    _write(comparisons, here, limits, json_file, html_file)
    return _print_changes(out, changes(old, comparisons)) if old_file else 0


def _check(topics: Sequence[str], names: Sequence[str], *, quick: bool) -> None:
    """Refuse now what would be found out after all the measuring."""
    if quick and topics:
        raise click.UsageError("--quick has topics of its own.")
    unknown = set(names) - set(contenders.names())
    if unknown:
        known = ", ".join(contenders.names())
        raise click.UsageError(
            f"no such contender: {', '.join(sorted(unknown))}. There are {known}"
        )


def _check_outputs(json_file: Path | None, html_file: Path | None) -> None:
    """Likewise: what could not be written in the end."""
    for path in filter(None, (json_file, html_file)):
        place = path if path.exists() else path.parent
        if not place.exists():
            raise Failure(f"can't write {str(path)!r}: there is no directory {str(place)!r}")
        if not os.access(place, os.W_OK):
            raise Failure(f"can't write {str(path)!r}: no permission")
    if html_file:
        try:
            import matplotlib as _  # noqa: ICN001, F401 - only whether it is there
        except ImportError as error:
            raise Failure(
                f"--html draws with matplotlib ({error}): pip install 'shmrpc[bench]'"
            ) from error


def _read(path: Path) -> list[Comparison]:
    try:
        return read(path)
    except ResultsError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"can't read {str(path)!r}: {error.strerror}") from error


def _measure(out: Console, plans: Sequence[suite.Plan]) -> list[Comparison]:
    comparisons = []
    with _progress(out, sum(plan.steps for plan in plans)) as step:
        for plan in plans:
            for comparison in plan.run(step):
                comparisons.append(comparison)
                _print_comparison(out, comparison)
    return comparisons


@contextmanager
def _progress(out: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar if somebody is watching; gives what is to be told of each step."""
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # It is drawn between turns only: a thread that draws would take time from what is measured.
    with Progress(*columns, console=out, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda done: progress.update(task, advance=1, description=done, refresh=True)


def _print_comparison(out: Console, comparison: Comparison) -> None:
    title = f"{comparison.topic}: {comparison.case}"
    cells = rows(comparison)
    if cells:
        out.print(Columns(cells, title=title))
    else:
        out.print(title)
    for note in notes(comparison):
        out.print(f"  {note}", soft_wrap=True)


def _print_limits(out: Console, limits: Sequence[Limit]) -> None:
    if limits:
        cells = [["limit", "where", "", "unit"]]
        cells += [[limit.name, limit.where, f"{limit.value:,.2f}", limit.unit] for limit in limits]
        out.print(Columns(cells, title="The machine, from Python", keys=2, left=["where", "unit"]))


def _write(
    comparisons: Sequence[Comparison],
    here: Environment,
    limits: Sequence[Limit],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    try:
        if json_file:
            write(json_file, document(comparisons, here, limits))
        if html_file:
            from shmrpc.bench.charts import draw_all
            from shmrpc.bench.page import page

            text = page(comparisons, here, limits, draw_all(comparisons))
            html_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failure(f"can't write {str(error.filename)!r}: {error.strerror}") from error


def _print_changes(out: Console, found: Sequence[Change]) -> int:
    """Show what left the noise; returns the exit status."""
    cells = [["case", "contender", "metric", "before", "now", "noise", ""]]
    for change in found:
        if change.verdict != "same":
            unit = " / raw-uds" if change.relative else ""
            cells.append(
                [
                    f"{change.topic}: {change.case}",
                    change.contender,
                    change.metric + unit,
                    f"{change.old:,.2f}",
                    f"{change.new:,.2f}",
                    f"{change.noise:.0%}",
                    change.verdict,
                ]
            )
    if len(cells) > 1:
        out.print(
            Columns(
                cells,
                title="Changes beyond the noise",
                keys=2,
                left=["contender", "metric"],
            )
        )
    slower = sum(change.verdict == "slower" for change in found)
    out.print(f"{len(found)} figures compared, {len(cells) - 1} beyond the noise, {slower} slower.")
    return 1 if slower else 0
