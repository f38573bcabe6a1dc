"""The processes of test_hostile_peer.py: ``python hostile.py ROLE ...``; not a test itself."""

import argparse
import contextlib
import fcntl
import mmap
import os
import random
import select
import struct
import sys
import threading
import time
from collections import Counter

import shmrpc
from shmrpc import address, handshake, rendezvous
from shmrpc._native import ffi

TAIL, HEAD, ARM, SPACE, QUEUED, RING = 128 // 8, 256 // 8, 384 // 8, 392 // 8, 512 // 8, 4096 // 8
FRAME = struct.Struct("<IBBHQQII")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x0010 | fcntl.F_SEAL_SEAL
WORD = (1 << 64) - 1


def ready():
    print("ready", flush=True)


def drive(steps, sock):
    """Run one side's handshake to its end."""
    try:
        while True:
            next(steps)
            select.select([sock], [], [], 10)
    except StopIteration as stop:
        return stop.value


class Peer:
    """A connection that was made by the rules, and our segment to write into."""

    def __init__(self, agreement):
        self.agreement = agreement
        size = 4096 + agreement.own_ring_bytes
        self.own = memoryview(ffi.buffer(agreement._own_segment, size))
        self.words = self.own.cast("Q")
        self.ring_bytes = agreement.own_ring_bytes
        self.mapping = mmap.mmap(
            agreement._peer_segment,
            4096 + agreement.peer_ring_bytes,
            mmap.MAP_SHARED,
            mmap.PROT_READ,
        )
        self.theirs = memoryview(self.mapping).cast("Q")
        self.tail = 0
        self.poll = select.poll()
        self.poll.register(agreement.socket, select.POLLRDHUP)

    def ring(self):
        with contextlib.suppress(BlockingIOError):
            os.write(self.agreement._peer_bell, (1).to_bytes(8, "little"))

    def ended(self):
        return bool(self.poll.poll(0))

    def push(self, header, payload=b""):
        """Append a frame if it fits."""
        data = header + payload + bytes(-(len(header) + len(payload)) % 8)
        if self.ring_bytes - (self.tail - self.theirs[HEAD]) < len(data):
            return
        for start in range(0, len(data), 8):
            offset = (self.tail + start) % self.ring_bytes
            self.words[RING + offset // 8] = int.from_bytes(data[start : start + 8], "little")
        self.tail += len(data)
        self.words[TAIL] = self.tail

    def close(self):
        self.words.release()
        self.own.release()
        self.theirs.release()
        self.mapping.close()
        self.agreement.close()


# ---- manners ----


def scribble_words(peer, rng):
    """Anything anywhere, now and then nearly right."""
    for _ in range(rng.randrange(1, 300)):
        place = rng.choice(
            [ARM, SPACE, QUEUED + rng.randrange(448), RING + rng.randrange(peer.ring_bytes // 8)]
        )
        peer.words[place] = rng.getrandbits(64)
    if rng.random() < 0.1:
        peer.words[HEAD] = rng.choice([rng.getrandbits(64), peer.theirs[TAIL]])
    if rng.random() < 0.2:
        near = (peer.theirs[HEAD] + 8 * rng.randrange(-4, 64)) & WORD
        peer.words[TAIL] = rng.choice([rng.getrandbits(64), near, near, near])
    peer.ring()


def scribble_frames(peer, rng):
    """Frames in the right place with anything in their headers."""
    for _ in range(rng.randrange(1, 50)):
        length = rng.randrange(200)
        kind = rng.choice([1, 1, 1, 2, 3, 4, 5, 6, rng.randrange(256)])
        flags = rng.choice([0, 0, 0, 1, 2, 3, rng.randrange(256)])
        method = rng.choice([3, 3, rng.randrange(256), rng.randrange(65536)])
        metadata = rng.choice([0, 0, rng.randrange(length + 1), rng.getrandbits(32)])
        total = rng.choice([length, length, length, length, length + 100, rng.getrandbits(32)])
        deadline = rng.choice([0, 0, 1, rng.getrandbits(64)])
        if rng.random() < 0.9 and kind < 100:  # mostly right: deeper in
            flags, total = flags & 2, length
            metadata = 0
            method = min(method, length) or 1
            length = total = max(length, method)
        header = FRAME.pack(
            length, kind, flags, method, rng.getrandbits(64), deadline, metadata, total
        )
        peer.push(header, b"add" + rng.randbytes(max(length - 3, 0)))
    peer.words[HEAD] = peer.theirs[TAIL]
    peer.ring()


def scribble_control(peer, rng):
    """The words that wake, and nothing that would end the connection."""
    for _ in range(200):
        peer.words[rng.choice([ARM, SPACE])] = rng.getrandbits(64)
        peer.words[QUEUED + rng.randrange(448)] = rng.getrandbits(64)
        if rng.random() < 0.05:
            peer.push(FRAME.pack(0, 6, 0, 0, 9, 0, 0, 0))  # ping
    peer.words[HEAD] = peer.theirs[TAIL]
    peer.ring()


def scribble_fill(peer, rng):
    """Requests as fast as they go in, and no answer is ever fetched."""
    for _ in range(500):
        peer.push(FRAME.pack(5, 1, 0, 3, 9, 0, 0, 5), b"add\x92\x01")
    peer.ring()
    if rng.random() < 0.002:
        peer.words[TAIL] = rng.getrandbits(64)


def scribble_streams(peer, rng):
    """Frames of streams: of calls that were made, were not, are over, or anything."""
    ids = [number << 16 | 1 for number in range(1, 12)]
    for _ in range(rng.randrange(1, 60)):
        call_id = rng.choice([*ids, rng.getrandbits(64)])
        kind = rng.choice([1, 7, 7, 7, 8, 9, 9, 10, 5, 2, 11 + rng.randrange(20)])
        flags = rng.choice([16, 16, 16, 0, rng.randrange(32) & ~1])
        body = rng.choice([b"\x01", b"\x01", b"\xc1", rng.randbytes(rng.randrange(40))])
        name = b""
        if kind == 1:
            name = rng.choice([b"count", b"total", b"chat", b"add"])
            flags, body = rng.choice([4, 4, 12, 0, 6]), rng.choice([b"\x90", b"\x91\x05", body])
        elif kind == 9:
            body = rng.choice([struct.pack("<II", rng.getrandbits(9), rng.getrandbits(20)), body])
        size = len(name) + len(body)
        peer.push(FRAME.pack(size, kind, flags, len(name), call_id, 0, 0, size), name + body)
    peer.words[HEAD] = peer.theirs[TAIL]
    peer.ring()


def requests(peer):
    """The ids of the calls that have come, and nothing that came is left after that."""
    end = peer.theirs[TAIL]
    head = peer.words[HEAD]
    size = peer.agreement.peer_ring_bytes
    while head != end:
        words = [peer.theirs[RING + (head + 8 * i) % size // 8] for i in range(4)]
        length, kind, _, _, call_id, _, _, _ = FRAME.unpack(struct.pack("<4Q", *words))
        head += (32 + length + 7) & ~7
        if kind == 1:
            yield call_id
    peer.words[HEAD] = head
    peer.ring()


def answer_streams(peer, rng):
    """Whoever opens a stream gets items, credit, ends and replies of any kind for it."""
    for call_id in requests(peer):
        for _ in range(rng.randrange(700)):
            kind = rng.choice([7, 7, 7, 7, 7, 7, 9, 10, 8, 2 if rng.random() < 0.02 else 7])
            body = rng.choice([b"\x01", b"\x01", rng.randbytes(rng.randrange(12))])
            fields = (len(body), kind, 0, 0, call_id, 0, 0, len(body))
            peer.push(FRAME.pack(*fields), body)


def answer_calls(peer, rng):
    """Whatever is asked: an answer with this call's id and anything else in it."""
    for call_id in requests(peer):
        body = rng.randbytes(rng.choice([0, 1, 5, 100]))
        metadata = rng.choice([0, 0, min(2, len(body))])
        status = rng.choice([0, 0, 2, 16, 17, 65535])
        fields = (len(body), 2, rng.choice([0, 2]), status, call_id, 0, metadata, len(body))
        peer.push(FRAME.pack(*fields), body)


def stay_silent(peer, rng):
    time.sleep(0.01)


MANNERS = {
    "words": scribble_words,
    "frames": scribble_frames,
    "control": scribble_control,
    "fill": scribble_fill,
    "streams": scribble_streams,
    "answers": answer_calls,
    "items": answer_streams,
    "silent": stay_silent,
}


# ---- roles ----


def serve(name, allow):
    server = shmrpc.Server(name, workers=4, allow_uids=[allow] if allow else ())

    @server.method
    def add(left, right):
        return left + right

    @server.method
    def count(limit):
        yield from range(limit)

    @server.method(requests=True)
    def total(requests):
        return sum(requests)

    @server.method(requests=True)
    def chat(requests):
        yield from requests

    server.start()
    ready()
    threading.Event().wait()


def be_hostile_client(name, manner, seed, seconds):
    rng = random.Random(seed)
    terms = handshake.Terms(address.parse(name), 1 << 20)
    deadline = time.monotonic() + seconds
    connections = 0
    while time.monotonic() < deadline:
        sock = rendezvous.open_socket(terms.address, 5.0)
        peer = Peer(drive(handshake.client_side(sock, terms), sock))
        connections += 1
        until = min(deadline, time.monotonic() + seconds / 3)
        while not peer.ended() and time.monotonic() < until:
            MANNERS[manner](peer, rng)
        peer.close()
    print(f"{connections} connections")


def be_hostile_server(name, manner, seed):
    rng = random.Random(seed)
    terms = handshake.Terms(address.parse(name), 1 << 20)
    listener = rendezvous.Listener(terms.address)
    listener.socket.setblocking(True)
    ready()
    while True:
        sock, _ = listener.socket.accept()
        sock.setblocking(False)
        try:
            agreement = drive(handshake.server_side(sock, terms), sock)
        except shmrpc.ConnectError:
            continue
        peer = Peer(agreement)
        agreement.socket.send(agreement.final)
        until = time.monotonic() + 0.3
        while not peer.ended() and (
            manner in ("answers", "items", "silent") or time.monotonic() < until
        ):
            MANNERS[manner](peer, rng)
        peer.close()


def be_victim(name, seconds):
    """A real client of a hostile server: count how its calls end."""
    outcomes = Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with shmrpc.connect(name, timeout=2.0) as client:
                for _ in range(20):
                    started = time.monotonic()
                    try:
                        client.call("add", 1, 2, timeout=0.1)
                        for _ in client.stream("count", 3, timeout=0.1):
                            outcomes["item"] += 1
                        with client.open("chat", timeout=0.1) as call:
                            for number in range(30):
                                call.send(number)
                            call.close_send()
                            outcomes["reply"] += len(list(call))
                        outcomes["result"] += 1
                    except shmrpc.Error as error:
                        outcomes[type(error).__name__] += 1
                    if time.monotonic() - started > 5:
                        print("unexpected: a call took", time.monotonic() - started)
        except shmrpc.ConnectError:
            outcomes["ConnectError"] += 1
        except BaseException as error:
            print(f"unexpected: {error!r}")
            raise
    for kind, count in outcomes.items():
        print(kind, count)


def be_stranger(name, manner, uid):
    """A client of another uid, whose memory is sealed or not."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    terms = handshake.Terms(address.parse(name), 1 << 20, allow_uids=frozenset([0]))
    if manner == "unsealed":
        handshake.segments.Segment.seal = lambda segment: None
    sock = rendezvous.open_socket(terms.address, 5.0)
    try:
        drive(handshake.client_side(sock, terms), sock)
    except shmrpc.ConnectError as error:
        print(error)
    else:
        print("ready")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--allow", type=int, default=0)
    options = parser.parse_args()
    values = options.arguments
    if options.role == "server":
        serve(values[0], options.allow)
    elif options.role == "client":
        be_hostile_client(values[0], values[1], int(values[2]), float(values[3]))
    elif options.role == "hostile-server":
        be_hostile_server(values[0], values[1], int(values[2]))
    elif options.role == "victim":
        be_victim(values[0], float(values[1]))
    else:
        be_stranger(values[0], values[1], int(values[2]))


if __name__ == "__main__":
    sys.exit(main())
