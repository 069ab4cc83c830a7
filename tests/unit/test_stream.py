"""Streams over real sockets: both event loops, honest peers, hostile ones, and ones that are merely slow."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from hpcft import stream as module
from hpcft.errors import UnusableError
from hpcft.session import MAGIC, MESSAGE_LIMIT, WELCOME_SIZE
from hpcft.stream import Ending, Limits, Server, Stream, StreamClosed, dial, open_lifeline, serve

SECRET, OTHER = bytes(range(32)), bytes(32)
HOST = "127.0.0.1"
QUICK = Limits(handshake_seconds=0.3, stall_seconds=0.3, goodbye_seconds=0.3)
GENEROUS = 30.0


def on_both_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run on asyncio and on uvloop; whatever escapes into the loop or is left open fails the test."""

    def run(factory: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        escaped = list[dict[str, Any]]()

        async def watched() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: escaped.append(context))
            async with asyncio.timeout(2 * GENEROUS):
                await test(**fixtures)

        before = open_sockets()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(watched())
        assert not escaped
        assert open_sockets() == before

    factory = inspect.Parameter("factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=[factory, *signature.parameters.values()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.pytestmark = getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    marked: Callable[..., None] = pytest.mark.parametrize("factory", loops.values(), ids=loops)(run)
    return marked


def open_sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(entry.readlink()).startswith("socket:")
    return count


class Meeting:
    """A server and the streams that came to it, in order."""

    server: Server

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._came = asyncio.Queue[Stream]()

    async def __aenter__(self) -> Meeting:
        self.server = await serve(HOST, 0, SECRET, self._came.put_nowait, **self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    async def next(self) -> Stream:
        async with asyncio.timeout(GENEROUS):
            return await self._came.get()

    async def pair(self, **options: Any) -> tuple[Stream, Stream]:
        near = await dial(self.server.address, SECRET, {"purpose": "agent"}, GENEROUS, **options)
        return near, await self.next()

    @property
    def nobody_came(self) -> bool:
        return self._came.empty()


async def end_of(stream: Stream) -> StreamClosed:
    """Why it ended; messages before the end are dropped."""
    async with asyncio.timeout(GENEROUS):
        while True:
            try:
                await stream.receive()
            except StreamClosed as closed:
                return closed


async def eventually(condition: Callable[[], bool], seconds: float = GENEROUS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 anything may be asked
            await asyncio.sleep(0.005)


class Tap:
    """Sits between dialler and server, lets the handshake pass, and hands every frame to the test."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    async def __aenter__(self) -> Tap:
        self._connected = asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._connected.put_nowait((reader, writer))

        self._listener = await asyncio.start_server(accept, HOST, 0, limit=1 << 16)
        address = self._listener.sockets[0].getsockname()[:2]
        dialling = asyncio.ensure_future(dial(address, SECRET, {"purpose": "agent"}, GENEROUS))
        self.from_near, self.to_near = await self._connected.get()
        self.from_far, self.to_far = await asyncio.open_connection(*self._meeting.server.address)
        self.to_far.write(await self.from_near.readexactly(len(MAGIC) + 32))
        self.to_near.write(await self.from_far.readexactly(len(MAGIC) + 64))
        for reader, writer in ((self.from_near, self.to_far), (self.from_far, self.to_near)):
            start = await reader.readexactly(WELCOME_SIZE)
            writer.write(start + await reader.readexactly(int.from_bytes(start[:2], "big")))
        self.near = await dialling
        self.far = await self._meeting.next()
        return self

    async def frame(self) -> bytes:
        """The next one that the dialler sent."""
        async with asyncio.timeout(GENEROUS):
            header = await self.from_near.readexactly(5)
            return header + await self.from_near.readexactly(16 + int.from_bytes(header[:4], "big"))

    async def __aexit__(self, *_: object) -> None:
        self.near.close()
        for writer in (self.to_near, self.to_far):
            writer.transport.abort()
        await self.near.wait_closed()
        self._listener.close()
        await self._listener.wait_closed()


@on_both_loops
async def test_messages_arrive_once_in_order_both_ways() -> None:
    async with Meeting(hello=lambda: {"term": 3}) as meeting:
        near = await dial(meeting.server.address, SECRET, {"purpose": "agent", "node": "n1"})
        far = await meeting.next()
        assert near.hello == {"term": 3}
        assert far.hello == {"purpose": "agent", "node": "n1"}
        assert near.peer == meeting.server.address
        assert far.peer[0] == HOST
        assert not far.lifeline
        for sender, receiver in ((near, far), (far, near)):
            sent = [{"n": number, "text": "Wörld" * (number % 50)} for number in range(2000)]
            for message in sent:
                sender.send(message)
            assert [await receiver.receive() for _ in sent] == sent
        largest = {"x": "y" * (MESSAGE_LIMIT - 8)}
        near.send(largest)
        far.send(largest)
        assert await far.receive() == largest
        assert await near.receive() == largest
        near.close()
        await near.wait_closed()


@on_both_loops
async def test_what_cannot_be_sent_is_the_callers_error_and_harms_nothing() -> None:
    async with Meeting() as meeting:
        near, far = await meeting.pair()
        with pytest.raises(ValueError, match="exceeds the limit"):
            near.send({"x": "y" * MESSAGE_LIMIT})
        with pytest.raises(TypeError):
            near.send({"x": object()})
        with pytest.raises(ValueError, match="exceeds the limit"):
            await dial(meeting.server.address, SECRET, {"x": "y" * 5000})
        near.send({"still": "fine"})
        assert await far.receive() == {"still": "fine"}
        near.close()
        await near.wait_closed()


@on_both_loops
async def test_a_goodbye_arrives_after_everything_sent_before_it_even_with_data_in_flight_the_other_way() -> None:
    async with Meeting() as meeting:
        near, far = await meeting.pair()
        for number in range(500):
            near.send({"unread": "x" * 1000})
            far.send({"n": number})
        far.close("another agent leads now")
        far.send({"too": "late"})
        for number in range(500):
            assert await near.receive() == {"n": number}
        closed = await end_of(near)
        assert closed.ending is Ending.GOODBYE
        assert closed.reason == f"{HOST}: closed by the other side: another agent leads now"
        closed = await end_of(far)
        assert closed.ending is Ending.GOODBYE
        assert "closed by this side" in closed.reason
        await near.wait_closed()
        await far.wait_closed()
        near.close()  # again: no effect


@on_both_loops
async def test_a_waiting_receiver_is_woken_by_the_end_and_a_second_one_is_refused() -> None:
    async with Meeting() as meeting:
        near, far = await meeting.pair()
        waiting = asyncio.ensure_future(end_of(near))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one receiver"):
            await near.receive()
        far.close()
        assert (await waiting).ending is Ending.GOODBYE


@on_both_loops
async def test_a_cancelled_receive_loses_no_message() -> None:
    async with Meeting() as meeting:
        near, far = await meeting.pair()
        for number in range(50):
            waiting = asyncio.ensure_future(near.receive())
            await asyncio.sleep(0)
            far.send({"n": number})
            await asyncio.sleep(0.001 * (number % 3))
            if not waiting.cancel():
                assert await waiting == {"n": number}
            else:
                await asyncio.wait([waiting])
                received = waiting.result() if not waiting.cancelled() else await near.receive()
                assert received == {"n": number}
        near.close()
        await near.wait_closed()


@on_both_loops
async def test_a_dialler_with_another_secret_learns_it_and_never_becomes_a_stream() -> None:
    async with Meeting() as meeting:
        for attempt in (dial, open_lifeline):
            with pytest.raises(StreamClosed, match="does not know the run's secret") as refused:
                await attempt(meeting.server.address, OTHER, {})
            assert refused.value.ending is Ending.REJECTED
            assert "same run directory" in refused.value.hint
        await eventually(lambda: meeting.server.rejected.total() == 2)
        assert meeting.nobody_came


@on_both_loops
async def test_an_impostor_is_refused_by_the_server() -> None:
    async with Meeting() as meeting:
        reader, writer = await asyncio.open_connection(*meeting.server.address)
        writer.write(MAGIC + bytes(32))
        answer = await reader.readexactly(len(MAGIC) + 64)
        writer.write(b"\x00\x02" + answer[-32:] + b"{}")  # the server's own proof, sent back
        assert await reader.read() == b""
        writer.close()
        assert meeting.server.rejected == {"does not know the run's secret": 1}
        assert meeting.nobody_came


@on_both_loops
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n", "is not an agent"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not an agent"),
        (MAGIC + bytes(64), "does not know the run's secret"),
        (MAGIC + bytes(10), "closed the connection during the handshake"),
        (b"", "closed the connection during the handshake"),
    ],
)
async def test_a_dialler_is_not_taken_in_by_another_server(answer: bytes, says: str) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(MAGIC) + 32)
        writer.write(answer)
        if says == "is not an agent":
            with contextlib.suppress(ConnectionResetError):
                await reader.read()  # such servers wait for the client to go on
        writer.close()

    async with await asyncio.start_server(accept, HOST, 0) as listener:
        with pytest.raises(StreamClosed, match=says) as refused:
            await dial(listener.sockets[0].getsockname()[:2], SECRET, {}, GENEROUS)
        assert refused.value.ending is Ending.REJECTED
    await asyncio.sleep(0.01)


@on_both_loops
async def test_what_cannot_be_reached_says_so() -> None:
    silent = socket.create_server((HOST, 0))
    started = time.monotonic()
    with pytest.raises(StreamClosed, match=r"did not answer within 0\.2 s") as refused:
        await dial(silent.getsockname(), SECRET, {}, 0.2)
    assert refused.value.ending is Ending.UNREACHABLE
    assert time.monotonic() - started < GENEROUS / 3
    address = silent.getsockname()
    silent.close()
    with pytest.raises(
        StreamClosed, match=r"cannot connect to 127\.0\.0\.1 port [0-9]+: Connection refused"
    ) as refused:
        await dial(address, SECRET, {})
    assert refused.value.ending is Ending.UNREACHABLE
    with pytest.raises(UnusableError, match="not a numeric address"):
        await dial(("localhost", 1), SECRET, {})


@on_both_loops
async def test_a_server_listens_on_the_one_address_that_it_was_given() -> None:
    async with Meeting() as meeting:
        assert meeting.server.address[0] == HOST
        with pytest.raises(StreamClosed, match="Connection refused"):
            await dial(("127.0.0.2", meeting.server.address[1]), SECRET, {})
        with pytest.raises(UnusableError, match=r"cannot listen on 127\.0\.0\.1 port [0-9]+: Address already in use"):
            await serve(*meeting.server.address, SECRET, lambda _: None)
    for everywhere in ("0.0.0.0", "::", "0"):
        with pytest.raises(UnusableError, match="every interface"):
            await serve(everywhere, 0, SECRET, lambda _: None)
    with pytest.raises(UnusableError, match="not a numeric address"):
        await serve("", 0, SECRET, lambda _: None) if sys.platform == "none" else await serve("n1", 0, SECRET, print)
    with pytest.raises(UnusableError, match="cannot listen"):
        await serve("192.0.2.77", 0, SECRET, lambda _: None)


Tampering = Callable[[list[bytes]], list[bytes]]


@on_both_loops
@pytest.mark.parametrize(
    ("tampering", "accepted", "ending", "says"),
    [
        (lambda f: [f[0], f[0]], 1, Ending.REJECTED, "not authentic"),
        (lambda f: [f[1], f[0]], 0, Ending.REJECTED, "not authentic"),
        (lambda f: [f[0], f[2]], 1, Ending.REJECTED, "not authentic"),
        (lambda f: [f[0], f[1][:-1] + b"!"], 1, Ending.REJECTED, "not authentic"),
        (lambda f: [f[0], f[1][:4] + b"\x01" + f[1][5:]], 1, Ending.REJECTED, "not authentic"),
        (lambda f: [f[0], b"\x00\x40\x00\x01" + f[1][4:]], 1, Ending.REJECTED, "announced a frame of 4194305"),
        (lambda f: [f[0], f[1][:-3]], 1, Ending.EOF, "in the middle of a message"),
        (lambda f: [f[0], f[1]], 2, Ending.EOF, "without a goodbye"),
    ],
    ids=["replay", "reorder", "drop", "change", "kind", "oversize", "truncate", "end"],
)
async def test_a_frame_touched_on_the_way_ends_the_stream(
    tampering: Tampering, accepted: int, ending: Ending, says: str
) -> None:
    async with Meeting() as meeting, Tap(meeting) as tap:
        for number in range(3):
            tap.near.send({"n": number})
        frames = [await tap.frame() for _ in range(3)]
        tap.to_far.write(b"".join(tampering(frames)))
        tap.to_far.write_eof()
        for number in range(accepted):
            assert await tap.far.receive() == {"n": number}
        async with asyncio.timeout(GENEROUS):
            with pytest.raises(StreamClosed, match=says) as closed:
                await tap.far.receive()
        assert closed.value.ending is ending


@on_both_loops
async def test_a_frame_sent_back_to_its_sender_ends_the_stream() -> None:
    async with Meeting() as meeting, Tap(meeting) as tap:
        tap.near.send({"n": 0})
        tap.to_near.write(await tap.frame())
        closed = await end_of(tap.near)
        assert closed.ending is Ending.REJECTED
        assert "not authentic" in closed.reason


@on_both_loops
async def test_a_reset_is_a_lost_connection_and_not_the_end_of_the_peer() -> None:
    async with Meeting() as meeting, Tap(meeting) as tap:
        plain = tap.to_far.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tap.to_far.transport.abort()
        closed = await end_of(tap.far)
        assert closed.ending is Ending.LOST
        assert "connection lost" in closed.reason


@on_both_loops
async def test_scanners_are_closed_counted_and_hardly_logged(caplog: pytest.LogCaptureFixture) -> None:
    garbage = [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00", bytes(100_000), b"\n", os.urandom(64)]
    garbage += [MAGIC + bytes(33), MAGIC[:-1] + b"2", b"hpcft/2\n" + bytes(32)]
    with caplog.at_level(logging.DEBUG, "hpcft"):
        async with Meeting() as meeting:
            for turn in range(200):
                reader, writer = await asyncio.open_connection(*meeting.server.address)
                writer.write(garbage[turn % len(garbage)])
                with contextlib.suppress(ConnectionResetError):  # it may have sent more than was read
                    assert await reader.read() == b""
                writer.transport.abort()
            for _ in range(20):
                _, writer = await asyncio.open_connection(*meeting.server.address)
                writer.transport.abort()
            await eventually(lambda: meeting.server.rejected.total() == 220)
            assert meeting.nobody_came
            near, far = await meeting.pair()  # still at everybody else's service
            near.send({"fine": True})
            assert await far.receive() == {"fine": True}
            near.close()
            await near.wait_closed()
    assert len(caplog.records) <= 3 * len(meeting.server.rejected)


@on_both_loops
async def test_who_does_not_finish_the_handshake_in_time_is_closed() -> None:
    async with Meeting(limits=QUICK) as meeting:
        reader, writer = await asyncio.open_connection(*meeting.server.address)
        started = time.monotonic()

        async def trickle() -> None:
            for byte in MAGIC + bytes(31):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)

        trickling = asyncio.ensure_future(trickle())
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert QUICK.handshake_seconds - 0.05 <= time.monotonic() - started
        assert meeting.server.rejected == {"took too long": 1}
        trickling.cancel()
        await asyncio.wait([trickling])
        writer.transport.abort()


@on_both_loops
async def test_of_too_many_in_their_handshake_the_oldest_goes_and_honest_ones_get_in() -> None:
    async with Meeting(limits=Limits(pending=10, handshake_seconds=GENEROUS)) as meeting:
        idle = [await asyncio.open_connection(*meeting.server.address) for _ in range(30)]
        await eventually(lambda: meeting.server.rejected.total() == 20)
        assert await idle[0][0].read() == b""
        near, far = await meeting.pair()
        far.send({"welcome": 1})
        assert await near.receive() == {"welcome": 1}
        near.close()
        await near.wait_closed()
        for _, writer in idle:
            writer.transport.abort()


@on_both_loops
async def test_a_peer_that_stops_reading_is_given_up_with_the_reason() -> None:
    async with Meeting() as meeting, Tap(meeting) as tap:
        tap.near._limits = QUICK
        started = time.monotonic()
        for _ in range(12):
            tap.near.send({"x": "y" * (1 << 20)})
        closed = await end_of(tap.near)
        assert closed.ending is Ending.STALLED
        assert closed.reason == f"{HOST}: did not read for 0.3 s"
        assert time.monotonic() - started >= 0.25


@on_both_loops
async def test_what_is_held_for_a_peer_is_bounded() -> None:
    async with Meeting() as meeting, Tap(meeting) as tap:
        sent = 0
        while sent < 100:
            tap.near.send({"x": "y" * (1 << 20)})
            sent += 1
            await asyncio.sleep(0)
            if tap.near._end is not None:
                break
        closed = await end_of(tap.near)
        assert closed.ending is Ending.STALLED
        assert "bytes wait to be sent" in closed.reason
        assert 16 <= sent < 60


@on_both_loops
async def test_a_slow_reader_is_kept_and_gets_everything() -> None:
    async with Meeting(limits=Limits(incoming_bytes=100_000)) as meeting:
        near, far = await meeting.pair(limits=Limits(stall_seconds=1.0))
        for end, buffer in ((near, socket.SO_SNDBUF), (far, socket.SO_RCVBUF)):  # else the kernel takes it all
            end._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 65536)
        count = 300
        for number in range(count):
            near.send({"n": number, "x": "y" * 40_000})
        assert near._transport.get_write_buffer_size() > 0
        for number in range(count):
            assert (await far.receive())["n"] == number
            assert far._inbox_bytes < 1_000_000
            await asyncio.sleep(0.004)
        near.send({"last": True})
        assert await far.receive() == {"last": True}
        near.close()
        await near.wait_closed()


@on_both_loops
async def test_a_peer_is_not_given_up_for_a_time_in_which_this_process_was_stopped() -> None:
    async with Meeting(limits=QUICK) as meeting:
        near, far = await meeting.pair(limits=QUICK)
        receiving = asyncio.ensure_future(far.receive())
        await asyncio.sleep(0)
        for number in range(12):
            near.send({"n": number, "x": "y" * (1 << 20)})
        time.sleep(2 * QUICK.stall_seconds)  # noqa: ASYNC251 the whole loop stands still
        assert (await receiving)["n"] == 0
        for number in range(1, 12):
            assert (await far.receive())["n"] == number
        near.close()
        await near.wait_closed()


@on_both_loops
async def test_closing_does_not_wait_for_a_peer_that_does_not_react() -> None:
    async with Meeting(limits=QUICK) as meeting, Tap(meeting) as tap:
        tap.to_far.transport.pause_reading()  # type: ignore[attr-defined]
        started = time.monotonic()
        await meeting.server.close()
        assert time.monotonic() - started < GENEROUS / 3
        assert (await end_of(tap.far)).ending is Ending.GOODBYE


@on_both_loops
async def test_two_hundred_clients() -> None:
    async with Meeting() as meeting, asyncio.TaskGroup() as group:

        async def echo(stream: Stream) -> None:
            while True:
                try:
                    stream.send(await stream.receive())
                except StreamClosed as closed:
                    assert closed.ending is Ending.GOODBYE
                    return

        async def visit(number: int) -> None:
            stream = await dial(meeting.server.address, SECRET, {"n": number}, GENEROUS)
            for turn in range(20):
                stream.send({"n": number, "turn": turn})
            for turn in range(20):
                assert await stream.receive() == {"n": number, "turn": turn}
            stream.close()
            await stream.wait_closed()

        visits = [group.create_task(visit(number)) for number in range(200)]
        seen = set[int]()
        for _ in visits:
            stream = await meeting.next()
            seen.add(stream.hello["n"])
            group.create_task(echo(stream))
        assert seen == set(range(200))
        await asyncio.gather(*visits)


@on_both_loops
async def test_a_lifeline_ends_with_its_last_holder_and_not_before() -> None:
    async with Meeting() as meeting:
        lifeline = await open_lifeline(meeting.server.address, SECRET, {"node": "n1"})
        far = await meeting.next()
        assert far.lifeline
        assert far.hello == {"node": "n1", "purpose": "lifeline"}
        assert not lifeline.getblocking()
        assert lifeline.get_inheritable()
        with pytest.raises(ValueError, match="nothing is ever sent"):
            far.send({})
        holders = [
            await asyncio.create_subprocess_exec("sleep", "1000", pass_fds=[lifeline.fileno()]) for _ in range(2)
        ]
        lifeline.close()
        ended = asyncio.ensure_future(end_of(far))
        holders[0].kill()
        await holders[0].wait()
        await meeting.pair()  # a whole exchange with the same server: its loop has seen what there was to see
        await asyncio.wait([ended], timeout=0.3)
        assert not ended.done()
        holders[1].send_signal(signal.SIGSEGV)
        await holders[1].wait()
        assert (await ended).ending is Ending.EOF


HOLDER = """
import asyncio, os, subprocess, sys
sys.path.insert(0, {path!r})
from hpcft.stream import open_lifeline
async def main():
    line = await open_lifeline(({host!r}, {port}), bytes(range(32)), {{}})
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[line.fileno()], stdout=subprocess.DEVNULL)
    await asyncio.sleep(0.05)
    registered = 0
    for entry in os.listdir("/proc/self/fdinfo"):
        try:
            rows = open(f"/proc/self/fdinfo/{{entry}}").read().splitlines()
        except FileNotFoundError:
            continue
        registered += any(row.startswith("tfd:") and int(row.split()[1]) == line.fileno() for row in rows)
    print(child.pid, registered, flush=True)
    {end}
{run}
"""


@on_both_loops
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "line.close()", "os._exit(0)", "raise SystemExit"])
async def test_however_the_process_that_opened_a_lifeline_goes_its_heir_keeps_it(loop: str, end: str) -> None:
    async with Meeting() as meeting:
        host, port = meeting.server.address
        run = "import uvloop; uvloop.run(main())" if loop == "uvloop" else "asyncio.run(main())"
        path = str(Path(module.__file__).parent.parent)
        script = HOLDER.format(path=path, host=host, port=port, end=end, run=run)
        opener = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
        assert opener.stdout is not None
        heir, registered = map(int, (await opener.stdout.readline()).split())
        try:
            assert registered == 0, "the event loop still watches the lifeline"
            await opener.wait()
            far = await meeting.next()
            ended = asyncio.ensure_future(end_of(far))
            await meeting.pair()
            await asyncio.wait([ended], timeout=0.2)
            assert not ended.done()
        finally:
            os.kill(heir, signal.SIGKILL)
        assert (await ended).ending is Ending.EOF


@on_both_loops
async def test_the_end_of_a_process_ends_its_stream_at_once() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, {!r})\n"
        "from hpcft.stream import dial\n"
        "async def main():\n"
        "    stream = await dial(({!r}, {}), bytes(range(32)), {{}})\n"
        "    stream.send({{}})\n"
        "    await stream.receive()\n"
        "asyncio.run(main())\n"
    )
    async with Meeting() as meeting:
        path = str(Path(module.__file__).parent.parent)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script.format(path, *meeting.server.address)
        )
        far = await meeting.next()
        assert await far.receive() == {}  # so it has read everything: dying with something unread resets instead
        started = time.monotonic()
        process.kill()
        assert (await end_of(far)).ending is Ending.EOF
        assert time.monotonic() - started < 5
        await process.wait()


def test_sockets_get_the_options_that_make_a_silent_peer_end() -> None:
    async def options() -> tuple[list[int], list[int]]:
        async with Meeting() as meeting:
            near, far = await meeting.pair()
            line = await open_lifeline(meeting.server.address, SECRET, {})
            held = await meeting.next()
            names = [socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT]
            ends = [s._transport.get_extra_info("socket") for s in (near, far)]
            assert all(end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for end in [*ends, line])
            streams = [[end.getsockopt(socket.IPPROTO_TCP, name) for name in names] for end in ends]
            lines = [
                [end.getsockopt(socket.IPPROTO_TCP, name) for name in names]
                for end in (line, held._transport.get_extra_info("socket"))
            ]
            assert streams[0] == streams[1]
            assert lines[0] == lines[1]
            near.close()
            await near.wait_closed()
            line.close()
            return streams[0], lines[0]

    of_streams, of_lifelines = asyncio.run(options())
    assert of_streams == [1, 10, 25_000]
    assert of_lifelines == [1, 300, 600_000]
