"""Heartbeats through a real TCPStore: servers that stop, die and come back, and values that are not to be believed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcft.errors import UnusableError
from hpcft.ids import Generation, Incarnation, NodeId, Term
from hpcft.store import Heartbeat, HeartbeatReader, HeartbeatWriter, StoreServer, forget_dns, quiet_torch
from hpcft.tcp import Address

pytestmark = pytest.mark.local

ROOT = str(Path(__file__).parent.parent.parent)
SECRET, OTHER = bytes(range(32)), bytes(32)
HOST = "127.0.0.1"
TERM = Term(3)
NODE, LIFE = NodeId("n1"), Incarnation("a1")
GENEROUS = 40.0

quiet_torch()


@pytest.fixture(scope="module", autouse=True)
def numbers_only() -> Iterator[None]:
    """As in an agent: hundreds of look-ups at once are more than many a name server answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
        forget_dns()
        yield
        if configure := getattr(ctypes.CDLL(None), "__nss_configure_lookup", None):
            configure(b"hosts", b"files dns")


def heartbeat(sequence: int, node: str = NODE, life: str = LIFE) -> Heartbeat:
    return Heartbeat(NodeId(node), Incarnation(life), Generation(7), sequence, {"workers": "rr", "step": sequence})


class Heard:
    """A reader and what it heard, in order."""

    def __init__(self, address: Address, *, secret: bytes = SECRET, term: Term = TERM, **options: Any) -> None:
        self.beats = list[Heartbeat]()
        self.reader = HeartbeatReader(address, secret, term, self._note, **{"interval": 0.02, **options})

    def _note(self, node: NodeId, beat: Heartbeat) -> None:
        assert beat.node == node
        self.beats.append(beat)

    def sequences(self, node: str = NODE) -> list[int]:
        return [beat.sequence for beat in self.beats if beat.node == node]

    async def until(self, sequence: int, node: str = NODE) -> None:
        await eventually(lambda: sequence in self.sequences(node))


@contextlib.contextmanager
def writing(
    address: Address, *, secret: bytes = SECRET, term: Term = TERM, **options: Any
) -> Iterator[HeartbeatWriter]:
    writer = HeartbeatWriter(address, secret, term, **options)
    try:
        yield writer
    finally:
        writer.close()


@contextlib.contextmanager
def reading(address: Address, **options: Any) -> Iterator[Heard]:
    heard = Heard(address, **options)
    try:
        yield heard
    finally:
        heard.reader.close()


@pytest.fixture
async def server() -> AsyncIterator[StoreServer]:
    server = await StoreServer.start(HOST)
    yield server
    server.close()
    assert await server.wait_closed()


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Every lane of ours ends after its owner was closed; those that are left behind end with their server."""
    yield
    await eventually(lambda: not ours())


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hpcft-")]


async def eventually(condition: Callable[[], bool], seconds: float = GENEROUS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 anything may be asked
            await asyncio.sleep(0.005)


def client(address: Address) -> Any:
    """What a stranger on the network has: a client of the store, no secret."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(*address, is_master=False, wait_for_workers=False)


