"""The ``shmrpc`` command as a real process, for tests."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from conftest import Process

COMMAND = [sys.executable, "-m", "shmrpc.cli"]


class Place:
    """A directory with modules to serve, another for sockets, and the command run there."""

    def __init__(self, directory, modules):
        self.sockets = f"{directory}/sockets"
        self.modules = f"{directory}/modules"
        self.temporary = f"{directory}/tmp"
        for path in (self.sockets, self.modules, self.temporary):
            os.mkdir(path, 0o700)
        for name, text in modules.items():
            Path(self.modules, f"{name}.py").write_text(text)
        self.env = {
            **os.environ,
            "SHMRPC_DIR": self.sockets,
            "TMPDIR": self.temporary,
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def popen(self, *args, command=COMMAND, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return Process(
            [*command, *args],
            cwd=self.modules,
            env={**self.env, **options.pop("env", {})},
            text=True,
            **options,
        )

    def run(self, *args, **options):
        """Run it to its end; gives its exit status and what it printed."""
        with self.popen(*args, **options) as process:
            try:
                out, err = process.communicate(timeout=40)
            except BaseException:
                process.kill()
                raise
        assert "Traceback" not in (out or "")
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    @contextlib.contextmanager
    def serving(self, target, *options):
        """``shmrpc serve``, from when it listens; gives the process, which has .banner."""
        with self.popen("serve", target, *options) as process:
            try:
                process.banner = process.stderr.readline()
                assert process.banner.startswith("serving "), process.banner
                yield process
            finally:
                process.kill()


def assert_complains(result, status, *texts):
    """Exactly one line on stderr, that says all of these; nothing on stdout."""
    assert result.returncode == status, result
    assert result.stdout == ""
    assert result.stderr.startswith("shmrpc")
    assert result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for text in texts:
        assert text in result.stderr
