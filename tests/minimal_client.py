"""A client of shmrpc over shared memory, without shmrpc: written from docs/protocol.md alone.

It polls, and rings the server's bell after each frame: that needs no fence. Python has no acquire
and release either, so this is for x86-64, and for reading.
"""

import contextlib
import itertools
import mmap
import os
import socket
import struct
import time

import msgpack

HANDSHAKE = struct.Struct("<8sHBBIIIII32x")  # magic version kind transport pid ring max reason 0
HELLO, WELCOME, ATTACH, READY, REFUSE = range(1, 6)
FRAME = struct.Struct("<IBBHQQII")  # length kind flags method_bytes call_id deadline metadata total
REQUEST, REPLY, NOTIFY, CONTINUE, CANCEL, PING = range(1, 7)
MORE, KEYWORDS, SHM, VERSION, MAX_MESSAGE = 1, 2, 1, 1, 64 << 20
BLOCKS, ENTRY, INLINE = 32, struct.Struct("<QQIIII"), 0xFFFFFFFF
BYTES_BESIDE = (
    b"\x80\0\0\0\0"  # of a value: its kind is bytes, which are the buffer with this number
)
RING, SEGMENT_MAGIC = 4096, struct.pack("<II", 0x31637072, 1)
TAIL, HEAD, ARM, SPACE = 128 // 8, 256 // 8, 384 // 8, 392 // 8  # as 64-bit words


def need(condition, what):
    if not condition:
        raise ConnectionError(what)


def unpack_beside(data):
    """A body with buffers behind it, for we take none in shared memory."""
    count, _ = struct.unpack_from("<II", data)
    end = 8 + ENTRY.size * count
    entries = list(ENTRY.iter_unpack(data[8:end]))
    need(all(entry[2] == INLINE for entry in entries), "a block that we can't have")
    start = len(data) - sum(entry[1] for entry in entries)
    ends = itertools.accumulate((entry[1] for entry in entries), initial=start)
    buffers = [data[a:b] for a, b in itertools.pairwise(ends)]

    def value(code, content):
        need((code, content[:5]) == (83, BYTES_BESIDE), "a value of a kind that we don't know")
        return buffers[int.from_bytes(content[5:], "little")]

    return msgpack.unpackb(data[end:start], ext_hook=value)


class Side:
    def __init__(self, fd, ring_bytes, protection):
        need(os.fstat(fd).st_size == RING + ring_bytes, "a segment of the wrong size")
        self.memory = mmap.mmap(fd, RING + ring_bytes, prot=protection)
        # Indexing this loads or stores 8 bytes at once; struct would go byte by byte.
        self.words = memoryview(self.memory)[:RING].cast("Q")
        self.ring_bytes = ring_bytes

    def read(self, position, count):
        start = RING + (position & (self.ring_bytes - 1))
        first = self.memory[start : start + count]
        return first + self.memory[RING : RING + count - len(first)]

    def write(self, position, data):
        start = RING + (position & (self.ring_bytes - 1))
        first = min(len(data), RING + self.ring_bytes - start)
        self.memory[start : start + first] = data[:first]
        self.memory[RING : RING + len(data) - first] = data[first:]


