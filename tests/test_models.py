"""The protocols of the C core, model-checked with Spin (tests/models/*.pml).

Each model is searched exhaustively as it stands, where it must hold, and with each of its BUG_n
variants, where it must fail in the expected way: a model that cannot fail proves nothing.
tests/models/README.md says what they abstract and how to replay a counterexample by hand.

SHMRPC_MODELS_DEEP=1 adds larger bounds (some minutes).
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.deep

MODELS = Path(__file__).resolve().parent / "models"
SPIN = shutil.which("spin")
DEEP = os.environ.get("SHMRPC_MODELS_DEEP", "0") != "0"

# What a search must end in. HOLDS: no assertion is violated and no state is a deadlock (a lost
# wake-up is one). ENDS: there is no cycle at all (the models have no progress labels), so every
# execution is finite; together with HOLDS: everybody finishes, on every schedule.
HOLDS = "holds"
ENDS = "ends"
DEADLOCK = "invalid end state"
ASSERTION = "assertion violated"
CYCLE = "non-progress cycle"
FAILURES = {"deadlock": DEADLOCK, "assertion": ASSERTION, "cycle": CYCLE}


class Case(NamedTuple):
    """One model, compiled with these defines and searched once."""

    model: str
    defines: tuple
    expect: str
    covers: bool = False  # every statement of the model must have been reached

    def __str__(self):
        return "-".join([self.model, *self.defines, self.expect.split()[-1]])


def case(model, defines, expect, *, covers=False):
    return Case(model, tuple(defines.split()), expect, covers)


GOOD = [
    case("wake", "", HOLDS, covers=True),
    case("wake", "PSO", HOLDS, covers=True),
    case("wake", "LEVEL", HOLDS, covers=True),
    case("wake", "BORN_ARMED", HOLDS, covers=True),
    case("wake", "", ENDS),
    case("space", "", HOLDS, covers=True),
    case("space", "SIZES M0=4", HOLDS, covers=True),
    case("space", "DUPLEX M0=3 M1=2", HOLDS, covers=True),
    case("space", "DUPLEX PSO M0=3 M1=1", HOLDS, covers=True),
    case("space", "DUPLEX M0=3 M1=1", ENDS),
    case("space_step", "", HOLDS, covers=True),
    case("outbox", "", HOLDS, covers=True),
    case("outbox", "PSO", HOLDS, covers=True),
    case("outbox", "R_SLEEPS M=2 D=0", HOLDS),
    case("outbox", "M=2", ENDS),
    case("leader", "", HOLDS, covers=True),
    case("leader", "DETACHED", HOLDS),
    case("leader", "DIES", HOLDS, covers=True),
    case("leader", "DETACHED", ENDS),
    case("close", "", HOLDS, covers=True),
    case("close", "PSO N=2 SLOTS=1", HOLDS, covers=True),
    case("close", "N=2 SLOTS=1", ENDS),
    case("takeover", "", HOLDS, covers=True),
    case("takeover", "", ENDS),
    case("roles", "", HOLDS),
    case("roles", "NESTED", HOLDS),
    case("roles", "STOPS NC=1", HOLDS),
    case("roles", "RETIRES NC=1", HOLDS),
    case("roles", "NESTED NC=1 NW=3 WORKERS=2 REQUESTS=2", HOLDS),
    case("roles", "", ENDS),
]

LARGER = [
    case("wake", "N=4 SB=4 PSO", HOLDS),
    case("wake", "PSO LEVEL BORN_ARMED", ENDS),
    case("space", "M0=7", HOLDS),
    case("space", "PSO", HOLDS),
    case("space", "SIZES", HOLDS),
    case("space", "", ENDS),
    case("space", "DUPLEX M0=3 M1=3", HOLDS),
    case("outbox", "M=4", HOLDS),
    case("outbox", "M=2 SB=3 PSO", HOLDS),
    case("outbox", "R_SLEEPS M=2", HOLDS),
    case("leader", "", ENDS),
    case("leader", "DIES", ENDS),
    case("leader", "DETACHED DIES", HOLDS),
    case("close", "PSO", HOLDS),
    case("close", "", ENDS),
    case("takeover", "REQUESTS=6", HOLDS),
    case("takeover", "REQUESTS=5", ENDS),
    case("roles", "REQUESTS=2", HOLDS),
    case("roles", "STOPS", HOLDS),
    case("roles", "RETIRES", HOLDS),
    case("roles", "NC=1 NW=3 WORKERS=2 REQUESTS=3", HOLDS),
    case("roles", "NW=3 WORKERS=2", HOLDS),
]

# model, variant (with the configuration that shows it), the way it must fail
BUGS = """
wake       BUG_1             deadlock
wake       BUG_2             deadlock
wake       BUG_3             deadlock
wake       BUG_4             deadlock
wake       BUG_5             deadlock
wake       BUG_6             deadlock
wake       BUG_7             deadlock
wake       BUG_8             assertion
wake       BUG_9             deadlock
wake       BUG_10 PSO        assertion
wake       BUG_11            deadlock
wake       BUG_12            deadlock
wake       BUG_13            deadlock
space      BUG_1             deadlock
space      BUG_2             deadlock
space      BUG_3             deadlock
space      BUG_4             deadlock
space      BUG_5             deadlock
space      BUG_6             deadlock
space      BUG_7             assertion
space      BUG_8             deadlock
space      BUG_9             deadlock
space      BUG_10 DUPLEX     deadlock
space      BUG_11            deadlock
space      BUG_12            deadlock
space      BUG_13 DUPLEX     deadlock
space      BUG_14            deadlock
space_step BUG_1             deadlock
space_step BUG_2             deadlock
space_step BUG_3             deadlock
outbox     BUG_1             deadlock
outbox     BUG_2             deadlock
outbox     BUG_3             deadlock
outbox     BUG_4             deadlock
outbox     BUG_5             deadlock
outbox     BUG_6             assertion
outbox     BUG_7             assertion
outbox     BUG_8             deadlock
outbox     BUG_9             deadlock
outbox     BUG_10            deadlock
leader     BUG_1             deadlock
leader     BUG_2             assertion
leader     BUG_3             deadlock
leader     BUG_4             deadlock
leader     BUG_5             deadlock
leader     BUG_6             deadlock
leader     BUG_7             deadlock
leader     BUG_8             deadlock
leader     BUG_9             assertion
leader     BUG_10            deadlock
leader     BUG_11            deadlock
leader     BUG_12 DETACHED   deadlock
leader     BUG_13 DIES       deadlock
leader     BUG_14 DIES       deadlock
leader     BUG_15 DIES       assertion
leader     BUG_16            assertion
close      BUG_1             assertion
close      BUG_2             deadlock
close      BUG_3             assertion
close      BUG_4             assertion
close      BUG_5             assertion
close      BUG_6             deadlock
close      BUG_7             assertion
close      BUG_8             deadlock
close      BUG_9             assertion
close      BUG_10            assertion
takeover   BUG_1             assertion
takeover   BUG_2             assertion
takeover   BUG_3             assertion
takeover   BUG_4             assertion
takeover   BUG_5             assertion
takeover   BUG_6             assertion
takeover   BUG_7             assertion
takeover   BUG_8             assertion
takeover   BUG_9             assertion
takeover   BUG_10            assertion
takeover   BUG_11            assertion
takeover   BUG_12            assertion
takeover   BUG_13            cycle
roles      BUG_1             assertion
roles      BUG_2             assertion
roles      BUG_3             assertion
roles      BUG_4             assertion
roles      BUG_5             assertion
roles      BUG_6             assertion
roles      BUG_7             assertion
roles      BUG_8 RETIRES     assertion
roles      BUG_9 NESTED NC=1 NW=3 WORKERS=2 REQUESTS=2 assertion
roles      BUG_10 NESTED     assertion
roles      BUG_11 RETIRES    assertion
roles      BUG_12            cycle
roles      BUG_13 NC=1 NW=3 WORKERS=2 REQUESTS=3 assertion
"""


def parse_bugs():
    for line in BUGS.strip().split("\n"):
        model, *defines, failure = line.split()
        yield Case(model, tuple(defines), FAILURES[failure])


BUGGY = list(parse_bugs())
CASES = [*GOOD, *BUGGY, *(LARGER if DEEP else [])]

# Longest execution: the sender of space_step never stops, and depth costs memory.
DEPTH = {"space_step": 2_000_000}
SEARCH_SECONDS = 1000 if DEEP else 150  # ten times what they need alone
MEMORY_MB = 8000 if DEEP else 2000
REPLAY_LINES = 60


def run(command, directory, seconds=50):
    done = subprocess.run(
        command,
        cwd=directory,
        timeout=seconds,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def spin(which, directory, *options):
    defines = [f"-D{define}" for define in which.defines]
    return run([SPIN, *defines, *options, str(MODELS / f"{which.model}.pml")], directory)


def search(which, directory):
    """Generate, compile and run the verifier; what it printed."""
    good = which.expect in {HOLDS, ENDS}
    cycles = which.expect in {ENDS, CYCLE}
    spin(which, directory, "-a")
    # Most bugs are found at once: compiling takes longer than searching.
    optimize = "-Og" if good else "-O0"
    mode = "-DNP" if cycles else "-DSAFETY"
    run(["gcc", "-w", optimize, mode, f"-DMEMLIM={MEMORY_MB}", "-o", "pan", "pan.c"], directory)
    depth = f"-m{DEPTH.get(which.model, 10_000)}"
    table = "-w22" if good else "-w18"
    loops = ["-l"] if cycles else []
    return run(["./pan", depth, table, *loops], directory, SEARCH_SECONDS)


def counterexample(which, directory):
    """The last steps of the trail that a failed search has left."""
    trail = directory / f"{which.model}.pml.trail"
    if not trail.exists():
        return "(no trail)"
    replay = spin(which, directory, "-k", str(trail), "-p", "-g")
    return "\n".join(replay.split("\n")[-REPLAY_LINES:])


def unreached(output):
    """The statements that no execution reached. Processes that never end are as they should be."""
    listed = re.findall(r'^\t(\S+:\d+), state \d+, "(.*)"$', output, flags=re.MULTILINE)
    return [statement for statement in listed if statement[1] != "-end-"]


@pytest.fixture
def no_leaks():
    """Instead of the one in conftest.py: other searches run beside the test that waits for one."""


@pytest.fixture(scope="module")
def searches(request, tmp_path_factory):
    """Case -> future of (output, directory), for the cases that were selected, on all CPUs."""
    if SPIN is None:
        reason = "spin is not installed (apt-get install spin): the models were not checked"
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            pytest.fail(reason)
        pytest.skip(reason)

    def start(which):
        directory = tmp_path_factory.mktemp(which.model)
        return pool.submit(lambda: (search(which, directory), directory))

    class Started(dict):
        def __missing__(self, which):
            self[which] = start(which)
            return self[which]

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    started = Started()
    if "PYTEST_XDIST_WORKER" not in os.environ:  # there, each worker runs some of the items
        for item in request.session.items:
            if getattr(item, "originalname", None) == "test_model":
                started[item.callspec.params["which"]]
    yield started
    pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(SEARCH_SECONDS * 3)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_model(which, searches):
    output, directory = searches[which].result()
    errors = re.search(r"errors: (\d+)", output)
    assert errors, output
    if which.expect not in {HOLDS, ENDS}:
        assert int(errors[1]) > 0, f"nothing was found, though there is a bug:\n{output}"
        assert f"pan:1: {which.expect}" in output, output
        return
    assert int(errors[1]) == 0, f"{output}\n{counterexample(which, directory)}"
    # Exhaustive: nothing was cut off, and what was to be looked for was looked for.
    assert "Full statespace search" in output, output
    for cut in ("max search depth too small", "Search not completed", "MEMLIM", "out of memory"):
        assert cut not in output, output
    checked = "non-progress cycles" if which.expect == ENDS else "invalid end states"
    for kind in ("assertion violations", checked):
        assert re.search(rf"{kind}\s+\+", output), output
    if which.covers:
        assert not unreached(output)


def test_every_variant_is_checked():
    """No model and no BUG_n appears, or is left out here, unnoticed; each is described."""
    tested = {(bug.model, name) for bug in BUGGY for name in bug.defines if name[:4] == "BUG_"}
    described, used = set(), set()
    for path in MODELS.glob("*.pml"):
        header, body = path.read_text().split("*/", 1)
        for text, found in ((header, described), (body, used)):
            found.update((path.stem, name) for name in re.findall(r"\bBUG_\d+\b", text))
    assert described == tested
    assert used == tested
    assert {good.model for good in GOOD} == {path.stem for path in MODELS.glob("*.pml")}
