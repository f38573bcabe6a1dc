"""The benchmarks measure what they say: nobody cheats, nothing is lost, noise is no change."""

import json
import math
import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import Process, short_directory

from shmrpc.bench import contenders, limits, suite, usage
from shmrpc.bench.changes import changes
from shmrpc.bench.charts import draw_all
from shmrpc.bench.figures import Comparison, Window, combine
from shmrpc.bench.harness import (
    Crowd,
    Effort,
    Load,
    Placement,
    compare,
    compare_loads,
    compare_quiet,
    compare_rows,
)
from shmrpc.bench.machine import Environment
from shmrpc.bench.pace import paced_laps
from shmrpc.bench.page import page
from shmrpc.bench.results import ResultsError, document, read, write
from shmrpc.bench.tables import notes, rows
from shmrpc.bench.verdict import conclusions
from shmrpc.bench.work import PAYLOAD, WrongPayloadError, answer, answered, pattern

COMMAND = [sys.executable, "-m", "shmrpc.cli", "bench"]
BRIEF = Effort(runs=1, seconds=0.05, warm_up_seconds=0.02)
HERE = Environment("a machine", "shmrpc bench <it>", {"shmrpc": "1"}, 0.1)
INSTALLED = {
    *("shm", "unix", "tcp", "shm-aio", "unix-aio", "shm-uvloop"),
    *("raw-uds", "raw-tcp", "asyncio", "uvloop", "mp-pipe", "mp-queue", "grpcio", "grpcio-aio"),
}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """Cheats are contenders too, here."""
    monkeypatch.setattr(contenders, "_HOMES", dict(contenders._HOMES))
    for name in ("LIAR", "SHORTENER", "FORGER", "DYING", "SLOW"):
        contenders.register(name.lower(), f"bench_contenders:{name}")
    contenders.register("nowhere", "no_such_module_anywhere:IT")


def measure(names, load=None, crowd=None, effort=BRIEF):
    comparison = Comparison("t", "c")
    return compare(comparison, names, effort, Placement(), crowd or Crowd(), load)


# ---- the harness ----


def test_cheats_are_found_out_and_the_others_measured():
    found = measure(["liar", "raw-uds", "shortener", "forger", "dying", "nowhere"])
    assert set(found.runs) == {"raw-uds"}
    assert "replies, its servers gave" in found.failed["liar"]
    assert "WrongPayloadError: 8 bytes arrived" in found.failed["shortener"]
    assert "not those that were sent" in found.failed["forger"]
    assert "(serve) ended with status -9" in found.failed["dying"]
    assert "no_such_module_anywhere" in found.absent["nowhere"]
    assert any("nowhere: not here" in note for note in notes(found))


CASES = {
    "small": Load(),
    "large": Load(300_000),
    "window": Load(300_000, depth=8),
}


def measure_cases(chosen, *cases):
    loads = [(Comparison("t", case), CASES[case]) for case in cases]
    return list(compare_loads(loads, chosen, BRIEF, Placement(), Crowd()))


@pytest.mark.thorough
@pytest.mark.timeout(180)
def test_contenders_move_all_bytes_of_all_sizes():
    small, large, window = measure_cases(sorted(INSTALLED), *CASES)
    assert set(small.runs) == INSTALLED, small
    assert set(large.runs) == INSTALLED, large
    assert set(window.runs) == INSTALLED - {"mp-pipe"}, window
    assert window.absent == {"mp-pipe": "one call at a time"}
    for (figures,) in small.runs.values():
        assert figures["p50_us"] <= figures["p99_us"] <= figures["p999_us"]
        assert figures["calls_per_s"] > 0
        assert figures["cpu_us"] == figures["client_cpu_us"] + figures["server_cpu_us"]
        assert math.isnan(figures["system_calls"]) or figures["system_calls"] >= 0