class MinimalClient:
    def __init__(self, path, ring_bytes=65536):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.tail = self.head = self.peer_head = self.peer_tail = 0
        self.ids = itertools.count(0x10001, 0x10000)
        self._shake(HELLO, ring_bytes)
        (peer_ring, self.peer_max), (segment, self.bell) = self._answer(WELCOME, 2)
        self.peer = Side(segment, peer_ring, mmap.PROT_READ)
        need(self.peer.memory[:8] == SEGMENT_MAGIC, "no segment of this protocol")
        own = os.memfd_create("minimal")
        os.posix_fallocate(own, 0, RING + ring_bytes)
        self.own = Side(own, ring_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        self.own.memory[:8] = SEGMENT_MAGIC
        self.own.words[ARM] = 1 << 1  # epoch 1, awake: we poll
        own_bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._shake(ATTACH, ring_bytes, [own, own_bell])
        self._answer(READY, 0)
        for fd in (segment, own, own_bell):
            os.close(fd)

    def _shake(self, kind, ring_bytes, fds=()):
        fields = (b"shmrpc\r\n", VERSION, kind, SHM, os.getpid(), ring_bytes, MAX_MESSAGE, 0, 0)
        socket.send_fds(self.socket, [HANDSHAKE.pack(*fields)], fds)

    def _answer(self, expected, fd_count):
        data, fds, _, _ = socket.recv_fds(self.socket, HANDSHAKE.size, 2)
        need(len(data) == HANDSHAKE.size, "the server hung up")
        magic, version, kind, transport, _, ring, longest, reason, _ = HANDSHAKE.unpack(data)
        need(magic == b"shmrpc\r\n", "this is not shmrpc")
        need(kind != REFUSE, self.socket.recv(reason) if kind == REFUSE else "")
        seen = (version, transport, kind, len(fds))
        need(seen == (VERSION, SHM, expected, fd_count), "not what was expected")
        return (ring, longest), fds

    def close(self):
        self.socket.close()
        os.close(self.bell)

    def ring(self):
        with contextlib.suppress(BlockingIOError):  # it has enough bells
            os.write(self.bell, struct.pack("=Q", 1))

    def _idle(self):
        if self.peer.words[SPACE] & 1:
            self.ring()
        time.sleep(0)
        with contextlib.suppress(BlockingIOError):
            need(self.socket.recv(64, socket.MSG_DONTWAIT), "the server hung up")

    def _send_frame(self, kind, flags, method_bytes, call_id, deadline_ns, total, payload):
        span = 32 + len(payload) + 7 & ~7
        while self.own.ring_bytes - (self.tail - self.peer_head) < span:
            self._idle()
            seen, self.peer_head = self.peer_head, self.peer.words[HEAD]
            need(seen <= self.peer_head <= self.tail, "an impossible head")
        fields = (len(payload), kind, flags, method_bytes, call_id, deadline_ns, 0, total)
        self.own.write(self.tail, FRAME.pack(*fields) + payload)
        self.tail = self.own.words[TAIL] = self.tail + span
        self.ring()

    def send(self, kind, method="", body=b"", flags=0, call_id=0, deadline_ns=0):
        payload, most = method.encode() + body, self.own.ring_bytes // 4 - 32
        need(len(payload) <= self.peer_max, "longer than the server accepts")
        rest = (len(method.encode()), call_id, deadline_ns, len(payload))
        for start in range(0, max(1, len(payload)), most):
            first = (CONTINUE if start else kind, flags | MORE * (start + most < len(payload)))
            self._send_frame(*first, *rest, payload[start : start + most])

    def _receive_frame(self):
        while self.peer_tail == self.head:
            self._idle()
            self.peer_tail = self.peer.words[TAIL]
        used, most = self.peer_tail - self.head, self.peer.ring_bytes // 4 - 32
        need(32 <= used <= self.peer.ring_bytes and used % 8 == 0, "an impossible tail")
        length, *header = FRAME.unpack(self.peer.read(self.head, 32))
        span = 32 + length + 7 & ~7
        need(length <= most and span <= used, "an impossible length")
        payload = self.peer.read(self.head + 32, length)
        self.head = self.own.words[HEAD] = self.head + span
        return *header, payload

    def wait(self, call_id):
        while True:
            kind, flags, status, answered, _, metadata, total, payload = self._receive_frame()
            decode = unpack_beside if flags & BLOCKS else msgpack.unpackb
            while flags & MORE:
                piece_kind, flags, _, piece_id, _, _, _, piece = self._receive_frame()
                need((piece_kind, piece_id) == (CONTINUE, answered), "not the next piece")
                payload += piece
            need(len(payload) == total, "a message of the wrong length")
            if (kind, answered) == (REPLY, call_id):
                return status, decode(payload[metadata:]) if payload else None

    def call(self, kind, method="", *args, timeout=None, **kwargs):
        call_id, flags = next(self.ids), KEYWORDS if kwargs else 0
        body = b"" if kind == PING else msgpack.packb([args, kwargs] if kwargs else args)
        deadline = time.monotonic_ns() + int(timeout * 1e9) if timeout is not None else 0
        self.send(kind, method, body, flags, call_id, deadline)
        return self.wait(call_id)