class Elsewhere:
    """A store server in a process of its own, to be stopped and killed."""

    SCRIPT = (
        "import asyncio, sys; sys.path.insert(0, {!r})\n"
        "from hpcft.store import StoreServer, forget_dns, quiet_torch\n"
        "quiet_torch()\n"
        "forget_dns()\n"
        "async def main():\n"
        "    server = await StoreServer.start({!r}, {})\n"
        "    print(server.address[1], flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )

    async def __aenter__(self) -> Elsewhere:
        await self.start(0)
        return self

    async def start(self, port: int) -> None:
        script = self.SCRIPT.format(ROOT, HOST, port)
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = HOST, int(await self.process.stdout.readline())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Pulse:
    """Ticks in the loop and knows the longest time that the loop did not."""

    async def __aenter__(self) -> Pulse:
        self.longest = 0.0
        self._task = asyncio.ensure_future(self._tick())
        return self

    async def _tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            self.longest = max(self.longest, time.perf_counter() - before)

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def beat_for(writer: HeartbeatWriter, seconds: float, first: int) -> int:
    """A heartbeat every 20 ms; returns the last sequence number."""
    deadline, sequence = time.monotonic() + seconds, first
    while time.monotonic() < deadline:
        writer.beat(heartbeat(sequence))
        sequence += 1
        await asyncio.sleep(0.02)
    return sequence - 1


async def test_heartbeats_arrive_newest_last(server: StoreServer) -> None:
    with writing(server.address) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        last = await beat_for(writer, 1.0, 1)
        await heard.until(last)
        assert heard.beats[-1] == heartbeat(last)
        assert heard.sequences() == sorted(set(heard.sequences()))
        assert (heard.reader.forged, heard.reader.replayed, heard.reader.outdated) == (0, 0, 0)


async def test_of_many_at_once_the_newest_counts(server: StoreServer) -> None:
    with writing(server.address) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        for sequence in range(1, 10_001):
            writer.beat(heartbeat(sequence))
        await heard.until(10_000)
        assert len(heard.beats) < 1000


async def test_two_hundred_nodes() -> None:
    names = [f"n{number}" for number in range(200)]
    async with Elsewhere() as other:
        with contextlib.ExitStack() as stack:
            heard = stack.enter_context(reading(other.address))
            writers = {name: stack.enter_context(writing(other.address, patience=GENEROUS)) for name in names}
            for name in names:
                heard.reader.register(NodeId(name), LIFE)
            for sequence in range(1, 11):
                for name, writer in writers.items():
                    writer.beat(heartbeat(sequence, name))
                await asyncio.sleep(0.05)
            for name in names:
                await heard.until(10, name)
            for name in names:
                assert heard.sequences(name) == sorted(set(heard.sequences(name)))
            assert heard.reader.forged == 0


async def test_only_registered_nodes_are_heard_and_only_in_their_registered_life(server: StoreServer) -> None:
    with writing(server.address) as one, writing(server.address) as two, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        one.beat(heartbeat(1))
        two.beat(heartbeat(1, "n2"))
        await heard.until(1)
        assert {beat.node for beat in heard.beats} == {NODE}

        one.beat(heartbeat(1, life="b2"))  # restarted, not yet admitted
        await eventually(lambda: heard.reader.outdated == 1)
        assert heard.sequences() == [1]
        heard.reader.register(NODE, Incarnation("b2"))
        one.beat(heartbeat(2, life="b2"))
        await eventually(lambda: heard.beats[-1].incarnation == "b2")
        one.beat(heartbeat(500))  # its former life speaks up
        await eventually(lambda: heard.reader.outdated == 2)

        heard.reader.forget(NODE)
        heard.reader.register(NodeId("n2"), LIFE)
        one.beat(heartbeat(3, life="b2"))
        two.beat(heartbeat(2, "n2"))
        await heard.until(2, "n2")
        assert [beat.sequence for beat in heard.beats if beat.node == NODE] == [1, 2]


async def test_forged_and_repeated_values_count_as_silence(server: StoreServer) -> None:
    stranger = client(server.address)
    with writing(server.address) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        heard.reader.register(NodeId("n2"), LIFE)
        writer.beat(heartbeat(1))
        await heard.until(1)
        old = stranger.get("hb/3/n1")
        writer.beat(heartbeat(2))
        await heard.until(2)
        new = stranger.get("hb/3/n1")

        forgeries = [
            b"x",
            b"{}",
            bytes(200),
            new[:-1],
            new.replace(b'"sequence":2', b'"sequence":9'),
            new.replace(b'"step":2', b'"step":3'),
            b"0" * 64 + new[64:],
            "é".encode() * 100,
        ]
        for count, value in enumerate(forgeries, 1):
            stranger.set("hb/3/n1", value)
            await eventually(lambda count=count: heard.reader.forged == count)  # type: ignore[misc]
        stranger.set("hb/3/n2", new)  # one node's under another's name
        await eventually(lambda: heard.reader.forged == len(forgeries) + 1)
        stranger.set("hb/3/n1", old)
        await eventually(lambda: heard.reader.replayed == 1)
        assert heard.sequences() == [1, 2]
        assert heard.sequences("n2") == []

        writer.beat(heartbeat(3))  # the truth is heard again
        await heard.until(3)
        with reading(server.address, term=Term(4)) as later:  # a former leadership's value means nothing in the next
            later.reader.register(NODE, LIFE)
            stranger.set("hb/4/n1", stranger.get("hb/3/n1"))
            await eventually(lambda: later.reader.forged == 1)
            assert not later.beats


async def test_who_does_not_know_the_secret_is_not_heard(server: StoreServer) -> None:
    with writing(server.address, secret=OTHER) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        writer.beat(heartbeat(1))
        await eventually(lambda: heard.reader.forged == 1)
        assert not heard.beats
    with writing(server.address) as writer, reading(server.address, secret=OTHER) as heard:
        heard.reader.register(NodeId("n2"), LIFE)
        writer.beat(heartbeat(1, "n2"))
        await eventually(lambda: heard.reader.forged == 1)
        assert not heard.beats


async def test_a_deleted_key_is_put_back_and_keeps_nobody_from_being_heard(
    server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = client(server.address)
    with (
        writing(server.address) as one,
        writing(server.address) as two,
        reading(server.address, patience=0.5) as heard,
    ):
        heard.reader.register(NODE, LIFE)
        heard.reader.register(NodeId("n2"), LIFE)
        one.beat(heartbeat(1))
        two.beat(heartbeat(1, "n2"))
        await heard.until(1)
        await heard.until(1, "n2")
        for sequence in range(2, 30):  # n1 stays silent
            stranger.delete_key("hb/3/n1")
            two.beat(heartbeat(sequence, "n2"))
            await heard.until(sequence, "n2")
        one.beat(heartbeat(2))
        await heard.until(2)
    # It may be deleted in the instant between making sure and reading, which costs the reader its thread; not always.
    assert len(caplog.records) < 5


async def test_a_connection_that_died_without_a_sign_is_replaced(server: StoreServer) -> None:
    """As when a firewall forgets it: the server is well, new connections work, the old one stays silent for good."""
    frozen, pumps = asyncio.Event(), list[asyncio.Task[None]]()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, mortal: bool) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    if mortal and frozen.is_set():
                        await asyncio.Event().wait()
                    sink.write(data)
        finally:
            sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(*server.address)
        mortal = not frozen.is_set()
        pumps.append(asyncio.ensure_future(pump(reader, back, mortal)))
        pumps.append(asyncio.ensure_future(pump(onward, writer, mortal)))

    proxy = await asyncio.start_server(accept, HOST, 0)
    address = proxy.sockets[0].getsockname()[:2]
    with writing(address, patience=0.3) as writer, reading(address, patience=0.3) as heard:
        heard.reader.register(NODE, LIFE)
        last = await beat_for(writer, 0.2, 1)
        await heard.until(last)
        frozen.set()
        deadline = time.monotonic() + GENEROUS
        first_after = last + 1
        while not heard.sequences() or heard.sequences()[-1] < first_after + 20:
            assert time.monotonic() < deadline
            last = await beat_for(writer, 0.1, last + 1)
    proxy.close()
    for task in pumps:
        task.cancel()
    await asyncio.wait(pumps)


async def test_garbage_and_idle_connections_do_not_disturb_the_server(server: StoreServer) -> None:
    connections = [socket.create_connection(server.address) for _ in range(60)]
    for number, connection in enumerate(connections):
        with contextlib.suppress(OSError):
            connection.sendall([b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000), b"\x00" * 3][number % 4])
    with writing(server.address) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        writer.beat(heartbeat(1))
        await heard.until(1)
    for connection in connections:
        connection.close()


