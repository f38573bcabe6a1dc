"""Frames of streams that nobody should send: each ends its own call at most, or is counted."""

import contextlib
import struct
import threading

import pytest
from conftest import wait_until
from minimal_client import CANCEL, PING, REPLY, REQUEST, MinimalClient

import shmrpc
from shmrpc.session import WINDOW_MESSAGES

ITEM, END, CREDIT, INITIAL, UNKNOWN_KIND = 7, 8, 9, 10, 42
STREAM, ENDED, CALLER = 4, 8, 16
ONE, NO_MSGPACK = b"\x01", b"\xc1"


class Scene:
    def __init__(self, directory):
        self.ends = {}
        self.taken = {}
        self.gate = threading.Event()
        self.server = shmrpc.Server(f"shm://{directory}/calc.sock")

        @self.server.method
        def add(a, b):
            return a + b

        @self.server.method(requests=True)
        def swallow(requests, key):
            self.taken[key] = 0
            self.gate.wait(20)
            try:
                for _ in requests:
                    self.taken[key] += 1
            except BaseException as error:
                self.ends[key] = type(error).__name__
                raise
            self.ends[key] = "end"
            return self.taken[key]

        @self.server.method
        def count(limit):
            yield from range(limit)

        self.server.start()
        self.peer = MinimalClient(f"{directory}/calc.sock")

    def open(self, method, arguments, flags=STREAM):
        call_id = next(self.peer.ids)
        self.peer.send(REQUEST, method, arguments, flags, call_id)
        return call_id

    def dropped(self):
        return self.server.stats()["frames_dropped"]

    def is_well(self):
        assert self.peer.call(REQUEST, "add", 2, 3) == (0, 5)
        with shmrpc.connect(self.server.addresses[0]) as other:
            assert other.call("add", 1, 2) == 3
            assert list(other.stream("count", 3)) == [0, 1, 2]

    def close(self):
        self.gate.set()
        self.peer.close()
        for side in (self.peer.own, self.peer.peer):
            side.words.release()
            side.memory.close()
        self.server.stop(0)


@pytest.fixture
def scene(directory):
    with contextlib.closing(Scene(directory)) as made:
        yield made


@pytest.mark.parametrize(
    "kind, flags, body",
    [
        (ITEM, CALLER, ONE),
        (ITEM, 0, ONE),
        (END, 0, b""),
        (CREDIT, CALLER, struct.pack("<II", 5, 100)),
        (CREDIT, 0, struct.pack("<II", 5, 100)),
        (INITIAL, 0, b""),
        (REPLY, 0, ONE),
        (UNKNOWN_KIND, 0, b"?"),
    ],
)
def test_frames_of_no_call_are_counted(scene, kind, flags, body):
    scene.is_well()
    before = scene.dropped() + scene.server.stats()["late_replies"]
    for call_id in (0, 1 << 16 | 1, (1 << 64) - 1, 77 << 16 | 65535):
        scene.peer.send(kind, "", body, flags, call_id)
    scene.peer.send(CANCEL, "", b"", 0, 99 << 16)  # allowed: its call may just have ended
    wait_until(lambda: scene.dropped() + scene.server.stats()["late_replies"] >= before + 4)
    scene.is_well()


def test_a_caller_that_overruns_its_credit_ends_its_own_call(scene):
    bad, good = scene.open("swallow", b"\x91\xa3bad"), scene.open("swallow", b"\x91\xa4good")
    for _ in range(WINDOW_MESSAGES + 200):
        scene.peer.send(ITEM, "", ONE, CALLER, bad)
    scene.peer.send(ITEM, "", ONE, CALLER, good)
    scene.peer.send(END, "", b"", 0, good)
    wait_until(lambda: scene.dropped() >= 100)  # those that came after the overrun was seen
    scene.gate.set()
    wait_until(lambda: len(scene.ends) == 2)
    assert scene.ends == {"bad": "ProtocolError", "good": "end"}
    assert scene.taken["bad"] <= WINDOW_MESSAGES
    scene.is_well()


def test_an_item_that_is_none_ends_its_own_call(scene):
    scene.gate.set()
    bad, good = scene.open("swallow", b"\x91\xa3bad"), scene.open("swallow", b"\x91\xa4good")
    scene.peer.send(ITEM, "", NO_MSGPACK, CALLER, bad)
    scene.peer.send(ITEM, "", ONE, CALLER, good)
    scene.peer.send(END, "", b"", 0, good)
    wait_until(lambda: len(scene.ends) == 2)
    assert scene.ends == {"bad": "ProtocolError", "good": "end"}
    scene.is_well()


def test_what_comes_after_the_end_is_dropped(scene):
    call_id = scene.open("swallow", b"\x91\xa3key")
    scene.peer.send(ITEM, "", ONE, CALLER, call_id)
    scene.peer.send(END, "", b"", 0, call_id)
    before = scene.dropped()
    scene.peer.send(ITEM, "", ONE, CALLER, call_id)
    scene.peer.send(END, "", b"", 0, call_id)
    wait_until(lambda: scene.dropped() == before + 2)
    scene.gate.set()
    wait_until(lambda: scene.ends)
    assert (scene.ends, scene.taken) == ({"key": "end"}, {"key": 1})
    scene.is_well()


@pytest.mark.parametrize(
    "body",
    [b"", b"1234567", b"123456789", struct.pack("<II", 1, 0), struct.pack("<II", 0, 1 << 31)],
)
def test_credit_that_cannot_be_is_dropped(scene, body):
    """Wrong in size, or for items that were never sent."""
    call_id = scene.open("swallow", b"\x91\xa3key")
    wait_until(lambda: scene.taken)
    before = scene.dropped()
    scene.peer.send(CREDIT, "", body, CALLER, call_id)
    wait_until(lambda: scene.dropped() == before + 1)
    scene.is_well()


def test_an_id_that_is_used_twice(scene):
    call_id = scene.open("swallow", b"\x91\xa3one")
    wait_until(lambda: scene.taken)
    scene.peer.send(REQUEST, "swallow", b"\x91\xa3two", STREAM, call_id)
    scene.peer.send(PING, "", b"", 0, 12345 << 16)
    assert scene.peer.wait(12345 << 16) == (0, None)
    scene.is_well()
    scene.gate.set()
    scene.peer.send(END, "", b"", 0, call_id)
    wait_until(lambda: "one" in scene.ends)
    scene.is_well()


def test_a_stream_to_a_method_that_has_none(scene):
    call_id = scene.open("add", b"\x92\x01\x02")
    for _ in range(3):
        scene.peer.send(ITEM, "", ONE, CALLER, call_id)
    assert scene.peer.wait(call_id) == (0, 3)
    call_id = scene.open("nothing", b"\x90")
    scene.peer.send(ITEM, "", ONE, CALLER, call_id)
    assert scene.peer.wait(call_id)[0] == 12
    scene.is_well()
