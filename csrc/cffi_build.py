"""Build script of ``shmrpc._native``: the C library in this directory plus its cffi wrapper.

setuptools runs it (``cffi_modules`` in setup.py); ``python csrc/cffi_build.py`` builds the module
in place, from any directory. What Python sees of the C API is the part of shmrpc.h between the
lines ``/* cffi: begin */`` and ``/* cffi: end */``, without its preprocessor lines.
"""

import os
import re
import shlex
import sysconfig
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
HEADER = CSRC / "shmrpc.h"


def declarations() -> str:
    """Return the part of the header that cffi reads."""
    text = HEADER.read_text(encoding="utf-8")
    begin, end = "/* cffi: begin */", "/* cffi: end */"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{HEADER}: expected one '{begin}' line followed by one '{end}' line")
    part = text[text.index(begin) + len(begin) : text.index(end)]
    # A directive ends at the first line end that no backslash precedes.
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", "", part, flags=re.MULTILINE)


def in_csrc(pattern: str) -> list[str]:
    """Return the matching files, sorted, relative to the project: sdists refuse absolute paths."""
    return [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob(pattern))]


ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "shmrpc._native",
    (CSRC / "gil.h").read_text(encoding="utf-8"),
    sources=in_csrc("*.c"),
    depends=[*in_csrc("*.h"), *in_csrc("cffi_build.py")],
    include_dirs=[CSRC.name],
    extra_compile_args=[
        "-std=c11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-fvisibility=hidden",
        "-pthread",
        # Last, so that CFLAGS="-O1 -g -fsanitize=address" wins over the flags above.
        *shlex.split(os.environ.get("CFLAGS", "")),
    ],
    extra_link_args=["-pthread"],
    # Free-threaded interpreters load no abi3 module.
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)

if __name__ == "__main__":
    ffi.compile(tmpdir=str(ROOT), verbose=True)
