"""examples/deploy: its files are what they claim to be, and its containers can talk."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import short_directory, wait_until

import shmrpc

DEPLOY = Path(__file__).resolve().parent.parent / "examples" / "deploy"
POD = yaml.safe_load((DEPLOY / "pod.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CONTAINERS = {container["name"]: container for container in POD["spec"]["containers"]}


def environment_of(container):
    return {entry["name"]: entry["value"] for entry in container["env"]}


# ---- what the files say ----


def test_the_containers_share_a_directory_and_nothing_else():
    spec = POD["spec"]
    assert spec["shareProcessNamespace"] is False
    assert not any(spec.get(shared) for shared in ("hostIPC", "hostPID", "hostNetwork"))
    [volume] = spec["volumes"]
    assert "emptyDir" in volume
    for container in CONTAINERS.values():
        [mount] = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        assert environment_of(container)["SHMRPC_DIR"].startswith(mount["mountPath"] + "/")
        assert not mount["mountPath"].startswith("/dev")
    assert spec["securityContext"]["runAsUser"] != 0
    grace = float(CONTAINERS["server"]["command"][-1])
    assert spec["terminationGracePeriodSeconds"] > grace + 3


def test_pod_compose_and_image_say_the_same():
    image = (DEPLOY / "Dockerfile").read_text()
    instructions = re.findall(r"^([A-Z]+) (.+)$", image, re.MULTILINE)
    assert instructions[0][0] == "FROM"
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "STOPSIGNAL", "CMD"}
    assert {name for name, _ in instructions} <= known
    told = dict(instructions)
    for source in told["COPY"].split()[:-1]:
        assert (DEPLOY / source).is_file()
    command = json.loads(told["CMD"])
    assert command == CONTAINERS["server"]["command"]
    assert int(told["USER"]) == POD["spec"]["securityContext"]["runAsUser"]
    directory = told["ENV"].removeprefix("SHMRPC_DIR=")
    for container in CONTAINERS.values():
        assert environment_of(container)["SHMRPC_DIR"] == directory
    services = COMPOSE["services"]
    assert services["caller"]["command"] == CONTAINERS["caller"]["command"]
    volumes = {service["volumes"][0] for service in services.values()}
    [mounted] = volumes
    assert directory.startswith(mounted.split(":")[1] + "/")
    assert mounted.split(":")[0] in COMPOSE["volumes"]


@pytest.mark.parametrize("name", ["calc.socket", "calc.service"])
def test_units(name, tmp_path):
    text = (DEPLOY / name).read_text()
    sections = re.findall(r"^\[(\w+)\]$", text, re.MULTILINE)
    assert sections == ["Unit", name.partition(".")[2].capitalize(), "Install"]
    for line in text.splitlines():
        assert re.fullmatch(r"(#.*|\[\w+\]|\w+=\S.*|)", line)
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        for unit in ("calc.socket", "calc.service"):
            shutil.copy(DEPLOY / unit, tmp_path)
        run = subprocess.run(
            [analyze, "--user", "verify", str(tmp_path / name)],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        complaints = [line for line in run.stderr.splitlines() if name in line]
        assert not complaints


def test_the_unit_and_the_page_agree():
    """docs/operations.md shows the socket of the same service."""
    page = (DEPLOY.parent.parent / "docs" / "operations.md").read_text()
    for line in (DEPLOY / "calc.socket").read_text().splitlines():
        if "=" in line and not line.startswith(("#", "Description")):
            assert line in page


# ---- what the containers do ----


def namespaces():
    """How to start a process that shares no memory, process ids or mounts with others."""
    prefix = [
        *("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"),
        *("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"),
    ]
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []  # without the rights for that: as processes side by side


class Pod:
    """The containers of pod.yaml as processes, each in namespaces of its own."""

    def __init__(self, stack):
        self.shared = stack.enter_context(short_directory())
        self.prefix = namespaces()
        self.stack = stack

    def command(self, name, command=None):
        container = CONTAINERS[name]
        [mount] = container["volumeMounts"]
        environment = {
            key: value.replace(mount["mountPath"], self.shared)
            for key, value in environment_of(container).items()
        }
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        words = command or container["command"]
        return [*self.prefix, *words], {**os.environ, **environment, "PATH": path}

    def start(self, name):
        command, environment = self.command(name)
        path = f"{self.shared}/{name}.log"
        with open(path, "w") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=DEPLOY, stdout=log, stderr=subprocess.STDOUT
            )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        process.log = Path(path)
        return process

    def run(self, name, command):
        words, environment = self.command(name, command)
        return subprocess.run(
            words,
            env=environment,
            cwd=DEPLOY,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )


def said(process):
    return process.log.read_text()


def test_the_containers_talk():
    with contextlib.ExitStack() as stack:
        pod = Pod(stack)
        caller = pod.start("caller")  # it waits for the server
        server = pod.start("server")
        probe = CONTAINERS["server"]["startupProbe"]["exec"]["command"]
        wait_until(lambda: pod.run("server", probe).returncode == 0, 40, said(server))
        wait_until(lambda: "3\n" in said(caller), 40)
        # Memory went by descriptor: the server's /dev/shm is not the caller's, nor is ours.
        assert pod.run("caller", ["shmrpc", "call", "calc", "add", "2", "2"]).stdout == "4\n"
        alive = CONTAINERS["server"]["livenessProbe"]["exec"]["command"]
        assert json.loads(pod.run("server", alive).stdout) == {"status": "serving"}
        with shmrpc.inspect(f"shm://{pod.shared}/calc/calc.sock") as inspector:
            assert len(inspector.stats()["workers"]) == 2
        # What `docker stop` does, to the first process of the container.
        target = server.pid
        if pod.prefix:
            [target] = children_of(server.pid)
        os.kill(target, signal.SIGTERM)
        server.wait(40)
        assert os.listdir(f"{pod.shared}/calc") == []
        assert "Traceback" not in said(server) + said(caller)


def children_of(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
