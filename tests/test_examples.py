"""Every example runs to its end and prints what it is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(directory, *command):
    """What an example prints; it ends well, and leaves no file, no process and no complaint."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "SHMRPC_DIR": directory, "TMPDIR": directory},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert not os.listdir(directory)
    commands = [" ".join(other.info["cmdline"] or []) for other in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if directory in command]
    print(done.stdout)
    return done.stdout.splitlines()


def assert_in_order(expected, lines):
    """All of them are told, in this order; others may be told between them."""
    rest = iter(lines)
    missing = [line for line in expected if line not in rest]
    assert not missing[:1], "not told, or not in this order"


def test_calculator(directory):
    assert run(directory, EXAMPLES / "calculator.py") == [
        "1 + 2 = 3",
        "1 / 0: INVALID_ARGUMENT division by zero {'a': 1}",
        "doubled: [0, 2, 4]",
        "history: ['1 + 2', '0 + 0', '1 + 1', '2 + 2', '# that is all']",
    ]


SAGA = """\
trip-1: booked
trip-2: payment refuses: only 700 left
trip-2: hotel takes 2 back
trip-2: car takes 1 back
trip-2: cancelled
trip-3: hotel was lost, outcome not_started
trip-3: hotel is asked for 2
trip-3: booked
trip-4: hotel stays where it was before booking
trip-4: hotel was lost, outcome unknown
trip-4: hotel has nothing to take back
trip-4: car takes 1 back
trip-4: cancelled
trip-5: hotel stays where it was after booking
trip-5: hotel was lost, outcome unknown
trip-5: hotel takes 2 back
trip-5: car takes 1 back
trip-5: cancelled
trip-6: hotel gives no answer: DEADLINE_EXCEEDED
trip-6: hotel got the booking after its cancellation, and refuses
trip-7: found unfinished in the log
trip-7: hotel has nothing to take back
trip-7: car takes 1 back
trip-7: cancelled
trip-8: found unfinished in the log
trip-8: hotel takes 2 back
trip-8: car takes 1 back
trip-8: cancelled
"""


TCC = """\
move-1: decided to confirm
move-1: north has confirmed, and got 0
move-1: south has confirmed, and got 100
move-2: given up, Abort: north has less than 2000
move-2: decided to cancel
move-2: north has cancelled, and got 0
move-2: south has cancelled, and got 0
move-3: decided to confirm
move-3: north has confirmed, and got 0
move-3: south has confirmed, and got 100
move-4: decided to confirm
move-4: north has confirmed, and got 0
move-4: south stays before it has confirmed
move-4: south has confirmed, and got 100
move-5: decided to confirm
move-5: north has confirmed, and got 0
move-5: south stays after it has confirmed
move-5: south has confirmed, and got 0
move-6: decided to cancel
move-6: north has cancelled, and got 100
move-6: south has cancelled, and got 0
move-7: decided to confirm
move-7: the coordinator stays after its decision
move-7: north has confirmed, and got 0
move-7: south has confirmed, and got 100
move-8: north stays during Try
move-8: decided to cancel
move-8: north has cancelled, and got 0
move-8: south has cancelled, and got 0
move-8: given up, Abort: move-8 is over
"""

# Without a seed they take one at random, and print it.
seeds = pytest.mark.parametrize("seed", [["1"], ["2"], []], ids=["seed 1", "seed 2", "any seed"])


@pytest.mark.slow
@seeds
def test_saga(directory, seed):
    lines = run(directory, "-m", "examples.saga", *seed)
    assert_in_order(SAGA.splitlines(), lines)
    last = re.fullmatch(r"The sums hold: (\d+) of (\d+) trips booked, all paid\.", lines[-1])
    assert 2 < int(last[1]) < int(last[2])


@pytest.mark.slow
@seeds
def test_tcc(directory, seed):
    lines = run(directory, "-m", "examples.tcc", *seed)
    assert {line for line in lines if line.startswith("move-")} == set(TCC.splitlines())
    last = re.fullmatch(r"The sums hold: (\d+) of (\d+) moves, \d+ in all\.", lines[-1])
    assert 5 < int(last[1]) < int(last[2])


CONTRACT_VM = """\
Abort: key-0 has only 1 for key-55
-- The contract is killed when it has written.
invocation 4: contract ended with -9, 100 writes dropped
100000 of 100000 are there in the end.
"""
WITHOUT_GRPC = """
import runpy, sys
sys.modules["grpc"] = None
runpy.run_module("examples.contract_vm", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, rivals",
    [
        (["-m", "examples.contract_vm"], ["tcp", "gRPC"]),
        (["-c", WITHOUT_GRPC, "1"], ["tcp"]),
    ],
    ids=["any seed", "without gRPC"],
)
def test_contract_vm(directory, command, rivals):
    lines = run(directory, *command)
    assert_in_order(CONTRACT_VM.splitlines(), lines)
    killed = r"invocation \d+: contract ended with -9, \d+ writes dropped"
    assert sum(bool(re.fullmatch(killed, line)) for line in lines) == 21
    assert ("gRPC" in rivals) != any("gRPC is left out" in line for line in lines)
    headings = next(line for line in lines if "state reads" in line)
    assert re.findall(r"\w+", headings) == ["state", "reads", "shm", *rivals]
    for reads in (1, 10, 100):
        row = next(line for line in lines if re.match(rf"\W+{reads}\W+\d+ \(", line))
        figures = re.findall(r"\d+ \((\d+\.\dx)\)", row)
        assert figures[0] == "1.0x"
        assert len(figures) == 1 + len(rivals)


def test_every_example_is_here():
    modules = {path.name for path in EXAMPLES.glob("*.py")}
    assert modules == {"__init__.py", "calculator.py", "support.py"}
    packages = {path.parent.name for path in EXAMPLES.glob("*/__main__.py")}
    assert packages == {"contract_vm", "saga", "tcc"}
