"""The C core's own tests (csrc/tests), plain and under sanitizers, and its fuzzers for a while."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep

CSRC = Path(__file__).parent.parent / "csrc"


def make(*arguments, **environment):
    """Run make in csrc/ and return what it said; fails the test with all of it otherwise."""
    # Not a part of the make that may have started pytest.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-j2", "-C", str(CSRC), *arguments],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=280,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"make {' '.join(arguments)}:\n{done.stdout[-8000:]}", pytrace=False)
    return done.stdout


def programs():
    return len(list((CSRC / "tests").glob("test_*.c")))


def check_all_ran(output):
    results = re.findall(r"(\d+) passed, (\d+) failed", output)
    assert len(results) == programs()
    assert all(int(passed) > 0 and failed == "0" for passed, failed in results)


@pytest.mark.timeout(300)
def test_unit_tests():
    check_all_ran(make("test"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_address_and_undefined_behaviour_sanitizer():
    check_all_ran(make("asan", SHMRPC_SOAK="3000"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_thread_sanitizer():
    check_all_ran(make("tsan", SHMRPC_SOAK="1000"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fuzzers_find_nothing():
    output = make("fuzz", "FUZZ_RUNS=20000", "FUZZ_SECONDS=6")
    runs = re.findall(r"number_of_executed_units: (\d+)", output)
    assert len(runs) == len(list((CSRC / "tests").glob("fuzz_*.c")))
    assert all(int(count) > 1000 for count in runs)