@pytest.mark.thorough
@pytest.mark.timeout(180)
def test_contenders_of_the_extra_work_or_are_missing():
    cheats = {"liar", "shortener", "forger", "dying", "slow", "nowhere"}
    chosen = set(contenders.names()) - INSTALLED - cheats
    assert {"pyzmq", "iceoryx2-poll", "iceoryx2-event", "pynng", "thriftpy2", "rpyc"} <= chosen
    missing = {name for name in chosen if contenders.why_absent(name)}
    for comparison in measure_cases(sorted(chosen), "small", "window"):
        assert not comparison.failed, comparison
        assert missing <= set(comparison.absent)
        assert set(comparison.runs) | set(comparison.absent) == chosen


def test_several_loads_of_one_contender():
    loads = {"one": Load(), "three": Load(depth=3, connections=3)}
    chosen = {"shm-aio": loads, "nowhere": {"nothing": Load()}}
    found = compare_rows(Comparison("t", "c"), chosen, Effort(2, 0.1, 0.05), Placement())
    assert set(found.runs) == {"one", "three"}, found
    assert set(found.absent) == {"nothing"}
    assert all(figures["calls_per_s"] > 0 for runs in found.runs.values() for figures in runs)


@pytest.mark.parametrize("name", ["shm-aio", "asyncio"])
def test_memory_of_a_connection(name):
    crowd = Crowd(connections=20)
    found = compare_quiet(Comparison("t", "c"), [name], 0.1, crowd)
    (figures,) = found.runs[name]
    assert 0 < figures["connection_kib"] < (1000 if name == "shm-aio" else 100)
    assert figures["connection_kib"] > (128 if name == "shm-aio" else 0), "two rings of 64 KiB"


@pytest.mark.parametrize("name", ["shm", "raw-uds"])
def test_crowds_are_counted_once(name):
    found = measure([name], crowd=Crowd(pairs=2, clients=2), effort=Effort(2, 0.1, 0.05))
    assert not found.failed
    for figures in found.runs[name]:
        assert figures["server_cpu_us"] > 0
    threads = measure([name], crowd=Crowd(threads=3))
    assert name in threads.runs, threads


def test_others_that_compute_are_there_and_leave():
    found = compare(
        Comparison("t", "c"),
        ["shm", "raw-uds"],
        BRIEF,
        Placement(),
        Crowd(),
        Load(gil=True),
        disturbed=True,
    )
    assert set(found.runs) == {"shm", "raw-uds"}
    # no_leaks sees whether the process that computed has left


def test_silence_is_measured_over_many_connections():
    found = compare_quiet(
        Comparison("idle", "c"), ["shm", "raw-uds", "shm-aio"], 0.2, Crowd(connections=20)
    )
    assert set(found.runs) == {"shm", "raw-uds", "shm-aio"}, found
    assert all(run[0]["cpu_ms"] >= 0 for run in found.runs.values())


def test_a_slow_reply_makes_the_calls_behind_it_late_too():
    found = measure(["slow"], Load(rate=200), effort=Effort(1, 0.5, 0.05))
    # One call in ten sleeps for 50 ms, in which ten more become due: more than half are late.
    assert found.runs["slow"][0]["p50_us"] > 5_000


# ---- the work ----


