"""Streams of messages over TCP between those who know the run's secret, and lifelines.

Every agent keeps one stream to the leader; an operator's command opens one for a moment. `session.py` has the
protocol; here are the sockets, the deadlines and the bounds. Whatever a connection sends that has not proved
itself, the only consequences are that it is closed, counted in `Server.rejected`, and logged at the 1st, 10th,
100th … time of each reason. It gets five seconds; when too many are at it at once, the oldest goes.

`Stream.send` never waits: what the peer does not take is held, up to a bound in bytes and a bound in time without
any progress; then the stream is given up. `Stream.receive` raises `StreamClosed` with the reason of the end, after
everything that arrived before it.

A *lifeline* is a connection whose only content is its end. It is opened like a stream, then handed out as a bare
socket for other processes to inherit, and nobody sends on it again. TCP reports the end (FIN) when the last
process that holds it is gone, however it died: so `Ending.EOF` on the server's side is proof that nothing is left
there that could train. `Ending.LOST` proves nothing. Two things would spoil it. `shutdown(2)` acts on the
connection, not on the descriptor, and transports of asyncio may call it, so none ever gets hold of the dialler's
socket. And data left unread at exit turns the FIN into a reset, so the server sends nothing. A lifeline outlives a
network cut: its keep-alive is far slower than a stream's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, cast

import orjson

from hpcft.errors import ExitCode, HpcftError
from hpcft.secret import derive
from hpcft.session import (
    ANSWER_SIZE,
    MAGIC,
    MESSAGE_LIMIT,
    WELCOME_SIZE,
    Answering,
    Dialling,
    Kind,
    Message,
    RefusedError,
    Session,
    parse,
)
from hpcft.tcp import BACKLOG, Address, Patience, listen, named, numeric, set_patience

_log = logging.getLogger(__name__)

_SAME_RUN = "both sides must use the same run directory (its file `secret`) and the same version of hpcft"
_REACHABLE = "check that the run is alive and that this machine reaches the compute nodes"
_TAMPERING = "another program uses the connection, or something on the way changes it"


_STALL_CHECKS = 4
"""How often a full buffer is looked at before its peer is given up: when it is this process that was stopped, all its
timers are overdue at once, and the peer must not be the one to pay."""


class Ending(StrEnum):
    """How a stream ended; decides what may be concluded from it."""

    GOODBYE = "goodbye"
    """One of the two ends closed it, and said so."""
    EOF = "eof"
    """Every process that held the peer's end is gone, or closed it without a word."""
    LOST = "lost"
    """The connection broke or timed out: says nothing about the processes at the other end."""
    STALLED = "stalled"
    """The peer did not read for too long."""
    REJECTED = "rejected"
    """The peer does not know the secret, or broke the protocol; or something on the way tampers."""
    UNREACHABLE = "unreachable"
    """There never was a connection."""


