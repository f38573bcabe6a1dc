"""Metadata: small facts that travel beside a call, such as who asks and for which trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

__all__ = [
    "METADATA_BYTES_MAX",
    "Metadata",
    "pack_metadata",
    "pack_reply_metadata",
    "unpack_metadata",
    "unpack_reply_metadata",
]

Metadata = Mapping[str, str | bytes]

METADATA_BYTES_MAX = 8192  # of one call, packed; what gRPC allows by default


def pack_metadata(metadata: Any) -> bytes:
    """Check and pack; TypeError or ValueError says what is wrong with it."""
    check_metadata(metadata)
    return _limited(dict(metadata), metadata)


def check_metadata(metadata: Any) -> None:
    """TypeError if that is no metadata, ValueError for text that has no encoding."""
    if not isinstance(metadata, Mapping):
        msg = f"metadata must be a mapping of str to str or bytes, not {type(metadata).__name__}"
        raise TypeError(msg)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, (str, bytes)):
            msg = f"metadata must map str to str or bytes, not {key!r} to {type(value).__name__}"
            raise TypeError(msg)
        try:
            key.encode()
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            msg = f"metadata {key!r} can't be sent: {error}"
            raise ValueError(msg) from None


def pack_reply_metadata(trailing: Metadata, initial: Metadata) -> bytes:
    """What goes with a reply: ``initial`` is not empty where no frame of its own carried it."""
    return _limited([trailing, initial], {**initial, **trailing})


def _limited(value: Any, entries: Metadata) -> bytes:
    packed: bytes = msgpack.packb(value)
    if len(packed) > METADATA_BYTES_MAX:
        longest = max(entries, key=lambda key: len(key) + len(entries[key]))
        msg = (
            f"metadata of {len(packed)} bytes is more than the {METADATA_BYTES_MAX} allowed; "
            f"{longest[:64]!r} is the longest"
        )
        raise ValueError(msg)
    return packed


def unpack_metadata(packed: bytes) -> dict[str, str | bytes]:
    """Read what a peer sent; anything but a mapping of the right types counts as none."""
    return _clean(_unpack(packed))


def unpack_reply_metadata(packed: bytes) -> tuple[dict[str, str | bytes], dict[str, str | bytes]]:
    """Trailing and initial metadata of a reply; as ``unpack_metadata``."""
    pair = _unpack(packed)
    if not isinstance(pair, list) or len(pair) != 2:
        return {}, {}
    return _clean(pair[0]), _clean(pair[1])


def _unpack(packed: bytes) -> Any:
    try:
        return msgpack.unpackb(packed) if packed else None
    except (ValueError, TypeError):
        return None


def _clean(metadata: Any) -> dict[str, str | bytes]:
    if not isinstance(metadata, dict):
        return {}
    return {
        key: value
        for key, value in metadata.items()
        if isinstance(key, str) and isinstance(value, (str, bytes))
    }
