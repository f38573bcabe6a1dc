"""Who needs what is not installed is told what to install, in one line."""

import json
import subprocess
import sys

import pytest

COMMAND = "from shmrpc.cli import main; main()"
EMPTY = """
import sys
import shmrpc
with shmrpc.connect(sys.argv[1]) as client:
    try:
        client.empty((3,), "f4")
    except ImportError as error:
        sys.exit(str(error))
"""


def run_without(modules, code, *arguments):
    """Run Python code in which these modules can't be imported."""
    hidden = f"import json, sys; sys.modules |= dict.fromkeys({json.dumps(modules)})\n"
    return subprocess.run(
        [sys.executable, "-c", hidden + code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=40,
    )


@pytest.mark.parametrize(
    "modules, code, arguments, extra",
    [
        (["grpc"], COMMAND, "sidecar --listen grpc://127.0.0.1:0 --upstream shm://a", "grpc"),
        (["grpc"], COMMAND, "sidecar --listen shm://extra --upstream grpcs://b:1", "grpc"),
        (["matplotlib"], COMMAND, "bench --html never.html", "bench"),
        (["httpcore", "httpx"], "import shmrpc.httpx", "", "httpx"),
        (["opentelemetry"], "import shmrpc.otel", "", "otel"),
        (["prometheus_client"], "import shmrpc.prometheus", "", "prometheus"),
    ],
)
def test_what_to_install(modules, code, arguments, extra, monkeypatch, tmp_path):
    monkeypatch.setenv("SHMRPC_DIR", str(tmp_path))
    run = run_without(modules, code, *arguments.split())
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert f"pip install 'shmrpc[{extra}]'" in last
    if code == COMMAND:
        assert run.returncode == 2
        assert run.stderr.splitlines() == [last]


def test_an_array_without_numpy(common):
    run = run_without(["numpy"], EMPTY, common.addresses[0])
    assert run.returncode == 1
    assert "pip install 'shmrpc[numpy]'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
