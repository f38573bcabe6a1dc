"""Values packed for one C slot, whose buffers go into blocks while they are packed.

The way of most large values: one pass over the value, one C call for each buffer, and what sends a
message without buffers sends this one. Whatever needs more, such as waiting for room or a transport
without shared memory, is left to ``lending``, which begins anew.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgpack

from ._native import ffi, lib
from .buffers import Unwritten
from .codec import MsgpackCodec
from .values import Encoder, NotPlain

if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Codec

__all__ = ["slot_packers"]

_ARRAYS = f"{__package__}.arrays"  # imported if there is a numpy array
_LOANED = lib.SHMRPC_LOANED
_attach_now = lib.shmrpc_attach_now
_from_buffer = ffi.from_buffer


def slot_packers(codec: Codec, slot: Any) -> tuple[Callable[[Any], bytes], Callable[[Any], bytes]]:
    """Two new functions that pack a value for this C slot, which sends it next, or is detached.

    The first packs long bytes as all others, so who gets a long body asks ``may_hold_large``. The
    second looks at each value for them, and begins anew whatever is attached. ``NotPlain`` for what
    they can't put into blocks now; then no buffers are attached. After any other error some may be.
    """
    if type(codec) is not MsgpackCodec:
        return codec.encoder(), codec.encoder()
    attacher = _Attacher(slot)
    pack: Callable[[Any], bytes] = msgpack.Packer(default=attacher.default).pack

    def pack_lifted(value: Any) -> bytes:
        lib.shmrpc_detach(slot)
        return pack(attacher.lift(value, 0))

    return pack, pack_lifted


class _Attacher(Encoder):
    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def memory_of(self, array: Any) -> Any:
        arrays: Any = sys.modules[_ARRAYS]
        return array if arrays.has_plain_memory(array) else arrays.memory_of(array)

    def beside(self, source: Any, size: int) -> int:
        if type(source) is Unwritten:
            lib.shmrpc_detach(self._slot)
            raise NotPlain
        number: int = _attach_now(self._slot, _from_buffer(source), size)
        if number < 0:
            raise NotPlain
        if number >= _LOANED:
            number -= _LOANED
            arrays = sys.modules.get(_ARRAYS)
            if arrays is not None:
                arrays.freeze(source)
        return number
