"""Metadata: small facts that travel beside a call, such as who asks and for which trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

__all__ = ["METADATA_BYTES_MAX", "Metadata", "pack_metadata", "unpack_metadata"]

Metadata = Mapping[str, str | bytes]

METADATA_BYTES_MAX = 8192  # of one call, packed; what gRPC allows by default


def pack_metadata(metadata: Any) -> bytes:
    """Check and pack; TypeError or ValueError says what is wrong with it."""
    if not isinstance(metadata, Mapping):
        msg = f"metadata must be a mapping of str to str or bytes, not {type(metadata).__name__}"
        raise TypeError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, (str, bytes)):
            msg = f"metadata must map str to str or bytes, not {key!r} to {type(value).__name__}"
            raise TypeError(msg)
    packed: bytes = msgpack.packb(dict(metadata))
    if len(packed) > METADATA_BYTES_MAX:
        msg = f"metadata of {len(packed)} bytes is more than the {METADATA_BYTES_MAX} allowed"
        raise ValueError(msg)
    return packed


def unpack_metadata(packed: bytes) -> dict[str, str | bytes]:
    """Read what a peer sent; anything but a mapping of the right types counts as none."""
    if not packed:
        return {}
    try:
        metadata = msgpack.unpackb(packed)
    except (ValueError, TypeError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {
        key: value
        for key, value in metadata.items()
        if isinstance(key, str) and isinstance(value, (str, bytes))
    }
