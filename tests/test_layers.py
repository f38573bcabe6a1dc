"""Rules about the source itself: layers, memory orders, the fence register, import weight."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shmrpc"
CSRC = ROOT / "csrc"
FENCE_REGISTER = ROOT / "docs" / "memory-model.md"

# Low to high. A module imports from its own row and from rows above it, never from one below.
LAYERS = [
    ["_native"],
    ["errors", "logs", "buffers", "owned"],
    ["arrays", "tables"],
    ["values"],
    ["address", "attaching", "codec", "metadata", "parcels", "scheduler", "session", "tending"],
    ["segments", "sharing", "handover", "rendezvous", "interceptors"],
    ["otel", "prometheus", "retries"],
    ["handshake"],
    ["poller", "inquiries"],
    ["lending", "link", "registry", "context", "inspector"],
    ["callinfo", "opened", "receiving"],
    ["loans"],
    ["timing", "supervisor"],
    ["outcomes", "failures", "calls", "futures", "proxy", "acceptor", "bytestream", "reflection"],
    ["channel", "worker", "inspection"],
    ["caller", "hosting", "intercepted", "pool"],
    ["client", "server"],
    ["connecting"],
    ["aio"],
    ["httpx"],
    ["__init__"],
    ["sidecar"],
    ["bench"],
    ["cli", "__main__"],
]
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}
# On the same row, and yet neither may import the other.
STRANGERS = [{"client", "server"}]


def module_of(path: Path) -> str:
    """Return the name in LAYERS of a file: a subpackage counts as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Return the shmrpc modules that a file imports, wherever in the file and for whatever."""
    package = ["shmrpc", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *filter(None, [node.module])])
            # In `from shmrpc import x`, x is a module or a name that the package exports.
            names.update(f"{full}.{alias.name}" for alias in node.names)
    return {local_module(name) for name in names if name.split(".")[0] == "shmrpc"}


def local_module(dotted: str) -> str:
    part = [*dotted.split("."), ""][1]
    is_module = part in LEVEL or any(PACKAGE.glob(f"{part}.py*")) or (PACKAGE / part).is_dir()
    return part if part and is_module else "__init__"


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def c_files() -> list[Path]:
    """Return the library's own files; csrc's tests are in directories of their own."""
    return sorted([*CSRC.glob("*.c"), *CSRC.glob("*.h")])


def without_comments(text: str) -> str:
    """Blank out C comments, and keep the line numbers."""
    comment = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
    return comment.sub(lambda match: "\n" * match.group().count("\n"), text)


def test_every_module_has_a_layer():
    unknown = {module_of(path) for path in python_files()} - LEVEL.keys()
    assert not unknown, f"add {sorted(unknown)} to LAYERS in {Path(__file__).name}, at their level"


def test_every_package_is_packaged():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    said = re.search(r"^packages = \[(.*)\]$", settings, re.MULTILINE)[1]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', said)) == found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_from_a_higher_layer(path):
    module = module_of(path)
    for imported in imported_modules(path) - {module}:
        assert imported in LEVEL, f"add {imported!r} to LAYERS in {Path(__file__).name}"
        assert LEVEL[imported] <= LEVEL[module], f"{module} imports {imported}, a higher layer"
        assert {module, imported} not in STRANGERS, f"{module} imports {imported}"


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for path in python_files():
        module = module_of(path)
        graph.setdefault(module, set()).update(imported_modules(path) - {module})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_memory_orders_only_in_atomics_h():
    # Its types (atomic_u64) are for all: declaring a word atomic orders nothing.
    pattern = re.compile(r"__atomic|memory_order|\batomic_(?!u\d+\b|pointer\b)|__sync_")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in c_files()
        if path.name != "atomics.h"
        for number, line in enumerate(without_comments(path.read_text()).splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "use what atomics.h offers:\n" + "\n".join(found)


def test_fences_are_those_of_the_register():
    """Each lettered ordering in csrc is in docs/memory-model.md, and the other way round."""
    in_both = r"\b[Ff]ences?\s+([A-Z])\b"
    in_code = re.compile(rf"{in_both}|/\*\s*([A-Z]),\s*(?:pairs with|matches)\b")
    # Prose, the first cell of a table's row, or a heading.
    in_register = re.compile(
        rf"{in_both}|^\|\s*[`*]*([A-Z])[`*]*\s*\||^#+\s+([A-Z])\b[:.,]", re.MULTILINE
    )
    code = {
        letter
        for path in c_files()
        for match in in_code.finditer(path.read_text())
        for letter in filter(None, match.groups())
    }
    register = {
        letter
        for match in in_register.finditer(FENCE_REGISTER.read_text())
        for letter in filter(None, match.groups())
    }
    assert code, "no lettered fence found in csrc"
    assert not code - register, f"in csrc, but not in {FENCE_REGISTER.name}"
    assert not register - code, f"in {FENCE_REGISTER.name}, but not in csrc"


def test_import_is_light():
    """``import shmrpc`` loads nothing that only some users need."""
    heavy = {"numpy", "pyarrow", "click", "rich", "asyncio", "opentelemetry", "prometheus_client"}
    code = f"import sys, shmrpc; print(*{heavy} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split()


def test_nothing_is_left_to_do():
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for top in (PACKAGE, CSRC)
        for path in sorted(top.rglob("*"))
        if path.suffix in {".py", ".pyi", ".c", ".h"} and path.name != "_native.c"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