async def test_a_stopped_server_blocks_nobody_and_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async with Elsewhere() as other:
        with (
            writing(other.address, patience=0.3) as writer,
            reading(other.address, patience=0.3) as heard,
        ):
            heard.reader.register(NODE, LIFE)
            stopped_after = await beat_for(writer, 0.3, 1)
            await heard.until(stopped_after)

            other.signal(signal.SIGSTOP)
            async with Pulse() as pulse:
                last = await beat_for(writer, 3.0, stopped_after + 1)
            assert pulse.longest < 0.5
            assert heard.sequences()[-1] == stopped_after
            for who in ("writer", "reader"):
                assert f"hpcft-heartbeat-{who} to" in caplog.text
            assert "got no answer" in caplog.text
            assert 2 <= len(ours()) <= 12, "stuck threads are left behind, but not one for every attempt"

            other.signal(signal.SIGCONT)
            await heard.until(await beat_for(writer, 0.3, last + 1))
            assert heard.sequences() == sorted(set(heard.sequences()))


async def test_closing_while_the_server_is_stopped_does_not_wait() -> None:
    async with Elsewhere() as other:
        with writing(other.address) as writer, reading(other.address) as heard:
            heard.reader.register(NODE, LIFE)
            await heard.until(await beat_for(writer, 0.1, 1))
            other.signal(signal.SIGSTOP)
            await beat_for(writer, 0.3, 1000)
            started = time.monotonic()
        assert time.monotonic() - started < 0.5
        assert heard.sequences()[-1] < 1000


async def test_after_its_server_died_both_find_the_next_one_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    async with Elsewhere() as other:
        with writing(other.address) as writer, reading(other.address) as heard:
            heard.reader.register(NODE, LIFE)
            last = await beat_for(writer, 0.2, 1)
            await heard.until(last)
            other.signal(signal.SIGKILL)
            await other.process.wait()
            async with Pulse() as pulse:
                last = await beat_for(writer, 2.0, last + 1)
                await other.start(other.address[1])
                deadline = time.monotonic() + GENEROUS
                while last not in heard.sequences():
                    assert time.monotonic() < deadline
                    last = await beat_for(writer, 0.1, last + 1)
                    await asyncio.sleep(0.1)
            assert pulse.longest < 0.5
    assert 1 <= len(caplog.records) < 40


