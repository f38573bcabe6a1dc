"""The sidecar's file: what it says, and complaints that name the line and what is allowed."""

import pytest

from shmrpc.sidecar import ConfigError, load
from shmrpc.sidecar.config import RouteConfig, TlsConfig, of_options

GOOD = """\
listen = ["shm://orders", "tcp://127.0.0.1:7000"]
allow_uids = [1001, 1002]
http = "127.0.0.1:9900"
max_message_bytes = 1_000_000

[upstreams.backend]
endpoints = ["tcp://10.0.0.2:7000", "tcp://10.0.0.3:7000"]
connect_timeout = 0.5
eject_after = 3
eject_seconds = 20

[upstreams.canary]
endpoints = "shm://canary"

[[routes]]
upstream = { backend = 9, canary = 1 }
timeout = 2
retries = 2
max_concurrency = 100
rate = 500
break_after = 20
break_seconds = 1.5

[[routes]]
prefix = "admin."
upstream = "backend"
allow_uids = [0]
"""


@pytest.fixture
def reads(tmp_path):
    def read(text):
        path = tmp_path / "s.toml"
        path.write_text(text)
        return load(str(path))

    return read


def test_a_whole_file(reads):
    config = reads(GOOD)
    assert config.listen == ("shm://orders", "tcp://127.0.0.1:7000")
    assert config.allow_uids == {1001, 1002}
    assert config.http == ("127.0.0.1", 9900)
    assert config.max_message_bytes == 1_000_000
    backend, canary = config.upstreams["backend"], config.upstreams["canary"]
    assert backend.endpoints == ("tcp://10.0.0.2:7000", "tcp://10.0.0.3:7000")
    assert (backend.connect_timeout, backend.eject_after, backend.eject_seconds) == (0.5, 3, 20.0)
    assert canary.endpoints == ("shm://canary",)
    first, second = config.routes
    assert first == RouteConfig(
        "",
        {"backend": 9, "canary": 1},
        timeout=2.0,
        retries=2,
        max_concurrency=100,
        rate=500.0,
        burst=500.0,
        break_after=20,
        break_seconds=1.5,
    )
    assert second == RouteConfig("admin.", {"backend": 1}, allow_uids=frozenset({0}))


# What is changed in the good file, and what is said of it.
WRONG = [
    (
        'http = "127.0.0.1:9900"',
        "htpp = 1",
        "line 3: htpp: unknown key; allowed: listen, allow_uids",
    ),
    ('http = "127.0.0.1:9900"', "http = 80", "line 3: http: expected a string, not 80"),
    ('http = "127.0.0.1:9900"', 'http = "web"', "line 3: http: expected HOST:PORT, not 'web'"),
    ("[1001, 1002]", '["root"]', "line 2: allow_uids[1]: expected a uid, not 'root'"),
    ("1_000_000", "5", "line 4: max_message_bytes: expected bytes from 1024 to 4294967295, not 5"),
    ('"shm://orders"', '"ftp://x"', "line 1: listen[1]: address 'ftp://x': unknown scheme 'ftp'"),
    ('"shm://orders"', '"grpc://x"', "line 1: listen[1]: address 'grpc://x': expected grpc://HOST"),
    ('"shm://orders"', '"tcp://127.0.0.1:7000"', "line 1: listen: an address is there twice"),
    ("connect_timeout = 0.5", "connect_timeout = 0", "line 8: upstreams.backend.connect_timeout"),
    ("eject_after = 3", "eject_after = true", "expected an integer from 1 on, not True"),
    ("eject_seconds = 20", "eject = 20", "line 10: upstreams.backend.eject: unknown key; allowed:"),
    ('endpoints = "shm://canary"', "", "line 12: upstreams.canary: endpoints is missing"),
    (
        'endpoints = "shm://canary"',
        "endpoints = []",
        "line 13: upstreams.canary.endpoints: expected",
    ),
    ("canary = 1", "canary = 0", "line 16: routes[1].upstream.canary: expected an integer from 1"),
    ("canary = 1", "carany = 1", "there is no upstream 'carany'; defined: backend, canary"),
    (
        "timeout = 2",
        "timeout = inf",
        "line 17: routes[1].timeout: expected seconds above 0, not inf",
    ),
    (
        "retries = 2",
        "retries = -1",
        "line 18: routes[1].retries: expected an integer from 0 to 100",
    ),
    ("rate = 500", "burst = 5", "line 20: routes[1].burst: burst goes with rate"),
    ("break_after = 20", "", "routes[1].break_seconds: break_seconds goes with break_after"),
    ('prefix = "admin."', 'prefix = ""', "line 24: routes[2]: another route has prefix ''"),
    ('upstream = "backend"', "", "line 24: routes[2]: upstream is missing"),
    ('upstream = "backend"', "upstream = {}", "line 26: routes[2].upstream: expected an upstream"),
    ("[upstreams.canary]", "[upstreams.canary", "no TOML: "),
    ("allow_uids = [0]", 'tls = "x"', "line 27: routes[2].tls: unknown key"),
    ("eject_after = 3", 'tls = { ca = "x" }', "only grpcs:// endpoints have tls"),
]


@pytest.mark.parametrize(
    "old, new, complaint", WRONG, ids=[new or f"no {old}" for old, new, _ in WRONG]
)
def test_complaints(reads, old, new, complaint, tmp_path):
    assert GOOD.count(old) == 1 or old == 'upstream = "backend"'
    with pytest.raises(ConfigError) as caught:
        reads(GOOD.replace(old, new))
    assert complaint in str(caught.value)
    assert str(tmp_path / "s.toml") in str(caught.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "listen is missing: expected addresses"),
        (
            'listen = 5\n[upstreams.u]\nendpoints = "shm://x"\n[[routes]]\nupstream = "u"',
            "line 1: listen: expected a list, not 5",
        ),
        ('listen = "shm://x"\nupstreams = 3\nroutes = []', "line 2: upstreams: expected a table"),
        ('listen = "shm://x"\nroutes = []\n[upstreams]', "line 2: routes: expected at least one"),
        (
            'listen = "grpcs://h:1"\nroutes=[{upstream="u"}]\n[upstreams.u]\nendpoints="shm://x"',
            "cert",
        ),
        (
            'listen = "shm://x"\n[upstreams.u]\nendpoints = ["y", "x"]\n[[routes]]\nupstream = "u"',
            "line 3: upstreams.u.endpoints[2]: the sidecar listens at x itself",
        ),
        (
            'listen = "grpc://h:1"\nroutes=[{upstream="u"}]\n[upstreams.u]\nendpoints="grpc://h:1"',
            "the sidecar listens at grpc://h:1 itself",
        ),
        ("listen = '\xff'", "no TOML"),
    ],
)
def test_other_complaints(reads, text, complaint, tmp_path):
    path = tmp_path / "s.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert complaint in str(caught.value)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="Is a directory"):
        load(str(tmp_path))


def test_options():
    config = of_options(["shm://a"], ["tcp://127.0.0.1:1", "shm://b"], timeout=2.0, retries=3)
    assert config.routes == (RouteConfig("", {"upstream": 1}, timeout=2.0, retries=3),)
    assert config.upstreams["upstream"].endpoints == ("tcp://127.0.0.1:1", "shm://b")
    assert config.tls == TlsConfig()
    with pytest.raises(ConfigError, match=r"command line: listen\[1\]: address"):
        of_options(["sh m"], ["shm://b"])
    with pytest.raises(ConfigError, match="expected an integer from 0"):
        of_options(["shm://a"], ["shm://b"], retries=-1)
