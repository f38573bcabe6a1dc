"""The sidecar's configuration: read from TOML or options, checked, and explained where it is wrong.

Every complaint names the file, the line if it is known, and what is allowed.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from shmrpc import address as addresses
from shmrpc.errors import ConnectError, Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "Config",
    "ConfigError",
    "RouteConfig",
    "TlsConfig",
    "UpstreamConfig",
    "load",
    "of_options",
]

T = TypeVar("T")

_GRPC = ("grpc", "grpcs")


def is_grpc(address: str) -> bool:
    """Whether an address is spoken to by gRPC."""
    return address.partition("://")[0] in _GRPC


class ConfigError(Error):
    """The configuration is wrong: which file, where, and what would be right."""

    default_code = "INVALID_ARGUMENT"


@dataclass(frozen=True)
class TlsConfig:
    """Files in PEM: ``ca`` signs the certificate of the other side; ours is ``cert``, ``key``."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None


@dataclass(frozen=True)
class UpstreamConfig:
    """Endpoints that are as good as each other."""

    name: str
    endpoints: tuple[str, ...]
    connect_timeout: float = 1.0
    eject_after: int = 5
    eject_seconds: float = 10.0
    tls: TlsConfig = TlsConfig()
    keepalive: float | None = None


@dataclass(frozen=True)
class RouteConfig:
    """What happens to the methods that begin with ``prefix``."""

    prefix: str
    weights: Mapping[str, int]
    timeout: float | None = None
    retries: int = 0
    max_concurrency: int | None = None
    rate: float | None = None
    burst: float = 1.0
    break_after: int | None = None
    break_seconds: float = 5.0
    allow_uids: frozenset[int] | None = None


@dataclass(frozen=True)
class Config:
    """All of it."""

    listen: tuple[str, ...]
    upstreams: Mapping[str, UpstreamConfig]
    routes: tuple[RouteConfig, ...]
    allow_uids: frozenset[int] = frozenset()
    allow_remote: bool = False
    http: tuple[str, int] | None = None
    max_message_bytes: int = 64 << 20
    tls: TlsConfig = TlsConfig()


# ---- where something is ----


def _line_of(text: str, path: tuple[str | int, ...]) -> int | None:
    """The line of a key, as well as can be told without a parser: tables, then keys in them."""
    tables: dict[str, int] = {}
    current: tuple[str | int, ...] = ()
    best, depth = None, -1
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if header is not None:
            name = tuple(part.strip().strip("\"'") for part in header[2].split("."))
            current = name
            if header[1] == "[[":
                index = tables.get(header[2], -1) + 1
                tables[header[2]] = index
                current = (*name, index)
            here = current
        else:
            key = re.match(r"\s*([A-Za-z0-9_\"'.-]+)\s*=", line)
            if key is None:
                continue
            here = (*current, *(part.strip("\"'") for part in key[1].split(".")))
        if here == path[: len(here)] and len(here) > depth:
            best, depth = number, len(here)
    return best


