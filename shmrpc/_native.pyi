# The cffi module over csrc/shmrpc.h, as far as its users' types can be told.

from typing import Any

class _FFI:
    NULL: Any
    errno: int
    def new(self, cdecl: str, init: Any = ...) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, size: int = ...) -> Any: ...
    def buffer(self, cdata: Any, size: int = ...) -> Any: ...
    def from_buffer(self, python_buffer: Any, require_writable: bool = ...) -> Any: ...

class _Lib:
    def __getattr__(self, name: str) -> Any: ...

ffi: _FFI
lib: _Lib
