"""Bytes from one node's memory to another's: what two carriers do with each other.

The receiver listens on its node's own address and takes the one connection that shows the token, which both have from
their agents. Then come the parts, one after another and without any framing: both know the sizes. The sender never
touches the bytes (`sendfile`); the receiver compares every chunk with the digest that was taken when the copy was
sealed, and answers with one byte when all of them are right.

Calls block, for `STALLED_SECONDS` at most without a byte; beyond that it is the agents that end their carriers.
"""

from __future__ import annotations

import hmac
import math
import socket
import time
from collections.abc import Sequence

from hpcft import durable
from hpcft.durable import CHUNK_BYTES
from hpcft.tcp import Address, numeric

STALLED_SECONDS = 10.0
PROOF_SECONDS = 2.0
"""For a connection to show the token."""
TOKEN_BYTES = 32
_DONE = b"\x01"


class TransferError(ValueError):
    """The copy did not get there whole; the reason is for people."""


def accept(listening: socket.socket, token: bytes, seconds: float = STALLED_SECONDS) -> socket.socket:
    """The connection that shows the token; others are closed. TransferError: none came in time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        listening.settimeout(left)
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            break
        try:
            shown = _read(connection, TOKEN_BYTES, min(until, time.monotonic() + PROOF_SECONDS))
            if hmac.compare_digest(shown, token):
                connection.settimeout(STALLED_SECONDS)
                return connection
        except OSError:
            pass  # it was somebody else, or will come again
        connection.close()
    raise TransferError(f"nobody with the right token has come in {seconds:g} s")


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


def _read(connection: socket.socket, count: int, until: float) -> bytes:
    """TimeoutError: they are not all there by then (monotonic), however busily they come."""
    found = bytearray(count)
    _fill(connection, memoryview(found), until)
    return bytes(found)


def _fill(connection: socket.socket, view: memoryview, until: float = math.inf) -> None:
    filled = 0
    while filled < len(view):
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(min(left, STALLED_SECONDS))
        count = connection.recv_into(view[filled:])
        if not count:
            raise ConnectionError("the connection was cut")
        filled += count
