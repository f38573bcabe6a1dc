"""Values as JSON, also those that JSON has no notation for.

    {"$bytes": "aGVsbG8="}          bytes, in base64
    {"$float": "nan"}               nan, inf and -inf
    {"$map": [[1, "a"], [2, "b"]]}  a map with keys that are no strings

A map that looks like one of these, one key that starts with a dollar, is shown as ``$map`` itself,
so that reading what was shown gives the same value again.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["parse_json", "read_json", "show_json"]

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def show_json(value: Any, *, ascii_only: bool = False) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(_to_json(value), ensure_ascii=ascii_only, allow_nan=False)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; ``ValueError`` says what is wrong with it, and where."""
    try:
        return json.loads(text, object_hook=_from_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        msg = f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"
        raise ValueError(msg) from error
    except RecursionError:
        msg = "nested too deeply"
        raise ValueError(msg) from None


def read_json(lines: Iterable[str]) -> Iterator[Any]:
    """The values of a text, one after the other; each as soon as the line that it ends on is there.

    ``ValueError`` says what is wrong, and in which value.
    """
    text = ""
    number = 0
    for line in lines:
        text += line
        while text := text.lstrip():
            number += 1
            try:
                value, text = _take_value(text)
            except _IncompleteError:
                number -= 1
                break
            except ValueError as error:
                msg = f"value {number} is not valid JSON: {error}"
                raise ValueError(msg) from error
            yield value
    if text.strip():
        try:
            parse_json(text)
        except ValueError as error:
            msg = f"value {number + 1} is not valid JSON: {error}"
            raise ValueError(msg) from error


class _IncompleteError(Exception):
    """There may be more of this value on the lines that follow."""


def _take_value(text: str) -> tuple[Any, str]:
    """The first value of a text, and what follows it."""
    decoder = json.JSONDecoder(object_hook=_from_object, parse_constant=_refuse_constant)
    try:
        value, end = decoder.raw_decode(text)
    except json.JSONDecodeError as error:
        # Wrong where the text goes on; unfinished where it ends, or in an unfinished string.
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise _IncompleteError from error
        msg = f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"
        raise ValueError(msg) from error
    except RecursionError:
        msg = "nested too deeply"
        raise ValueError(msg) from None
    return value, text[end:]


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        if _is_plain(value):
            return {key: _to_json(item) for key, item in value.items()}
        return {"$map": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    return str(value)  # msgpack's timestamps


def _is_plain(value: dict[Any, Any]) -> bool:
    """Whether a map can be a JSON object that is not taken for one of the notations above."""
    if not all(isinstance(key, str) for key in value):
        return False
    return len(value) != 1 or not next(iter(value)).startswith("$")


def _from_object(fields: dict[str, Any]) -> Any:
    if len(fields) != 1:
        return fields
    [(key, content)] = fields.items()
    if key == "$bytes":
        return _bytes(content)
    if key == "$float":
        return _float(content)
    if key == "$map":
        return _map(content)
    return fields


def _bytes(content: Any) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        msg = f'{{"$bytes": ...}} takes base64 text: {error}'
        raise ValueError(msg) from error


def _float(content: Any) -> float:
    if content not in ("nan", "inf", "-inf"):
        msg = '{"$float": ...} takes "nan", "inf" or "-inf"'
        raise ValueError(msg)
    return _FLOATS[content]


def _map(content: Any) -> dict[Any, Any]:
    try:
        return {key: item for key, item in content}  # noqa: C416 - dict() also takes "ab" for a pair
    except (TypeError, ValueError) as error:
        msg = f'{{"$map": ...}} takes a list of [key, value]: {error}'
        raise ValueError(msg) from error


def _refuse_constant(name: str) -> NoReturn:
    word = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[name]
    msg = f'{name} is no JSON; write {{"$float": "{word}"}}'
    raise ValueError(msg)
