"""The session without any I/O: credit between a sender and a receiver, and whose frame is whose."""

import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmrpc.session import WINDOW_BYTES, WINDOW_MESSAGES, Run, Session, Stream

CREDIT = struct.Struct("<II")
SIZES = st.one_of(
    st.just(0),
    st.integers(1, 300),
    st.integers(WINDOW_BYTES // 2 - 2, WINDOW_BYTES // 2 + 2),
    st.integers(WINDOW_BYTES - 2, WINDOW_BYTES + 2),
    st.just(3 * WINDOW_BYTES),
)


class Woken:
    """Who waits for a stream, and how often it was woken."""

    def __init__(self):
        self.count = 0

    def wake(self):
        self.count += 1


def run_of(sizes):
    """Items of these sizes as they arrive together: all of them, and where each ends."""
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    return Run(bytes(total), ends)


def let_credit_arrive(stream, body):
    """Let a CREDIT frame arrive; whether it was taken."""
    credit = stream.credited(body)
    if credit is not None:
        stream.grant(credit)
    return credit is not None


class Credit(RuleBasedStateMachine):
    """A sender, a receiver and what is on its way between them, each at its own pace."""

    def __init__(self):
        super().__init__()
        self.sender, self.receiver = Stream(Woken()), Stream(Woken())
        self.items, self.credits = deque(), deque()
        self.sent, self.arrived, self.taken = [], [], 0
        self.granted = [WINDOW_MESSAGES, WINDOW_BYTES]  # as far as the sender knows

    # ---- what either side may do ----

    def send(self, size):
        self.sender.sent(size)
        self.items.append(size)
        self.sent.append(size)

    @precondition(lambda self: self.sender.may_send())
    @rule(size=SIZES, times=st.integers(1, WINDOW_MESSAGES))
    def sends(self, size, times):
        while times and self.sender.may_send():
            self.send(size)
            times -= 1

    @rule(size=SIZES)
    def fails_to_send(self, size):
        before = self.sender.may_send()
        self.sender.sent(size)
        self.sender.not_sent(size)
        assert self.sender.may_send() == before

    @precondition(lambda self: self.items)
    @rule(count=st.integers(1, 2 * WINDOW_MESSAGES))
    def items_arrive(self, count):
        sizes = [self.items.popleft() for _ in range(min(count, len(self.items)))]
        assert self.receiver.items(run_of(sizes)), "who keeps to its credit is never refused"
        self.arrived += sizes

    @precondition(lambda self: self.receiver.runs)
    @rule()
    def takes(self):
        data, ends = self.receiver.take()
        sizes = self.arrived[self.taken : self.taken + len(ends)]
        expected = run_of(sizes)
        assert (data, list(ends)) == (expected.data, expected.ends)
        self.taken += len(ends)
        credit = self.receiver.due_credit()
        if credit:
            self.credits.append(credit)

    @precondition(lambda self: self.credits)
    @rule()
    def credit_arrives(self):
        credit = self.credits.popleft()
        for i, more in enumerate(CREDIT.unpack(credit)):
            self.granted[i] += more
        assert let_credit_arrive(self.sender, credit), "what was taken is credit that was due"

    # ---- what has to hold ----

    @invariant()
    def sends_within_its_credit_and_no_less(self):
        may = len(self.sent) < self.granted[0] and sum(self.sent) < self.granted[1]
        assert self.sender.may_send() == may

    @invariant()
    def never_granted_too_much(self):
        """What is on its way or not taken fits into the window, but for one item."""
        waiting = self.sent[self.taken :]
        assert len(waiting) <= WINDOW_MESSAGES
        assert sum(waiting[:-1]) < WINDOW_BYTES or not waiting
        assert not self.receiver.overrun

    @invariant()
    def never_stuck(self):
        if not (self.items or self.receiver.runs or self.credits):
            assert self.sender.may_send()

    def teardown(self):
        """From wherever it is: when all has been taken it goes on."""
        while self.items or self.receiver.runs or self.credits:
            if self.items:
                self.items_arrive(WINDOW_MESSAGES)
            if self.receiver.runs:
                self.takes()
            if self.credits:
                self.credit_arrives()
        assert self.taken == len(self.sent)
        self.never_stuck()


Credit.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
TestCredit = Credit.TestCase


# ---- peers that do not keep to it ----


@given(
    runs=st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=8),
    left=st.integers(0, 6),
)
def test_overrun_is_detected_exactly(runs, left):
    """A run is refused if any item of it was sent without credit, and everything after it."""
    stream = Stream(Woken())
    messages, size = WINDOW_MESSAGES - left, 0
    assert stream.items(run_of([0] * messages))
    accepted = 1
    for sizes in runs:
        for item in sizes:
            refused = stream.overrun or messages >= WINDOW_MESSAGES or size >= WINDOW_BYTES
            if refused:
                break
            messages += 1
            size += item
        assert stream.items(run_of(sizes)) != refused
        assert stream.overrun == stream.over == refused
        accepted += not refused
    assert len(list(iter(lambda: bool(stream.runs) and stream.take(), False))) == accepted


@given(
    sent=st.lists(SIZES, max_size=20),
    messages=st.integers(0, 0xFFFF_FFFF) | st.integers(0, 25),
    size=st.integers(0, 0xFFFF_FFFF) | st.integers(0, WINDOW_BYTES * 4),
)
def test_credit_that_was_never_due(sent, messages, size):
    """Nobody gives back more than it got, or a peer could have us send into our own memory."""
    stream = Stream(Woken())
    for item in sent:
        if stream.may_send():
            stream.sent(item)
    before = stream.granted_messages, stream.granted_bytes
    right = messages <= stream.sent_messages and size <= stream.sent_bytes
    assert let_credit_arrive(stream, CREDIT.pack(messages, size)) == right
    after = (before[0] + messages, before[1] + size) if right else before
    assert (stream.granted_messages, stream.granted_bytes) == after
    assert stream.waiters.count == right


