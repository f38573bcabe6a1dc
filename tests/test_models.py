"""Model-check the wake-up, closing and thread protocols of the C core (tests/models/*.pml) with Spin.

Each model is searched exhaustively as it stands (it must hold), and once for each of its BUG_n variants (it must
fail, and in the expected way: a model that cannot fail proves nothing). tests/models/README.md says what they
abstract and how to replay a counterexample by hand.

SHMRPC_MODELS_DEEP=1 adds larger bounds (minutes, about 4 GB); the default set stays below 90 s on two slow CPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = Path(__file__).parent / "models"
DEEP = os.environ.get("SHMRPC_MODELS_DEEP", "") not in ("", "0")

# What a run must end in. A search for HOLDS stops at assertions and at invalid end states (deadlock = lost
# wake-up); one for ENDS looks for cycles: without any, and without progress labels in the models, every
# execution is finite, so "no deadlock" becomes "everybody finishes".
HOLDS = "holds"
ENDS = "ends"
DEADLOCK = "invalid end state"
ASSERTION = "assertion violated"
CYCLE = "non-progress cycle"


class Case(NamedTuple):
    """One compilation and search of one model."""

    model: str
    defines: tuple[str, ...]
    expect: str
    covers: bool = False  # every statement of the model must have been reached

    def __str__(self) -> str:
        return "-".join([self.model, *self.defines, self.expect.replace(" ", "_")])


def _case(model: str, defines: str, expect: str, *, covers: bool = False) -> Case:
    return Case(model, tuple(defines.split()), expect, covers)


GOOD = [
    _case("wake", "", HOLDS, covers=True),
    _case("wake", "PSO", HOLDS, covers=True),
    _case("wake", "LEVEL", HOLDS, covers=True),
    _case("wake", "BORN_ARMED", HOLDS, covers=True),
    _case("wake", "", ENDS),
    _case("space", "", HOLDS, covers=True),
    _case("space", "SIZES M0=4", HOLDS, covers=True),
    _case("space", "DUPLEX M0=3 M1=2", HOLDS, covers=True),
    _case("space", "DUPLEX PSO M0=3 M1=1", HOLDS, covers=True),
    _case("space", "DUPLEX M0=3 M1=1", ENDS),
    _case("space_step", "", HOLDS, covers=True),
    _case("outbox", "", HOLDS, covers=True),
    _case("outbox", "PSO", HOLDS, covers=True),
    _case("outbox", "R_SLEEPS M=2 D=0", HOLDS),
    _case("outbox", "M=2", ENDS),
    _case("leader", "", HOLDS, covers=True),
    _case("leader", "DETACHED", HOLDS),
    _case("leader", "DIES", HOLDS, covers=True),
    _case("leader", "DETACHED", ENDS),
    _case("close", "", HOLDS, covers=True),
    _case("close", "PSO N=2 SLOTS=1", HOLDS, covers=True),
    _case("close", "N=2 SLOTS=1", ENDS),
    _case("takeover", "", HOLDS, covers=True),
    _case("takeover", "", ENDS),
]

LARGER = [
    _case("wake", "N=4 SB=4 PSO", HOLDS),
    _case("wake", "PSO LEVEL BORN_ARMED", ENDS),
    _case("space", "M0=7", HOLDS),
    _case("space", "PSO", HOLDS),
    _case("space", "SIZES", HOLDS),
    _case("space", "", ENDS),
    _case("space", "DUPLEX M0=3 M1=3", HOLDS),
    _case("outbox", "M=4", HOLDS),
    _case("outbox", "M=2 SB=3 PSO", HOLDS),
    _case("outbox", "R_SLEEPS M=2", HOLDS),
    _case("leader", "", ENDS),
    _case("leader", "DIES", ENDS),
    _case("leader", "DETACHED DIES", HOLDS),
    _case("close", "PSO", HOLDS),
    _case("close", "", ENDS),
    _case("takeover", "REQUESTS=6", HOLDS),
    _case("takeover", "REQUESTS=5", ENDS),
]

# model, variant (with the configuration that shows it), the way it must fail
_BUGS = """
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
"""
_FAILURES = {"deadlock": DEADLOCK, "assertion": ASSERTION, "cycle": CYCLE}


def _parse_bugs() -> Iterator[Case]:
    for line in _BUGS.split("\n"):
        if line:
            model, *defines, failure = line.split()
            yield Case(model, tuple(defines), _FAILURES[failure])


BUGGY = list(_parse_bugs())
CASES = [*GOOD, *BUGGY, *(LARGER if DEEP else [])]

# An endless sender makes its search deep.
DEPTH = {"space_step": 2_000_000}

SPIN = shutil.which("spin")
CI = os.environ.get("CI", "").lower() in ("1", "true")
REPLAY_LINES = 60
SEARCH_SECONDS = 900 if DEEP else 120
MEMORY_MB = 8000 if DEEP else 2000


def _run(command: list[str], cwd: Path, seconds: float = 60) -> str:
    done = subprocess.run(  # noqa: S603
        command,
        cwd=cwd,
        timeout=seconds,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def _search(case: Case, directory: Path) -> str:
    """Generate, compile and run the verifier of one case; return what it printed."""
    assert SPIN is not None
    defines = [f"-D{define}" for define in case.defines]
    _run([SPIN, *defines, "-a", str(MODELS / f"{case.model}.pml")], directory)
    cycles = case.expect in (ENDS, CYCLE)
    # A variant fails within a moment: compiling it takes longer than the search.
    optimize = "-O1" if case.expect in (HOLDS, ENDS) else "-O0"
    mode = "-DNP" if cycles else "-DSAFETY"
    _run(["gcc", "-w", optimize, mode, f"-DMEMLIM={MEMORY_MB}", "-o", "pan", "pan.c"], directory)
    depth = f"-m{DEPTH.get(case.model, 10_000)}"
    table = "-w22" if case.expect in (HOLDS, ENDS) else "-w18"
    return _run(["./pan", depth, table, *(["-l"] if cycles else [])], directory, SEARCH_SECONDS)


def _counterexample(case: Case, directory: Path) -> str:
    """Replay the trail that a failed search has left."""
    trail = directory / f"{case.model}.pml.trail"
    if not trail.exists():
        return "(no trail)"
    assert SPIN is not None
    defines = [f"-D{define}" for define in case.defines]
    model = str(MODELS / f"{case.model}.pml")
    replay = _run([SPIN, *defines, "-k", str(trail), "-p", "-g", model], directory)
    return "\n".join(replay.split("\n")[-REPLAY_LINES:])


def _errors(output: str) -> int:
    found = re.search(r"errors: (\d+)", output)
    assert found, f"the search did not finish:\n{output}"
    return int(found[1])


def _unreached(case: Case, output: str) -> list[str]:
    """List the statements that were never executed (a process that never ends is fine)."""
    listed = re.findall(r"^\t\S+?:(\d+), state \d+, \"(.*)\"$", output, flags=re.MULTILINE)
    return [f"{case.model}.pml:{line}: {text}" for line, text in listed if text != "-end-"]


@pytest.fixture
def _spin() -> None:
    if SPIN is None:
        reason = "spin is not installed (apt-get install spin): the protocol models are not checked"
        if CI:
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.usefixtures("_spin")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_model(case: Case, tmp_path: Path) -> None:
    """The model holds on every execution; each of its mutilations is caught."""
    output = _search(case, tmp_path)
    errors = _errors(output)
    if case.expect not in (HOLDS, ENDS):
        assert errors > 0, f"{case} is wrong, but the search found nothing:\n{output}"
        assert f"pan:1: {case.expect}" in output, output
        return

    assert errors == 0, f"{output}\n{_counterexample(case, tmp_path)}"
    # Exhaustive: nothing was cut off, and what was asked for was searched for.
    assert "Full statespace search" in output, output
    for truncated in (
        "max search depth too small",
        "Search not completed",
        "out of memory",
        "MEMLIM",
    ):
        assert truncated not in output, output
    assert re.search(r"assertion violations\s+\+", output), output
    searched = r"non-progress cycles\s+\+" if case.expect == ENDS else r"invalid end states\s+\+"
    assert re.search(searched, output), output
    if case.covers:
        assert _unreached(case, output) == []


def test_every_variant_is_checked() -> None:
    """No model and no BUG_n can be added, or dropped here, unnoticed; each is described in its model."""
    tested = {
        (case.model, define)
        for case in BUGGY
        for define in case.defines
        if define.startswith("BUG_")
    }
    used, described = set(), set()
    for model in MODELS.glob("*.pml"):
        header, body = model.read_text(encoding="utf-8").split("*/", 1)
        described |= {
            (model.stem, name)
            for name in re.findall(r"^ \*   .*?\b(BUG_\d+)\b", header, re.MULTILINE)
        }
        described |= {(model.stem, name) for name in re.findall(r"  (BUG_\d+) ", header)}
        used |= {(model.stem, name) for name in re.findall(r"\bBUG_\d+\b", body)}
    assert used == tested
    assert described == tested
    assert {case.model for case in GOOD} == {model.stem for model in MODELS.glob("*.pml")}