class StreamClosed(HpcftError):
    """No more messages; `reason` is a sentence for the operator."""

    exit_code = ExitCode.UNUSABLE

    def __init__(self, reason: str, ending: Ending, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.reason = reason
        self.ending = ending


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a connection may cost; the defaults suit everything but tests."""

    handshake_seconds: float = 5.0
    pending: int = 1024
    """Connections in their handshake at one time: many agents reconnecting at once, not a scanner's doing."""
    stall_seconds: float = 10.0
    """A peer that takes nothing off a full buffer for this long is given up."""
    outgoing_bytes: int = 16 << 20
    incoming_bytes: int = 8 << 20
    """Received and not yet asked for; beyond it TCP holds the sender back."""
    goodbye_seconds: float = 2.0
    """Wait for the peer to close after a goodbye, so that it can still read it."""


DEFAULT_LIMITS: Final = Limits()


# A stream may die of a cut: membership has decided long before. A lifeline must live through one.
_OF_STREAM = Patience(idle=10, interval=5, probes=3, unacknowledged=25)
_OF_LIFELINE = Patience(idle=300, interval=60, probes=5, unacknowledged=600)


class Stream(asyncio.Protocol):
    """One end of an authenticated stream; made by `dial` or handed to `on_stream`, never constructed directly.

    All methods belong to the event loop's thread. The protocol's methods are called by asyncio alone.
    """

    def __init__(self, session: Session, peer: Address, lifeline: bool, limits: Limits) -> None:
        self.hello: Final = session.hello
        self.peer: Final = peer
        self.lifeline: Final = lifeline
        self._session = session
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._sent_bytes = 0
        self._inbox = deque[tuple[Message, int]]()
        self._inbox_bytes = 0
        self._reading_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._end: StreamClosed | None = None
        self._eof = False
        self._timer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._when_gone: Callable[[Stream], None] | None = None

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; never blocks. On a stream that has ended it is dropped: `receive` tells.

        Raises:
            ValueError: larger than `MESSAGE_LIMIT`, or the stream is a lifeline.
            TypeError: not JSON.
        """
        body = orjson.dumps(message)
        if len(body) > MESSAGE_LIMIT:
            raise ValueError(f"a message of {len(body)} bytes exceeds the limit of {MESSAGE_LIMIT}")
        if self.lifeline:
            raise ValueError("nothing is ever sent on a lifeline")
        if self._end is None:
            self._write(Kind.MESSAGE, body)
            if self._transport.get_write_buffer_size() > self._limits.outgoing_bytes:
                self._give_up(Ending.STALLED, f"more than {self._limits.outgoing_bytes} bytes wait to be sent")

    async def receive(self) -> Message:
        """The next message, in the order sent. One receiver at a time.

        Raises:
            StreamClosed: the stream has ended and everything that arrived before has been received.
        """
        while not self._inbox:
            if self._end is not None:
                raise StreamClosed(self._end.reason, self._end.ending, self._end.hint)
            if self._waiter is not None:
                raise RuntimeError("a stream has one receiver at a time")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message, size = self._inbox.popleft()
        self._inbox_bytes -= size
        if self._reading_paused and self._inbox_bytes <= self._limits.incoming_bytes // 2:
            self._resume_reading()
        return message

    def close(self, reason: str = "no longer needed") -> None:
        """Say goodbye, after everything that was sent before, and close. Messages not yet received are dropped."""
        if self._end is not None:
            return
        self._inbox.clear()
        self._finish(Ending.GOODBYE, f"closed by this side: {reason}")
        if self.lifeline:
            self._transport.close()
            return
        # Closing at once would reset the connection if something unread has arrived, and lose the goodbye. So the
        # peer closes first, or time runs out.
        self._write(Kind.GOODBYE, reason.encode()[:1000])
        self._resume_reading()
        self._timer = self._loop.call_later(self._limits.goodbye_seconds, self._transport.abort)

    @property
    def ended(self) -> bool:
        """Nothing more can be sent on it."""
        return self._end is not None

    async def wait_closed(self) -> None:
        """Wait until the connection is gone; takes at most `Limits.goodbye_seconds` after `close`."""
        await self._gone.wait()

    def _write(self, kind: Kind, body: bytes) -> None:
        frame = self._session.seal(kind, body)
        self._sent_bytes += len(frame)
        self._transport.write(frame)

    def _resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()

    def _finish(self, ending: Ending, reason: str, hint: str = "") -> None:
        """From here on nothing is accepted; the connection itself may linger."""
        self._end = StreamClosed(f"{self.peer[0]}: {reason}", ending, hint)
        self._stop_timer()
        self._wake()

    def _give_up(self, ending: Ending, reason: str, hint: str = "") -> None:
        self._finish(ending, reason, hint)
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        if self._end is not None:
            return  # between goodbye and end
        try:
            for kind, body in self._session.open(data):
                if kind == Kind.GOODBYE:
                    self._finish(Ending.GOODBYE, f"closed by the other side: {body.decode(errors='replace')}")
                    self._transport.close()
                    return
                message = parse(body)
                if message is None:
                    raise RefusedError("sent a frame that is not a message")
                self._inbox.append((message, len(body)))
                self._inbox_bytes += len(body)
        except RefusedError as refused:
            self._give_up(Ending.REJECTED, refused.reason, _TAMPERING)
            return
        if self._inbox:
            self._wake()
        if self._inbox_bytes > self._limits.incoming_bytes and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._end is None:
            if exc is not None or not self._eof:
                self._finish(Ending.LOST, f"connection lost: {exc or 'aborted'}")
            elif self._session.cut:
                self._finish(Ending.EOF, "ended without a goodbye, in the middle of a message")
            else:
                self._finish(Ending.EOF, "ended without a goodbye")
        self._gone.set()
        if self._when_gone is not None:
            self._when_gone(self)

    def pause_writing(self) -> None:
        if self._end is None:
            self._watch_for_stall(self._taken(), _STALL_CHECKS)

    def resume_writing(self) -> None:
        if self._end is None:
            self._stop_timer()

    def _watch_for_stall(self, taken: int, checks: int) -> None:
        seconds = self._limits.stall_seconds / _STALL_CHECKS
        self._timer = self._loop.call_later(seconds, self._check_for_stall, taken, checks - 1)

    def _check_for_stall(self, taken: int, checks: int) -> None:
        if self._taken() > taken:
            self._watch_for_stall(self._taken(), _STALL_CHECKS)
        elif checks:
            self._watch_for_stall(taken, checks)
        else:
            self._give_up(Ending.STALLED, f"did not read for {self._limits.stall_seconds:g} s")

    def _taken(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self._sent_bytes - self._transport.get_write_buffer_size()


class Server:
    """Listens on one address; made by `serve`."""

    def __init__(
        self,
        address: Address,
        key: bytes,
        hello: Callable[[], Mapping[str, Any]],
        on_stream: Callable[[Stream], None],
        limits: Limits,
    ) -> None:
        self.address: Final = address
        self.rejected: Final = Counter[str]()
        """Connections that never became streams, by reason."""
        self._key = key
        self._hello = hello
        self._on_stream = on_stream
        self._limits = limits
        self._listener: asyncio.Server
        self._connections = set[Stream | _Doorway]()
        self._pending = dict[_Doorway, None]()
        """Those in their handshake, oldest first."""
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def close(self, reason: str = "shutting down") -> None:
        """Stop listening, say goodbye on every stream, and wait until all are gone (seconds at most)."""
        self._closing = True
        self._listener.close()
        for connection in list(self._connections):
            if isinstance(connection, Stream):
                connection.close(reason)
            else:
                connection.transport.abort()
        await self._empty.wait()
        await self._listener.wait_closed()

    def _enter(self, doorway: _Doorway) -> None:
        self._connections.add(doorway)
        self._pending[doorway] = None
        self._empty.clear()
        if self._closing:
            doorway.transport.abort()
        elif len(self._pending) > self._limits.pending:
            next(iter(self._pending)).refuse("was the oldest of too many at once")

    def _open(self, doorway: _Doorway, session: Session) -> None:
        transport, lifeline = doorway.transport, session.hello.get("purpose") == "lifeline"
        if lifeline:
            set_patience(transport.get_extra_info("socket"), _OF_LIFELINE)
        stream = Stream(session, doorway.peer, lifeline, self._limits)
        stream._when_gone = self._left
        transport.set_protocol(stream)
        stream.connection_made(transport)
        del self._pending[doorway]
        self._connections.remove(doorway)
        self._connections.add(stream)
        self._on_stream(stream)

    def _refused(self, doorway: _Doorway, reason: str) -> None:
        del self._pending[doorway]
        self.rejected[reason] += 1
        count = self.rejected[reason]
        if count == 10 ** (len(str(count)) - 1):
            _log.warning("refused a connection from %s: it %s (%d of these so far)", doorway.peer[0], reason, count)

    def _left(self, connection: Stream | _Doorway) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()


class _Doorway(asyncio.Protocol):
    """A connection to the server during its handshake."""

    def __init__(self, server: Server) -> None:
        self.transport: asyncio.Transport
        self.peer: Address = ("?", 0)
        self._server = server
        self._answering = Answering(server._key, server._hello())
        self._deadline: asyncio.TimerHandle
        self._decided = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.peer = (transport.get_extra_info("peername") or self.peer)[:2]
        set_patience(transport.get_extra_info("socket"), _OF_STREAM)
        self._deadline = asyncio.get_running_loop().call_later(
            self._server._limits.handshake_seconds, self.refuse, "took too long"
        )
        self._server._enter(self)

    def data_received(self, data: bytes) -> None:
        if self._decided:
            return
        try:
            answer = self._answering.feed(data)
        except RefusedError as refused:
            self.refuse(refused.reason)
            return
        if answer:
            self.transport.write(answer)
        if self._answering.session is not None:
            self._decide()
            self._server._open(self, self._answering.session)

    def refuse(self, reason: str) -> None:
        if not self._decided:
            self._decide()
            self._server._refused(self, reason)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.refuse("left during the handshake")
        self._server._left(self)

    def _decide(self) -> None:
        self._decided = True
        self._deadline.cancel()


async def serve(
    host: str,
    port: int,
    secret: bytes,
    on_stream: Callable[[Stream], None],
    *,
    hello: Callable[[], Mapping[str, Any]] = dict,
    limits: Limits = DEFAULT_LIMITS,
) -> Server:
    """Listen on one numeric address (port 0: any free one) and hand every authenticated stream to `on_stream`.

    `on_stream` is called in the event loop and must not block; `hello` gives what diallers get as `Stream.hello`.

    Raises:
        UnusableError: not a numeric address, one that means every interface, not of this machine, or port taken.
    """
    listening = listen(host, port)
    bound = listening.getsockname()
    server = Server((bound[0], bound[1]), derive(secret, "stream"), hello, on_stream, limits)
    server._listener = await asyncio.get_running_loop().create_server(
        functools.partial(_Doorway, server), sock=listening, backlog=BACKLOG
    )
    return server


async def dial(
    address: Address,
    secret: bytes,
    hello: Mapping[str, Any],
    timeout: float = 5.0,  # noqa: ASYNC109 one limit for connecting and handshake, and its own error
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Stream:
    """Connect and authenticate both ways; `hello` says who dials and what for (`purpose`).

    Raises:
        StreamClosed: not reachable, no answer in time, or the other side does not know the secret.
        UnusableError: the address is not numeric.
        ValueError: `hello` is too long.
    """
    async with _in_time(address, timeout):
        connection, session = await _introduce(address, secret, hello, _OF_STREAM)
        stream = Stream(session, address, False, limits)
        try:
            await asyncio.get_running_loop().create_connection(lambda: stream, sock=connection)
        except BaseException:
            connection.close()
            raise
    return stream


async def open_lifeline(
    address: Address,
    secret: bytes,
    hello: Mapping[str, Any],
    timeout: float = 5.0,  # noqa: ASYNC109 as above
) -> socket.socket:
    """Connect a lifeline: a non-blocking socket with an inheritable descriptor, on which nothing may ever be sent.

    The server sees its end when the last process that holds a copy of the descriptor has closed it or died. Never
    call `shutdown` on it, and give it to no transport.

    Raises:
        StreamClosed, UnusableError, ValueError: as `dial`.
    """
    async with _in_time(address, timeout):
        connection, _ = await _introduce(address, secret, {**hello, "purpose": "lifeline"}, _OF_LIFELINE)
    connection.set_inheritable(True)
    return connection


async def _introduce(
    address: Address, secret: bytes, hello: Mapping[str, Any], patience: Patience
) -> tuple[socket.socket, Session]:
    """The dialler's handshake, on a plain socket. Reads no byte more than it needs: what follows belongs to the
    stream, or, on a lifeline, to nobody."""
    dialling = Dialling(derive(secret, "stream"), hello)
    loop = asyncio.get_running_loop()
    family, sockaddr = numeric(address)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        set_patience(connection, patience)
        await loop.sock_connect(connection, sockaddr)
        await loop.sock_sendall(connection, dialling.opening)
        magic = await _read(connection, len(MAGIC))
        if magic != MAGIC:  # a server of another kind may send a few bytes and then wait
            raise RefusedError("is not an agent, or one of another version")
        answer = magic + await _read(connection, ANSWER_SIZE - len(MAGIC))
        await loop.sock_sendall(connection, dialling.prove(answer))
        welcome = await _read(connection, WELCOME_SIZE)
        session = dialling.agree(welcome, await _read(connection, dialling.hello_size(welcome)))
    except (EOFError, ConnectionResetError, BrokenPipeError) as error:
        connection.close()
        raise StreamClosed(
            f"{named(address)} closed the connection during the handshake", Ending.REJECTED, _SAME_RUN
        ) from error
    except RefusedError as refused:
        connection.close()
        raise StreamClosed(f"{named(address)} {refused.reason}", Ending.REJECTED, _SAME_RUN) from refused
    except BaseException:
        connection.close()
        raise
    return connection, session


async def _read(connection: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        chunk = await loop.sock_recv(connection, count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


@contextlib.asynccontextmanager
async def _in_time(address: Address, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise StreamClosed(
            f"{named(address)} did not answer within {seconds:g} s", Ending.UNREACHABLE, _REACHABLE
        ) from error
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # asyncio replaces the text by its own
        raise StreamClosed(f"cannot connect to {named(address)}: {why}", Ending.UNREACHABLE, _REACHABLE) from error
