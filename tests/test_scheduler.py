"""Functions that run later: in order, on few threads, which end."""

import threading

from conftest import wait_until

from shmrpc.scheduler import Scheduler


def test_in_order_of_time():
    scheduler = Scheduler("shmrpc-test", 1)
    ran, done = [], threading.Event()
    scheduler.after(0.15, lambda: (ran.append("c"), done.set()))
    scheduler.after(0.10, lambda: ran.append("b"))
    scheduler.after(0.05, lambda: ran.append("a"))
    assert done.wait(10)
    assert ran == ["a", "b", "c"]


def test_what_is_due_earlier_does_not_wait_for_what_came_earlier():
    scheduler = Scheduler("shmrpc-test", 1)
    done, late = threading.Event(), threading.Event()
    scheduler.after(1.0, late.set)
    scheduler.after(0.0, done.set)
    assert done.wait(10)
    assert not late.is_set()
    assert late.wait(10)


def test_what_blocks_holds_up_nobody():
    scheduler = Scheduler("shmrpc-test", 2)
    go, done = threading.Event(), threading.Event()
    scheduler.after(0, lambda: go.wait(10))
    scheduler.after(0, done.set)
    assert done.wait(10)
    go.set()


def test_one_thread_that_waits_for_two_and_blocks_in_the_first():
    scheduler = Scheduler("shmrpc-test", 2)
    go, done = threading.Event(), threading.Event()
    scheduler.after(0.3, lambda: go.wait(10))
    wait_until(lambda: scheduler._waiting == 1)
    scheduler.after(0.3, done.set)
    assert done.wait(10)
    go.set()


def test_scheduling_from_what_is_scheduled():
    scheduler = Scheduler("shmrpc-test", 1)
    done = threading.Event()
    scheduler.after(0, lambda: scheduler.after(0, done.set))
    assert done.wait(10)
