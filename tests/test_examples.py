"""Every example runs to its end and prints what it is about."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_calculator(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "calculator.py"],
        env={**os.environ, "SHMRPC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "1 + 2 = 3",
        "1 / 0: INVALID_ARGUMENT division by zero {'a': 1}",
        "doubled: [0, 2, 4]",
        "history: ['1 + 2', '0 + 0', '1 + 1', '2 + 2', '# that is all']",
    ]
    assert not list(tmp_path.iterdir())


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"calculator.py"}