async def test_a_server_that_never_answers_is_only_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server((HOST, 0)) as silent:  # accepts in the kernel, says nothing
        address = silent.getsockname()[:2]
        with writing(address, patience=0.2) as writer, reading(address, patience=0.2) as heard:
            heard.reader.register(NODE, LIFE)
            async with Pulse() as pulse:
                await beat_for(writer, 1.0, 1)
            assert pulse.longest < 0.5
            assert heard.beats == []
            for who in ("writer", "reader"):
                assert f"hpcft-heartbeat-{who} to" in caplog.text


async def test_the_server_listens_on_its_one_address(server: StoreServer) -> None:
    socket.create_connection(server.address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.address[1]))
    with pytest.raises(UnusableError, match="cannot listen on"):
        await StoreServer.start(*server.address)
    with pytest.raises(UnusableError, match="every interface"):
        await StoreServer.start("0.0.0.0")
    with pytest.raises(UnusableError, match="not a numeric address"):
        await StoreServer.start("localhost")


async def test_a_closed_server_is_gone_with_all_its_descriptors() -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    async def once() -> Address:
        server = await StoreServer.start(HOST)
        with writing(server.address) as writer, reading(server.address) as heard:
            heard.reader.register(NODE, LIFE)
            writer.beat(heartbeat(1))
            await heard.until(1)
        await eventually(lambda: ours() == ["hpcft-store-server"])
        server.close()
        assert await server.wait_closed()
        return server.address

    await once()  # torch opens something for itself the first time
    before = descriptors()
    for _ in range(5):
        address = await once()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    await eventually(lambda: descriptors() <= before)


async def test_a_server_closes_under_its_clients_and_they_notice(caplog: pytest.LogCaptureFixture) -> None:
    server = await StoreServer.start(HOST)
    with writing(server.address) as writer, reading(server.address) as heard:
        heard.reader.register(NODE, LIFE)
        await heard.until(await beat_for(writer, 0.1, 1))
        server.close()
        assert await server.wait_closed()
        await beat_for(writer, 0.6, 1000)
        for who in ("writer", "reader"):
            await eventually(lambda who=who: f"hpcft-heartbeat-{who} to" in caplog.text)  # type: ignore[misc]


def test_importing_the_module_imports_no_torch() -> None:
    check = "import sys; sys.path.insert(0, sys.argv[1]); import hpcft.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check, ROOT], check=True)


def test_a_process_whose_server_is_gone_ends_without_a_sound() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, {!r})\n"
        "from hpcft.lanes import end_process\n"
        "from hpcft.store import *\n"
        "quiet_torch()\n"
        "async def main():\n"
        "    server = await StoreServer.start('127.0.0.1')\n"
        "    writer = HeartbeatWriter(server.address, bytes(32), 1, patience=0.3)\n"
        "    for sequence in range(30):\n"
        "        writer.beat(Heartbeat('n1', 'a', 1, sequence, {{}}))\n"
        "        await asyncio.sleep(0.05)\n"
        "        if sequence == 10: server.close()\n"
        "    writer.close()\n"
        "import logging; logging.disable()\n"
        "asyncio.run(main())\n"
        "print('done')\n"
        "end_process(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script.format(ROOT)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a resolver of its own takes root")
def test_a_dead_name_server_delays_nothing(tmp_path: Path) -> None:
    """In a mount namespace of its own, with a name server that swallows every question."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.77\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, socket, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from hpcft.store import *\n"
        "dead = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); dead.bind(('127.0.0.77', 53))\n"
        "quiet_torch(); assert forget_dns()\n"
        "import torch.distributed\n"
        "async def main():\n"
        "    started = time.monotonic()\n"
        "    server = await StoreServer.start('127.0.0.9')\n"
        "    writer = HeartbeatWriter(server.address, bytes(32), 1)\n"
        "    writer.beat(Heartbeat('n1', 'a', 1, 1, {}))\n"
        "    heard = []\n"
        "    reader = HeartbeatReader(server.address, bytes(32), 1, lambda *beat: heard.append(beat), interval=0.02)\n"
        "    reader.register('n1', 'a')\n"
        "    while not heard: await asyncio.sleep(0.01)\n"
        "    print(time.monotonic() - started)\n"
        "    writer.close(); reader.close(); server.close(); await server.wait_closed(); dead.close()\n"
        "asyncio.run(main())\n"
    )
    command = 'mount --bind "$1" /etc/resolv.conf && exec "$2" "$3" "$4"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", tmp_path / "resolv.conf", sys.executable, script, ROOT],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "mount" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0
