"""Contenders that cheat, break or hang, for tests of the benchmarks: the harness has to notice."""

import os
import signal
import time

from shmrpc.bench.sockets import RAW_UDS


class Liar:
    """Answers by itself now and then, which is faster."""

    thread_safe = False
    start = staticmethod(RAW_UDS.start)

    def connect(self, address):
        connection = RAW_UDS.connect(address)
        honest = connection.echo
        calls = 0

        def echo(payload):
            nonlocal calls
            calls += 1
            return honest(payload) if calls % 100 else bytes(payload)

        connection.echo = echo
        return connection


class Shortener:
    """Sends fewer bytes than it was given, and makes up the rest."""

    thread_safe = False
    start = staticmethod(RAW_UDS.start)

    def connect(self, address):
        connection = RAW_UDS.connect(address)
        honest = connection.echo
        connection.echo = lambda payload: honest(payload[:8]) + payload[8:]
        return connection


class Forger:
    """Gives back as many bytes as it was sent, and not all of them the same."""

    thread_safe = False
    start = staticmethod(RAW_UDS.start)

    def connect(self, address):
        connection = RAW_UDS.connect(address)
        honest = connection.echo
        connection.echo = lambda payload: honest(payload)[:-1] + b"?"
        return connection


class Dying:
    """Its server is killed when the first client comes."""

    thread_safe = False

    def start(self, directory, clients):
        service = RAW_UDS.start(directory, clients)

        class Service:
            address = service.address
            close = service.close

            def serve(self):
                service.listener.accept()
                os.kill(os.getpid(), signal.SIGKILL)

        return Service()

    connect = staticmethod(RAW_UDS.connect)


class Slow:
    """Every tenth call takes 50 ms, the others no time."""

    thread_safe = False
    start = staticmethod(RAW_UDS.start)

    def connect(self, address):
        connection = RAW_UDS.connect(address)
        honest = connection.echo
        calls = 0

        def echo(payload):
            nonlocal calls
            calls += 1
            if not calls % 10:
                time.sleep(0.05)
            return honest(payload)

        connection.echo = echo
        return connection


LIAR = Liar()
SHORTENER = Shortener()
FORGER = Forger()
DYING = Dying()
SLOW = Slow()
