"""What the machine is: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass

import shmrpc

__all__ = ["Environment", "describe_machine", "environment"]

_PACKAGES = (
    "grpcio",
    "iceoryx2",
    "msgpack",
    "pynng",
    "pyzmq",
    "rpyc",
    "thriftpy2",
    "uvloop",
)
_BUSY_LOAD = 0.3


def describe_machine() -> str:
    """Return one line: CPU model and count, kernel, Python."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    count = f"{usable} CPU" if usable == 1 else f"{usable} CPUs"
    if usable != present:
        count += f" of {present}"
    return (
        f"{_cpu_model()}, {count}, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def _cpu_model() -> str:
    """Return the CPU's name, or its architecture where the kernel does not tell (aarch64)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name" and value.strip():
                    return " ".join(value.split())
    except OSError:
        pass
    return platform.machine()


@dataclass(frozen=True)
class Environment:
    """Where figures come from: without it they mean nothing."""

    description: str
    command: str
    versions: dict[str, str]
    load_before: float
    """How many processes wanted a CPU before the first run, on average over a minute."""

    @property
    def busy(self) -> bool:
        """Whether something else used the machine: then figures are worse than it can."""
        return self.load_before > _BUSY_LOAD * len(os.sched_getaffinity(0))


def environment(command: str) -> Environment:
    """Describe machine, kernel, Python and what is installed, before anything is measured."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and for this alone

    versions = {"shmrpc": shmrpc.__version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Environment(describe_machine(), command, versions, os.getloadavg()[0])
