"""What the machine is: figures mean nothing without it."""

from __future__ import annotations

import os
import platform

__all__ = ["describe_machine"]


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
