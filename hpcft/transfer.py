"""Bytes from one node's memory to another's: what two carriers do with each other.

The receiver listens on its node's own address and takes the one connection that shows the token, which both have from
their agents. Then come the parts, one after another and without any framing: both know the sizes. The sender never
touches the bytes (`sendfile`); the receiver compares every chunk with the digest that was taken when the copy was
sealed, and answers with one byte when all of them are right.

Calls block, for `STALLED_SECONDS` at most without a byte; beyond that it is the agents that end their carriers.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from hpcft import durable
from hpcft.durable import CHUNK_BYTES
from hpcft.tcp import Address, numeric

STALLED_SECONDS = 10.0
PROOF_SECONDS = 2.0
"""For a connection to show the token."""
PROVING = 64
"""So many may be about to show it; for one more the one that came first is sent away."""
TOKEN_BYTES = 32
_DONE = b"\x01"


class TransferError(ValueError):
    """The copy did not get there whole; the reason is for people."""


def accept(listening: socket.socket, token: bytes, seconds: float = STALLED_SECONDS) -> socket.socket:
    """The connection that shows the token; others are closed. TransferError: none came in time.

    All that have come may show it at the same time: nobody else can keep the right one out by saying nothing.
    """
    until = time.monotonic() + seconds
    waiting: dict[socket.socket, _Proof] = {}
    """In the order in which they came, and in which their time is over."""
    listening.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)

        def dismiss(connection: socket.socket) -> None:
            selector.unregister(connection)
            del waiting[connection]
            connection.close()

        try:
            while (now := time.monotonic()) < until:
                for late in [each for each, proof in waiting.items() if proof.until <= now]:
                    dismiss(late)
                first = min((proof.until for proof in waiting.values()), default=until)
                ready = {key.fileobj for key, _ in selector.select(min(first, until) - now)}
                # what has come is read before one more can take its place
                for connection in [each for each in waiting if each in ready]:
                    try:
                        done = waiting[connection].read(connection)
                    except OSError:
                        dismiss(connection)  # it was somebody else, or will come again
                        continue
                    if done and hmac.compare_digest(waiting[connection].shown, token):
                        del waiting[connection]
                        connection.settimeout(STALLED_SECONDS)
                        return connection
                    if done:
                        dismiss(connection)
                if listening in ready:
                    if len(waiting) == PROVING:
                        dismiss(next(iter(waiting)))
                    with suppress(BlockingIOError, ConnectionAbortedError):
                        connection, _ = listening.accept()
                        connection.setblocking(False)
                        waiting[connection] = _Proof(time.monotonic() + PROOF_SECONDS)
                        selector.register(connection, selectors.EVENT_READ)
        finally:
            for connection in waiting:
                connection.close()
    raise TransferError(f"nobody with the right token has come in {seconds:g} s")


class _Proof:
    """What a connection has shown of a token so far."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.shown = bytearray()

    def read(self, connection: socket.socket) -> bool:
        """Whether it is all there now; what follows is not touched. OSError: it will not come."""
        try:
            part = connection.recv(TOKEN_BYTES - len(self.shown))
        except BlockingIOError:
            return False
        if not part:
            raise ConnectionError("the connection was cut")
        self.shown += part
        return len(self.shown) == TOKEN_BYTES


def receive(connection: socket.socket, parts: Sequence[tuple[memoryview, Sequence[str]]]) -> None:
    """Fill the parts, each with the digests that its chunks must have. TransferError, OSError: what came is no use."""
    for view, digests in parts:
        if len(digests) != durable.chunk_count(len(view)):
            raise TransferError(f"{len(digests)} digests for {len(view)} bytes")
        for number, begin in enumerate(range(0, len(view), CHUNK_BYTES)):
            chunk = view[begin : begin + CHUNK_BYTES]
            _fill(connection, chunk)
            if durable.digest(chunk) != digests[number]:
                raise TransferError("what has arrived is not what was sealed")
    connection.sendall(_DONE)


def send(address: Address, token: bytes, parts: Sequence[tuple[int, int]]) -> None:
    """Send the parts, memory files with the number of bytes of each. TransferError, OSError: they have not arrived."""
    family, target = numeric(address)
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(STALLED_SECONDS)
        connection.connect(target)
        connection.sendall(token)
        for fd, size in parts:
            with open(fd, "rb", closefd=False) as file:
                for begin in range(0, size, CHUNK_BYTES):
                    count = min(CHUNK_BYTES, size - begin)
                    if connection.sendfile(file, begin, count) != count:
                        raise TransferError("the copy is shorter than it should be")
        if connection.recv(1) != _DONE:
            raise TransferError("the other node did not take it")


def _fill(connection: socket.socket, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        count = connection.recv_into(view[filled:])
        if not count:
            raise ConnectionError("the connection was cut")
        filled += count
