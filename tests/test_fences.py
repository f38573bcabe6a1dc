"""Each fence of csrc, taken away, is missed: docs/memory-model.md says what for.

tests/fences.c runs ring.c and wake.c as they are, and mutilated: with one acquire or release made
relaxed (ThreadSanitizer then sees the race on the frame's bytes), or without one full fence (then,
sooner or later, neither of two threads sees what the other has just stored).
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.deep

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

RING_ROUNDS = 5000
GOOD_ROUNDS = 300_000  # more than a bad one mostly needs ...
GOOD_SECONDS = 5  # ... where nobody else wants the CPUs
BAD_ROUNDS = 100_000_000  # until it is found
BAD_SECONDS = 45


class Fence(NamedTuple):
    letter: str
    file: str
    change: tuple[str, str]
    shape: str


FENCES = [
    Fence("A", "ring.c", ("load_acquire", "load_relaxed"), "ring"),
    Fence("B", "ring.c", ("store_release", "store_relaxed"), "ring"),
    Fence("C", "ring.c", ("load_acquire", "load_relaxed"), "ring"),
    Fence("D", "ring.c", ("store_release", "store_relaxed"), "ring"),
    Fence("E", "wake.c", ("full_fence();", ""), "data"),
    Fence("F", "wake.c", ("full_fence();", ""), "data"),
    Fence("G", "wake.c", ("full_fence();", ""), "space"),
    Fence("H", "wake.c", ("full_fence();", ""), "space"),
]

# ThreadSanitizer needs none of that to find a race.
two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one CPU no store waits in a buffer"
)


def build(directory, shape, fence=None):
    """Compile fences.c with ring.c and wake.c, one of them without a fence."""
    for name in ("ring.c", "wake.c"):
        source = (CSRC / name).read_text(encoding="utf-8")
        if fence is not None and fence.file == name:
            # "/* fence E, pairs with F: ..." stands on the fence's own line.
            found = rf"^(.*){re.escape(fence.change[0])}(.*/\* fence {fence.letter},.*)$"
            source, count = re.subn(found, rf"\1{fence.change[1]}\2", source, flags=re.MULTILINE)
            assert count == 1, f"fence {fence.letter} is not where it was in {name}"
        (directory / name).write_text(source, encoding="utf-8")
    options = ["-fsanitize=thread", "-Wno-tsan"] if shape == "ring" else []
    program = directory / "fences"
    sources = [directory / "ring.c", directory / "wake.c", TESTS / "fences.c"]
    flags = ["-std=gnu11", "-O2", "-pthread", *options, f"-I{CSRC}"]
    subprocess.run(["gcc", *flags, *sources, "-o", program], check=True)
    return program


def run(program, shape, rounds, seconds=BAD_SECONDS):
    # ThreadSanitizer's older runtimes can't cope with all that newer kernels randomize.
    prefix = ["setarch", "-R"] if shape == "ring" else []
    return subprocess.run(
        [*prefix, program, shape, str(rounds), str(seconds)],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BAD_SECONDS + 5,
        check=False,
    )


@pytest.mark.parametrize("shape", ["ring", "data", "space"])
def test_fences_hold(tmp_path, shape):
    rounds = RING_ROUNDS if shape == "ring" else GOOD_ROUNDS
    done = run(build(tmp_path, shape), shape, rounds, GOOD_SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "fence",
    [
        pytest.param(fence, id=fence.letter, marks=() if fence.shape == "ring" else two_cpus)
        for fence in FENCES
    ],
)
def test_missing_fence_is_noticed(tmp_path, fence):
    done = run(
        build(tmp_path, fence.shape, fence),
        fence.shape,
        RING_ROUNDS if fence.shape == "ring" else BAD_ROUNDS,
    )
    expected = "data race" if fence.shape == "ring" else "lost in round"
    assert done.returncode != 0, done.stdout
    assert expected in done.stdout


def test_every_fence_is_tried():
    letters = {
        letter
        for name in ("ring.c", "wake.c")
        for letter in re.findall(r"/\* fence ([A-Z]),", (CSRC / name).read_text(encoding="utf-8"))
    }
    assert letters == {fence.letter for fence in FENCES}
