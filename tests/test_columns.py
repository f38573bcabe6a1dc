"""Tables on narrow terminals: nothing is cut off."""

import io

import pytest
from rich.console import Console

from shmrpc.cli.columns import Columns

HEADING = ["address", "pid", "calls/s", "client CPU us/call", "in flight", "calls/s, runs"]
ROWS = [
    ["shm://orders", "12345", "1,234,567", "104,889.3", "64", "1,020 .. 2,635"],
    ["tcp://127.0.0.1:7001", "7", "3", "[red]0.1", "1", "3 .. 4"],
]


def shown(cells, width, **options):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(Columns(cells, **options))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 250])
def test_every_column_is_shown_whole(width, keys):
    lines = shown([HEADING, *ROWS], width, keys=keys, title="calls")
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    words = " ".join(lines).split()
    assert words.count("calls") == 1
    for cell in [*HEADING, *(cell for row in ROWS for cell in row)]:
        assert all(word in words for word in cell.split())
    # Whose figures they are is said in each part.
    parts = words.count("address")
    assert [words.count(row[0]) for row in ROWS] == [parts, parts]
    assert parts > 1 if width < 100 else width < 120 or parts == 1


def test_a_long_name_is_folded_and_figures_are_not():
    name = "shm:///" + "long/" * 20
    lines = shown([HEADING, [name, *ROWS[0][1:]]], 60, keys=2)
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert all(cell in text for cell in ROWS[0][1:])
    assert "12345" in text


def test_a_heading_alone():
    assert shown([["name", "ping"]], 80)[1].split() == ["name", "ping"]
