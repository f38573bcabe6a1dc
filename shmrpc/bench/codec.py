"""msgpack as every contender uses it: the C packer, made once, and plain `unpackb`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from collections.abc import Callable

pack: Callable[[Any], bytes] = msgpack.Packer().pack
"""Turn a value into bytes; not for two threads at once."""

unpack: Callable[[bytes | memoryview], Any] = msgpack.unpackb
"""Turn bytes back into a value."""