def test_the_answer_reads_every_byte():
    before = answered()
    for size in (0, 1, 64, 70_000):
        assert answer(pattern(size)) == pattern(size)
        for position in {0, size // 2, size - 1} - {-1} if size else ():
            wrong = bytearray(pattern(size))
            wrong[position] ^= 1
            with pytest.raises(WrongPayloadError):
                answer(bytes(wrong))
    assert answered() == before + 4
    assert answered() == before + 4


SLEEPER = """
import sys, time
sys.stdin.readline()
for _ in range(50):
    time.sleep(0.001)
print(flush=True)
sys.stdin.readline()
"""


def test_usage_counts_sleeps_and_system_calls():
    command = [sys.executable, "-c", SLEEPER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Process(command, **pipes) as process:
        meter = usage.Meter(process.pid, system_calls=True)
        meter.begin()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        used = meter.end()
        process.stdin.close()
    assert used.wakeups >= 50
    assert used.server_cpu_ns > 0
    assert math.isnan(used.system_calls) or used.system_calls >= 50


# ---- pace ----


class Clock:
    """Time passes only when somebody says so."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


def paced(durations, *, interval=100, stop=1000, oversleep=(), now=0):
    """Run paced calls that take the given times; gives the laps and when each call began."""
    clock = Clock()
    clock.now = now
    durations, oversleep = iter(durations), iter(oversleep)
    begun = []

    def echo(payload):
        begun.append(clock.now)
        clock.now += next(durations)
        return payload

    def wait(due):
        clock.now = max(clock.now, due) + next(oversleep, 0)
        return clock.now, 1

    return paced_laps(echo, PAYLOAD, interval, 0, stop, wait, clock), begun


def test_paced_calls_begin_when_they_are_due():
    laps, begun = paced([10] * 10)
    assert begun == list(range(0, 1000, 100))
    assert list(laps.samples) == [10] * 10
    assert (laps.calls, laps.elapsed_ns, laps.waiting_cpu_ns) == (10, 1000, 9)


def test_coordinated_omission_is_corrected():
    laps, begun = paced([10, 10, 350, 10, 10, 10, 10, 10, 10, 10])
    # The third was due at 200 and is done at 550; those due at 300, 400, 500 waited for it.
    assert list(laps.samples) == [10, 10, 350, 260, 170, 80, 10, 10, 10, 10]
    assert begun[2:7] == [200, 550, 560, 570, 600]
    assert laps.calls == 10


def test_calls_that_could_not_be_made_any_more_count_as_late():
    laps, begun = paced([10, 880, 50, 200])
    # Done at 980, 1030: those due at 300 to 900 were never made, and have waited until 1000.
    assert begun == [0, 100, 980]
    assert list(laps.samples) == [10, 880, 830, 700, 600, 500, 400, 300, 200, 100]
    assert laps.calls == 3
    assert laps.elapsed_ns == 1030


def test_sleeping_too_long_is_not_the_contenders_fault():
    laps, begun = paced([10] * 10, oversleep=[0, 250])
    assert begun[:5] == [0, 100, 450, 460, 470]
    assert list(laps.samples) == [10] * 10
    assert laps.calls == 10


def test_who_comes_after_the_window_makes_a_call_all_the_same():
    """The warm-up's last call took longer than the window: there are figures, if bad ones."""
    laps, begun = paced([30] * 10, now=2000)
    assert begun == [2000]
    assert (list(laps.samples), laps.calls, laps.elapsed_ns) == ([30], 1, 30)


def test_a_wrong_reply_is_noticed_while_paced():
    with pytest.raises(WrongPayloadError):
        paced_laps(lambda _: b"", PAYLOAD, 100, 0, 1000, lambda due: (due, 0), Clock())


# ---- results, and two of them compared ----


def comparison_of(runs, facts=None, topic="sizes", case="64 B, one at a time"):
    comparison = Comparison(topic, case, facts=facts or {"size": 64.0, "rate": 0.0})
    for name, rates in runs.items():
        comparison.runs[name] = [
            {
                "calls_per_s": float(rate),
                "p50_us": 1e6 / rate,
                "p99_us": 2e6 / rate,
                "p999_us": 3e6 / rate,
                "client_cpu_us": 1.0,
                "server_cpu_us": 2.0,
                "cpu_us": 3.0,
                "wakeups": 2.0,
                "system_calls": math.nan,
            }
            for rate in rates
        ]
    return comparison


def verdicts(old, new):
    return {(change.contender, change.metric): change.verdict for change in changes([old], [new])}


def test_a_change_beyond_the_noise_is_found():
    old = comparison_of({"raw-uds": [100, 101, 99], "shm": [500, 505, 495]})
    found = verdicts(old, comparison_of({"raw-uds": [100, 101, 99], "shm": [400, 404, 396]}))
    assert found["shm", "calls_per_s"] == "slower"
    assert found["raw-uds", "calls_per_s"] == "same"
    assert found["shm", "cpu_us"] == "same"
    found = verdicts(old, comparison_of({"raw-uds": [100, 101, 99], "shm": [700, 707, 693]}))
    assert found["shm", "calls_per_s"] == "faster"


@pytest.mark.parametrize("count", [3, 5, 10])
def test_chance_is_no_change_and_half_the_speed_is_one(count):
    chance = random.Random(7)

    def changed(factor):
        def measured(times):
            rates = [1000 * times * chance.gauss(1, 0.1) for _ in range(count)]
            return comparison_of({"shm": rates})

        found = [verdicts(measured(1), measured(factor))["shm", "calls_per_s"] for _ in range(1000)]
        return 1 - found.count("same") / len(found)

    assert changed(1) < 0.015
    assert changed(0.5) > 0.95


def test_what_the_machine_does_to_all_is_no_change():
    old = comparison_of({"raw-uds": [100, 101, 99], "shm": [500, 505, 495]})
    new = comparison_of({"raw-uds": [50, 50.5, 49.5], "shm": [250, 252.5, 247.5]})
    assert verdicts(old, new)["shm", "calls_per_s"] == "same"
    assert verdicts(old, new)["raw-uds", "calls_per_s"] == "slower"


def test_runs_that_are_far_apart_prove_nothing():
    old = comparison_of({"raw-uds": [100, 100, 100], "shm": [500, 700, 300]})
    new = comparison_of({"raw-uds": [100, 100, 100], "shm": [400, 560, 240]})
    assert verdicts(old, new)["shm", "calls_per_s"] == "same"
    old = comparison_of({"raw-uds": [100], "shm": [500]})
    assert verdicts(old, comparison_of({"raw-uds": [100], "shm": [420]}))["shm", "calls_per_s"] == (
        "same"
    )
    assert verdicts(old, comparison_of({"raw-uds": [100], "shm": [300]}))["shm", "calls_per_s"] == (
        "slower"
    )


def test_paced_cases_compare_latency_and_idle_ones_milliseconds():
    facts = {"size": 64.0, "rate": 1000.0}
    old = comparison_of({"shm": [500] * 3}, facts)
    new = comparison_of({"shm": [250] * 3}, facts)
    assert verdicts(old, new) == {
        ("shm", "p50_us"): "slower",
        ("shm", "p99_us"): "slower",
        ("shm", "cpu_us"): "same",
    }
    quiet = Comparison("idle", "c", {"shm": [{"cpu_ms": 0.1}] * 3})
    less_quiet = Comparison("idle", "c", {"shm": [{"cpu_ms": 0.4}] * 3})
    loud = Comparison("idle", "c", {"shm": [{"cpu_ms": 40.0}] * 3})
    assert verdicts(quiet, less_quiet) == {}
    assert verdicts(quiet, loud) == {("shm", "cpu_ms"): "slower"}


def test_json_is_that_of_pytest_benchmark_and_comes_back():
    with short_directory() as directory:
        path = Path(directory, "r.json")
        old = comparison_of({"raw-uds": [100, 110, 90, 1000], "shm": [500] * 4})
        old.absent["pyzmq"] = "No module named 'zmq'"
        write(path, document([old], HERE, [limits.Limit("memcpy", "64 B", 1.0, "GB/s")]))
        contents = json.loads(path.read_text())
        back = read(path)
        path.write_text("{}")
        with pytest.raises(ResultsError, match="no results file"):
            read(path)
    assert contents["machine_info"]["command"] == "shmrpc bench <it>"
    assert contents["absent"]["sizes: 64 B, one at a time"] == old.absent
    entry = contents["benchmarks"][0]
    assert entry["group"] == "sizes: 64 B, one at a time"
    statistics = entry["stats"]
    assert statistics["data"] == [1 / 100, 1 / 110, 1 / 90, 1 / 1000]
    assert statistics["rounds"] == 4
    assert statistics["iqr_outliers"] == 1
    assert statistics["min"] <= statistics["q1"] <= statistics["median"] <= statistics["q3"]
    assert entry["extra_info"]["runs"][0]["system_calls"] is None
    assert len(back) == 1
    assert back[0].facts == old.facts
    assert rows(back[0]) == rows(old)
    assert all(change.verdict == "same" for change in changes([old], back))


class Page(HTMLParser):
    """Checks that elements nest, and collects what a browser would fetch."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self):
        super().__init__()
        self.open = []
        self.seen = set()
        self.fetched = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.fetched += [value for name, value in attrs if name in {"src", "href", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a begin"
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)


@pytest.fixture(scope="module")
def _fonts():
    """matplotlib keeps font files open: before a test begins, not as something it left behind."""
    draw_all([comparison_of({"shm": [2], "raw-uds": [1]})])


@pytest.mark.usefixtures("_fonts")
def test_the_report_is_one_well_formed_page():
    measured = [
        comparison_of({"shm": [500], "raw-uds": [100], "a<b>": [900]}, {"size": size, "rate": 0.0})
        for size in (64.0, 4096.0)
    ]
    measured += [
        comparison_of({"shm": [rate], "raw-uds": [rate / 2]}, {"rate": rate}, "rates", f"{rate}/s")
        for rate in (100.0, 1000.0)
    ]
    drawings = draw_all(measured)
    assert [len(group) for _, group in drawings] == [1, 1, 4]
    limit = limits.Limit("pipe round trip", "one CPU", 5.0, "us")
    text = page(measured, HERE, [limit], drawings)
    parser = Page()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert {"svg", "table", "h2"} <= parser.seen
    assert "script" not in parser.seen
    outside = [url for url in parser.fetched if url and not url.startswith("#")]
    assert not outside
    assert "https:" not in text
    for words in ("a machine", "shmrpc bench &lt;it&gt;", "a&lt;b&gt;", "pipe round trip"):
        assert words in text


def test_conclusions_say_also_where_shared_memory_loses():
    sentences = list(conclusions([comparison_of({"shm": [500], "raw-uds": [100], "x": [1000]})]))
    assert "5.0x raw-uds" in sentences[0]
    assert "0.5x x" in sentences[0]
    assert sentences[-1].startswith("Shared memory was not clearly better than x")
    sentences = list(conclusions([comparison_of({"shm": [500], "raw-uds": [100]})]))
    assert sentences[-1].startswith("Shared memory was better than all others")
    assert list(conclusions([])) == []


def test_windows_of_clients_add_up():
    windows = [
        {"calls": 10, "made": 12, "calls_per_s": 100.0, "p50_ns": 1000, "p99_ns": 5000},
        {"calls": 30, "made": 33, "calls_per_s": 300.0, "p50_ns": 3000, "p99_ns": 4000},
    ]
    rest = {"p999_ns": 9000, "client_cpu_ns": 4000, "wakeups": 20, "system_calls": 40}
    figures = combine(
        [
            Window(**windows[0], **rest, server_cpu_ns=8000),
            Window(**windows[1], **rest, server_cpu_ns=0),  # another one counts the server
        ]
    )
    assert figures["calls_per_s"] == 400
    assert (figures["p50_us"], figures["p99_us"]) == (2, 5)
    assert figures["client_cpu_us"] == pytest.approx(0.2)
    assert figures["server_cpu_us"] == pytest.approx(0.2)
    assert (figures["wakeups"], figures["system_calls"]) == (1, 2)


# ---- the command ----


def run(*arguments, status=0):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == status, done
    return done


@pytest.mark.thorough
@pytest.mark.timeout(180)  # a dozen processes begin, perhaps on a busy machine
def test_quick_is_measured_and_written():
    with short_directory() as directory:
        result, report = Path(directory, "r.json"), Path(directory, "r.html")
        brief = ("--quick", "--runs", 1, "--seconds", 0.02)
        done = run(*brief, "--json", result, "--html", report)
        parser = Page()
        parser.feed(report.read_text())
        contents = json.loads(result.read_text())
    assert "- 64 B, one at a time: " in done.stdout
    assert "Shared memory was" in done.stdout
    assert not parser.open
    assert "svg" in parser.seen
    assert not any(contents["failed"].values())
    infos = [entry["extra_info"] for entry in contents["benchmarks"]]
    contenders_of = {}
    for info in infos:
        contenders_of.setdefault(info["case"], set()).add(info["contender"])
    assert contenders_of["64 B, one at a time"] == set(suite.QUICK)
    assert contenders_of["1,000 calls/s"] == {"shm", "raw-uds"}


@pytest.mark.timeout(180)
def test_what_got_slower_shows_in_the_exit_status():
    rates = {"raw-uds": [1e-3] * 3, "shm": [1e6] * 3}  # as if shm had been fast beyond belief
    old = comparison_of(rates, {"rate": 100.0}, "rates", "100 calls/s")
    with short_directory() as directory:
        before, now = Path(directory, "before.json"), Path(directory, "now.json")
        write(before, document([old], HERE))
        brief = ("rates", "-c", "shm", "-c", "raw-uds", "--runs", 1, "--seconds", 0.03)
        done = run(*brief, "--compare", before, "--json", now, status=1)
        assert "slower" in done.stdout
        assert {comparison.case for comparison in read(now)} >= {"100 calls/s", "50,000 calls/s"}


def test_wrong_usage_is_found_before_anything_is_measured():
    with short_directory() as directory:
        nothing = Path(directory, "none.json")
        for arguments, words in (
            (["--quick", "sizes"], "topics of its own"),
            (["-c", "nobody"], "no such contender: nobody"),
            (["--compare", nothing], "can't read"),
            (["--compare", __file__], "no results file"),
            (["tables"], "tables"),
            (["--seconds", "nan"], "not a positive number"),
            (["--json", nothing.parent / "none" / "r.json"], "there is no directory"),
            (["--html", nothing.parent / "none" / "r.html"], "there is no directory"),
        ):
            done = run(*arguments, status=2)
            assert words in done.stderr
            assert not done.stdout


def test_limits_alone():
    found = {(limit.name, limit.where): limit.value for limit in limits.measure_limits()}
    assert all(value > 0 for value in found.values())
    for name in ("eventfd", "futex", "pipe"):
        assert (f"{name} round trip", "one CPU") in found
    assert ("memcpy", "16 MB") in found
    if len(os.sched_getaffinity(0)) > 1:
        assert ("cache line round trip", "two CPUs") in found


def test_plans_cover_what_is_asked_for():
    effort = Effort(runs=2)
    plans = suite.plans(["sizes", "inflight", "rates"], effort, ["shm", "asyncio"])
    cases = {case for plan in plans for case in plan.cases}
    assert {"64 B, one at a time", "16 MB, 4 in flight", "50,000 calls/s"} <= cases
    steps = []
    (plan,) = suite.quick_plans(BRIEF, ["raw-uds"])[:1]
    measured = list(plan.run(steps.append))
    assert len(steps) == plan.steps
    assert [comparison.case for comparison in measured] == list(plan.cases)


def test_who_is_asked_for_is_measured_or_named_everywhere():
    names = ["shm-aio", "mp-pipe"]
    usual = suite.plans(["idle", "regimes"], BRIEF, names)
    assert {plan.steps for plan in usual if plan.topic == "idle"} == {3}  # shm-aio alone
    effort = Effort(runs=1, seconds=0.01, warm_up_seconds=0.01)
    [rates] = suite.plans(["rates"], effort, names, asked=True)
    measured = next(rates.run(lambda _: None))
    assert set(measured.runs) == {"mp-pipe"}
    assert "neither paced" in measured.absent["shm-aio"]
    several = [
        plan
        for plan in suite.plans(["regimes"], effort, ["mp-pipe"], asked=True)
        if plan.cases == ("one server, 8 clients",)
    ]
    for plan in several:  # where there are two CPUs
        [comparison] = plan.run(lambda _: None)
        assert "between two processes" in comparison.absent["mp-pipe"]