@given(body=st.binary(max_size=20).filter(lambda body: len(body) != CREDIT.size))
def test_credit_that_is_none(body):
    stream = Stream(Woken())
    stream.sent(1000)
    assert stream.credited(body) is None
    assert stream.granted_messages == WINDOW_MESSAGES
    assert stream.waiters.count == 0


def test_credit_for_more_than_a_frame_can_say():
    """The longest item there can be, after others that were not given back yet."""
    stream = Stream(Woken())
    for size in (WINDOW_BYTES // 2 - 1, 0xFFFF_FFFF):
        stream.runs.append(Run(range(size), [size]))
    stream.take()
    assert stream.due_credit() == b""
    stream.take()
    assert CREDIT.unpack(stream.due_credit()) == (2, 0xFFFF_FFFF)
    assert stream.due_credit() == b""  # what is left is less than half a window


# ---- the end of a stream ----


def test_nothing_is_taken_after_the_end():
    stream = Stream(Woken())
    assert stream.items(run_of([3, 4]))
    assert stream.end()
    assert not stream.end()
    assert not stream.items(run_of([1]))
    assert stream.take() == (bytes(7), [3, 7])
    with pytest.raises(IndexError):
        stream.take()
    assert not stream.overrun


@pytest.mark.parametrize("how", ["replied", "lost", "cancel", "end", "begin", "items", "grant"])
def test_whoever_waits_is_woken(how):
    stream = Stream(Woken())
    stream.sent(5)
    arguments = {
        "replied": (0, b"", b""),
        "lost": (32,),
        "begin": (b"metadata",),
        "items": (run_of([1]),),
        "grant": ((WINDOW_MESSAGES + 1, WINDOW_BYTES + 5),),
    }
    getattr(stream, how)(*arguments.get(how, ()))
    assert stream.waiters.count == 1
    assert stream.ended == (how in {"replied", "lost", "cancel", "end"})
    assert stream.cancelled == (how in {"lost", "cancel"})
    assert stream.over == (how in {"replied", "lost"})


def test_what_the_reader_repeats_changes_nothing():
    """It may have been interrupted, and begins with the same event again."""
    stream = Stream(Woken())
    run = run_of([1, 2])
    assert stream.items(run)
    assert stream.items(run)
    assert (stream.received_messages, stream.overrun) == (2, False)
    assert stream.take() == (bytes(3), [1, 3])
    assert not stream.runs
    stream.sent(5)
    credit = stream.credited(CREDIT.pack(1, 5))
    for _ in range(2):
        stream.grant(credit)
    assert stream.granted_messages == WINDOW_MESSAGES + 1


def test_initial_metadata_comes_once():
    stream = Stream(Woken())
    assert stream.begin(b"first")
    assert not stream.begin(b"second")
    assert stream.initial == b"first"


# ---- whose frame is whose ----


class Calls(RuleBasedStateMachine):
    """Both directions of a connection, with few ids, so that they are met again."""

    IDS = st.integers(1, 5)

    def __init__(self):
        super().__init__()
        self.session = Session(7)
        self.calls, self.requests, self.dropped = {}, {}, 0

    @rule(call_id=IDS)
    def calls_a_stream(self, call_id):
        self.session.calls.setdefault(call_id, Stream(Woken()))
        self.calls.setdefault(call_id, self.session.calls[call_id])

    @rule(call_id=IDS, started=st.booleans())
    def is_called(self, call_id, started):
        stream = Stream(Woken())
        self.session.opened(call_id, stream)
        if call_id in self.requests:
            self.dropped += 1
        else:
            self.requests[call_id] = stream
            stream.started = started

    @rule(call_id=IDS, from_caller=st.booleans(), frames=st.integers(1, 3))
    def frames_come(self, call_id, from_caller, frames):
        known = (self.requests if from_caller else self.calls).get(call_id)
        found = self.session.stream_of(call_id, from_caller=from_caller, frames=frames)
        assert found is known
        if known is None:
            self.dropped += frames

    @rule(call_id=IDS)
    def is_replied_to(self, call_id):
        stream = self.calls.pop(call_id, None)
        assert self.session.replied(call_id, 0, b"", b"body") is None
        if stream is None:
            self.dropped += 1
        else:
            assert stream.reply == (0, b"", b"body")
            assert stream.over

    @rule(call_id=IDS)
    def is_cancelled(self, call_id):
        """Who has not started is forgotten; a handler that runs has to learn it first."""
        self.session.cancelled(call_id)
        stream = self.requests.get(call_id)
        if stream is not None:
            assert stream.cancelled
            if not stream.started:
                del self.requests[call_id]

    @rule()
    def is_lost(self):
        assert self.session.lost(32) == []
        for stream in [*self.calls.values(), *self.requests.values()]:
            assert stream.lost_error == 32
            assert stream.ended
        self.calls.clear()

    @invariant()
    def knows_its_streams(self):
        assert self.session.calls == self.calls
        assert self.session.requests == self.requests
        assert self.session.dropped == self.dropped

    @invariant()
    def ids_are_new(self):
        first, second = self.session.new_id(), self.session.new_id()
        assert first < second
        assert first & 65535 == second & 65535 == 7


Calls.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
TestCalls = Calls.TestCase