class _Place:
    """One value of the file, and how complaints name it."""

    def __init__(self, file: str, text: str, path: tuple[str | int, ...], value: Any) -> None:
        self.file = file
        self.text = text
        self.path = path
        self.value = value

    def wrong(self, allowed: str) -> ConfigError:
        line = _line_of(self.text, self.path) if self.text else None
        where = f"{self.file}, line {line}" if line is not None else self.file
        name = ""
        for part in self.path:
            name += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if name else ''}{part}"
        return ConfigError(f"{where}: {name}: {allowed}" if name else f"{where}: {allowed}")

    def table(self, keys: Iterable[str] | None = None) -> dict[str, _Place]:
        """The entries of a table, which may have these keys only."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"expected a table, not {self.value!r}")
        entries = {key: self.at(key) for key in self.value}
        if keys is not None:
            for key in sorted(self.value.keys() - set(keys)):
                raise entries[key].wrong(f"unknown key; allowed: {', '.join(keys)}")
        return entries

    def at(self, key: str | int) -> _Place:
        return _Place(self.file, self.text, (*self.path, key), self.value[key])

    def items(self) -> list[_Place]:
        if not isinstance(self.value, list):
            raise self.wrong(f"expected a list, not {self.value!r}")
        return [self.at(index) for index in range(len(self.value))]

    def checked(self, test: Callable[[Any], bool], allowed: str) -> Any:
        if not test(self.value):
            raise self.wrong(f"expected {allowed}, not {self.value!r}")
        return self.value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(place: _Place) -> str:
    value: str = place.checked(lambda v: isinstance(v, str), "a string")
    return value


def _bool(place: _Place) -> bool:
    value: bool = place.checked(lambda v: isinstance(v, bool), "true or false")
    return value


def _seconds(place: _Place) -> float:
    return float(place.checked(lambda v: _is_number(v) and v > 0, "seconds above 0"))


def _rate(place: _Place) -> float:
    return float(place.checked(lambda v: _is_number(v) and v > 0, "a number above 0"))


def _burst(place: _Place) -> float:
    return float(place.checked(lambda v: _is_number(v) and v >= 1, "a number from 1 on"))


def _count(place: _Place) -> int:
    value: int = place.checked(lambda v: _is_int(v) and v >= 1, "an integer from 1 on")
    return value


def _retries(place: _Place) -> int:
    value: int = place.checked(lambda v: _is_int(v) and 0 <= v <= 100, "an integer from 0 to 100")
    return value


def _size(place: _Place) -> int:
    value: int = place.checked(
        lambda v: _is_int(v) and 1024 <= v <= 0xFFFF_FFFF, "bytes from 1024 to 4294967295"
    )
    return value


def _uids(place: _Place) -> frozenset[int]:
    uids = place.items()
    return frozenset(uid.checked(lambda v: _is_int(v) and v >= 0, "a uid") for uid in uids)


def _address(place: _Place) -> str:
    text = _text(place)
    scheme = text.partition("://")[0]
    if scheme in _GRPC:
        if re.fullmatch(r"grpcs?://(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/]+):\d{1,5}", text) is None:
            raise place.wrong(f"address {text!r}: expected {scheme}://HOST:PORT")
        return text
    try:
        addresses.parse(text)
    except ConnectError as error:
        raise place.wrong(f"{error}, or grpc://, grpcs://") from None
    return text


def _addresses(place: _Place) -> tuple[str, ...]:
    places = [place] if isinstance(place.value, str) else place.items()
    if not places:
        raise place.wrong("expected at least one address")
    texts = tuple(_address(one) for one in places)
    if len(set(texts)) != len(texts):
        raise place.wrong("an address is there twice")
    return texts


def _http(place: _Place) -> tuple[str, int]:
    text = _text(place)
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise place.wrong(f"expected HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)


def _tls(place: _Place) -> TlsConfig:
    entries = place.table(("ca", "cert", "key", "server_name"))
    tls = TlsConfig(**{key: _text(value) for key, value in entries.items()})
    if (tls.cert is None) != (tls.key is None):
        raise place.wrong("cert and key go together")
    return tls


def _weights(place: _Place, upstreams: Mapping[str, UpstreamConfig]) -> Mapping[str, int]:
    if isinstance(place.value, str):
        shares = {place.value: place}
        weights = {place.value: 1}
    else:
        shares = place.table()
        if not shares:
            raise place.wrong("expected an upstream, or a table of upstreams and their weights")
        weights = {name: _count(share) for name, share in shares.items()}
    for name, share in shares.items():
        if name not in upstreams:
            known = ", ".join(upstreams) or "none is defined"
            raise share.wrong(f"there is no upstream {name!r}; defined: {known}")
    return weights


_UPSTREAM: dict[str, Callable[[_Place], Any]] = {
    "endpoints": _addresses,
    "connect_timeout": _seconds,
    "eject_after": _count,
    "eject_seconds": _seconds,
    "tls": _tls,
    "keepalive": _seconds,
}
_ROUTE: dict[str, Callable[[_Place], Any]] = {
    "prefix": _text,
    "timeout": _seconds,
    "retries": _retries,
    "max_concurrency": _count,
    "rate": _rate,
    "burst": _burst,
    "break_after": _count,
    "break_seconds": _seconds,
    "allow_uids": _uids,
}
_TOP: dict[str, Callable[[_Place], Any]] = {
    "listen": _addresses,
    "allow_uids": _uids,
    "allow_remote": _bool,
    "http": _http,
    "max_message_bytes": _size,
    "tls": _tls,
}


def _upstream(name: str, place: _Place) -> UpstreamConfig:
    entries = place.table(_UPSTREAM)
    if "endpoints" not in entries:
        raise place.wrong("endpoints is missing: the upstream's addresses")
    values = {key: _UPSTREAM[key](value) for key, value in entries.items()}
    upstream = UpstreamConfig(name, **values)
    if upstream.tls != TlsConfig() and not any(e.startswith("grpcs:") for e in upstream.endpoints):
        raise entries["tls"].wrong("only grpcs:// endpoints have tls")
    return upstream


def _route(place: _Place, upstreams: Mapping[str, UpstreamConfig]) -> RouteConfig:
    entries = place.table((*_ROUTE, "upstream"))
    if "upstream" not in entries:
        raise place.wrong("upstream is missing: a name, or a table of names and weights")
    weights = _weights(entries.pop("upstream"), upstreams)
    values = {key: _ROUTE[key](value) for key, value in entries.items()}
    if "burst" in values and "rate" not in values:
        raise entries["burst"].wrong("burst goes with rate")
    if "break_seconds" in values and "break_after" not in values:
        raise entries["break_seconds"].wrong("break_seconds goes with break_after")
    route = RouteConfig(values.pop("prefix", ""), weights, **values)
    if route.rate is not None and "burst" not in values:
        route = replace(route, burst=max(1.0, route.rate))
    return route


def _where(text: str) -> tuple[str, ...]:
    """What two ways to write the same address have in common."""
    if is_grpc(text):
        return (text.partition("://")[2],)
    one = addresses.parse(text)
    return one.transport, one.path, one.host, str(one.port)


def _refuse_itself(listen: Iterable[str], upstreams: Mapping[str, _Place]) -> None:
    """Calls that the sidecar passed on to itself would go round until its threads are used up."""
    own = {_where(text) for text in listen}
    for upstream in upstreams.values():
        endpoints = upstream.table()["endpoints"]
        for place in [endpoints] if isinstance(endpoints.value, str) else endpoints.items():
            if _where(place.value) in own:
                raise place.wrong(f"the sidecar listens at {place.value} itself")


def _config(place: _Place) -> Config:
    entries = place.table((*_TOP, "upstreams", "routes"))
    for key, what in (("listen", "addresses"), ("upstreams", "tables"), ("routes", "tables")):
        if key not in entries:
            raise place.wrong(f"{key} is missing: expected {what}")
    places = entries.pop("upstreams").table()
    upstreams = {name: _upstream(name, one) for name, one in places.items()}
    routes = [_route(one, upstreams) for one in entries["routes"].items()]
    if not routes:
        raise entries["routes"].wrong("expected at least one route")
    seen: set[str] = set()
    for index, route in enumerate(routes):
        if route.prefix in seen:
            raise entries["routes"].at(index).wrong(f"another route has prefix {route.prefix!r}")
        seen.add(route.prefix)
    del entries["routes"]
    config = Config(
        upstreams=upstreams,
        routes=tuple(routes),
        **{key: _TOP[key](value) for key, value in entries.items()},
    )
    _refuse_itself(config.listen, places)
    if any(text.startswith("grpcs:") for text in config.listen) and config.tls.cert is None:
        raise place.wrong(
            "listening at grpcs:// needs a certificate and its key: cert and key in [tls], "
            "or --cert and --key"
        )
    return config


# ---- the two sources ----


def load(path: str) -> Config:
    """Read a TOML file; ``ConfigError``."""
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        msg = f"{path}: TOML needs Python 3.11, or: pip install 'shmrpc[sidecar]'"
        raise ConfigError(msg) from None
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        value = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError, which names the line
        raise ConfigError(f"{path}: no TOML: {error}") from error
    return _config(_Place(path, text, (), value))


def of_options(listen: Iterable[str], upstream: Iterable[str], **options: Any) -> Config:
    """One route for everything, as given on the command line; ``ConfigError``."""
    entries = {key: value for key, value in options.items() if value is not None}
    only: dict[str, Any] = {"endpoints": list(upstream)}
    if "tls" in entries:  # for whichever side speaks TLS
        sides = {"upstream": upstream, "listen": listen}
        secure = [side for side, all_ in sides.items() if any(a.startswith("grpcs:") for a in all_)]
        if "upstream" in secure:
            only["tls"] = entries["tls"]
        if secure and "listen" not in secure:
            del entries["tls"]
    route: dict[str, Any] = {"upstream": "upstream"}
    for key in ("timeout", "retries"):
        if key in entries:
            route[key] = entries.pop(key)
    value = {
        "listen": list(listen),
        "upstreams": {"upstream": only},
        "routes": [route],
        **entries,
    }
    return _config(_Place("command line", "", (), value))
