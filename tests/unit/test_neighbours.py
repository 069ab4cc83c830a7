"""Copies that go from one agent to the next: real streams, real carriers, and what can go wrong between them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcft import durable, guests, process, stream, transfer
from hpcft.checkpoint.arena import Arena, memory_file
from hpcft.checkpoint.layout import checkpoint_name, staging_name
from hpcft.checkpoint.write import Plan
from hpcft.events import CheckpointRef, CopiesAlone, CopiesKept, Event, Formation, Member, Persist, SnapshotTaken
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term
from hpcft.neighbours import MORE_BYTES, Offer
from hpcft.snapshots import SaveSettings, Snapshots
from hpcft.tcp import listen

SECRET = bytes(32)
SIZE = durable.CHUNK_BYTES + 5000
CONTENT = bytes(range(256)) * (SIZE // 256) + b"x" * (SIZE % 256)
PLAN, VALUES = b"what the copy is" * 100, b'{"state": {}}'
TOKEN = b"t" * transfer.TOKEN_BYTES


# --- between two carriers ---


def parts(content: bytes, sealed: bytes | None = None) -> tuple[memoryview, list[str]]:
    expected = list(durable.chunk_digests(memoryview(sealed or content)))
    return memoryview(bytearray(len(content))), expected


def receiving(
    listening: socket.socket, parts: list[tuple[memoryview, list[str]]], seconds: float = 5.0
) -> tuple[threading.Thread, list[str]]:
    said: list[str] = []

    def receive() -> None:
        try:
            with transfer.accept(listening, TOKEN, seconds) as connection:
                transfer.receive(connection, parts)
            said.append("whole")
        except (transfer.TransferError, OSError) as error:
            said.append(str(error))

    thread = threading.Thread(target=receive)
    thread.start()
    return thread, said


def test_what_arrives_is_what_was_sealed() -> None:
    image, plan = parts(CONTENT), parts(PLAN)
    with listen("127.0.0.1", 0) as listening:
        thread, said = receiving(listening, [image, plan])
        files = [memory_file("image", CONTENT), memory_file("plan", PLAN)]
        transfer.send(listening.getsockname(), TOKEN, [(files[0], SIZE), (files[1], len(PLAN))])
        thread.join()
    assert said == ["whole"] and bytes(image[0]) == CONTENT and bytes(plan[0]) == PLAN
    for fd in files:
        os.close(fd)


def test_who_has_another_token_is_sent_away_and_the_right_one_still_comes() -> None:
    image = parts(PLAN)
    file = memory_file("plan", PLAN)
    with listen("127.0.0.1", 0) as listening:
        thread, said = receiving(listening, [image])
        with pytest.raises((transfer.TransferError, OSError)):
            transfer.send(listening.getsockname(), b"f" * transfer.TOKEN_BYTES, [(file, len(PLAN))])
        assert not any(image[0]), "not a byte of it was taken"
        transfer.send(listening.getsockname(), TOKEN, [(file, len(PLAN))])
        thread.join()
    assert said == ["whole"] and bytes(image[0]) == PLAN
    os.close(file)


def test_a_stranger_who_dribbles_does_not_keep_the_right_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PROOF_SECONDS", 0.5)
    image = parts(PLAN)
    file = memory_file("plan", PLAN)
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()) as stranger:
        gone = threading.Event()

        def dribble() -> None:
            with suppress(OSError):
                while not gone.wait(0.1):
                    stranger.sendall(b"t")

        dribbling = threading.Thread(target=dribble)
        dribbling.start()
        thread, said = receiving(listening, [image], seconds=3.0)
        transfer.send(listening.getsockname(), TOKEN, [(file, len(PLAN))])
        thread.join()
        gone.set()
        dribbling.join()
    assert said == ["whole"]
    os.close(file)


@pytest.mark.parametrize("many", [5, 3 * transfer.PROVING])
def test_strangers_who_say_nothing_do_not_keep_the_right_one_out(many: int) -> None:
    """None of them has to leave before it may show its token."""
    image = parts(PLAN)
    file = memory_file("plan", PLAN)
    with listen("127.0.0.1", 0) as listening, ExitStack() as strangers:
        for _ in range(many):
            strangers.enter_context(socket.create_connection(listening.getsockname()))
        thread, said = receiving(listening, [image], seconds=transfer.PROOF_SECONDS)
        transfer.send(listening.getsockname(), TOKEN, [(file, len(PLAN))])
        thread.join()
    assert said == ["whole"] and bytes(image[0]) == PLAN
    os.close(file)


def test_a_token_may_come_in_parts_while_others_are_sent_away() -> None:
    image = parts(PLAN)
    with listen("127.0.0.1", 0) as listening, ExitStack() as strangers:
        thread, said = receiving(listening, [image])
        with socket.create_connection(listening.getsockname()) as connection:
            connection.sendall(TOKEN[:7])
            for _ in range(5):
                stranger = strangers.enter_context(socket.create_connection(listening.getsockname()))
                stranger.sendall(b"f" * len(TOKEN))
                with suppress(ConnectionResetError):
                    assert stranger.recv(1) == b"", "it is told so at once"
            connection.sendall(TOKEN[7:] + PLAN)
            assert connection.recv(1) == b"\x01"
        thread.join()
    assert said == ["whole"] and bytes(image[0]) == PLAN


def test_a_byte_that_is_not_what_was_sealed_refuses_all_of_it() -> None:
    changed = bytearray(CONTENT)
    changed[-1] ^= 1
    file = memory_file("image", bytes(changed))
    with listen("127.0.0.1", 0) as listening:
        thread, said = receiving(listening, [parts(CONTENT)])
        with pytest.raises((transfer.TransferError, OSError)):
            transfer.send(listening.getsockname(), TOKEN, [(file, SIZE)])
        thread.join()
    assert said == ["what has arrived is not what was sealed"]
    os.close(file)


def test_a_connection_that_is_cut_leaves_nothing_to_believe_in() -> None:
    with listen("127.0.0.1", 0) as listening:
        thread, said = receiving(listening, [parts(CONTENT)])
        with socket.create_connection(listening.getsockname()) as connection:
            connection.sendall(TOKEN + CONTENT[:1000])
        thread.join()
    assert said == ["the connection was cut"]


def test_a_peer_that_has_stopped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALLED_SECONDS", 0.1)
    file = memory_file("image", CONTENT)
    # it listens, and neither takes nor answers
    with listen("127.0.0.1", 0) as listening, pytest.raises(TimeoutError):
        transfer.send(listening.getsockname(), TOKEN, [(file, SIZE)])
    with listen("127.0.0.1", 0) as listening:
        thread, said = receiving(listening, [parts(CONTENT)])
        with socket.create_connection(listening.getsockname()) as connection:
            connection.sendall(TOKEN)
            thread.join()
    assert said == ["timed out"]
    os.close(file)


def test_nobody_comes() -> None:
    with (
        listen("127.0.0.1", 0) as listening,
        pytest.raises(transfer.TransferError, match="nobody with the right token"),
    ):
        transfer.accept(listening, TOKEN, seconds=0.05)


# --- between two agents ---


def plan(rank: int) -> bytes:
    return Plan(Rank(rank), 2, "index", (), SIZE).to_bytes()


class Node:
    """An agent's part: its snapshots, a server, and a worker that says what the test wants."""

    def __init__(self, name: str, root: Path, memory: int | None = None) -> None:
        self.name = NodeId(name)
        self.said: list[Event] = []
        self.told: list[tuple[Rank, Mapping[str, Any]]] = []
        self.answers: list[tuple[str, dict[str, Any], list[int]]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.member: Member
        self.tampers: Callable[[dict[str, Any]], dict[str, Any]] = lambda hello: hello
        settings = SaveSettings(root, "127.0.0.1", memory=memory, slots=3, bandwidth=None)
        self.snapshots = Snapshots(settings, self.name, self._answer, self._run, self._dial)

    def _answer(self, worker: str, message: Mapping[str, Any], fds: Any) -> None:
        self.answers.append((worker, dict(message), [os.dup(fd) for fd in fds]))

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _dial(self, member: Member) -> stream.Stream:
        hello = self.tampers({"purpose": "copies", "node": self.name, "incarnation": self.member.incarnation})
        return await stream.dial((member.address, member.port), SECRET, hello)

    async def open(self, first: int) -> None:
        self.server = await stream.serve(
            "127.0.0.1", 0, SECRET, lambda arrived: self._run(self.snapshots.entertain(arrived), "guest") and None
        )
        port = self.server.address[1]
        self.member = Member(self.name, Incarnation(f"{self.name}/1"), "127.0.0.1", 1, Rank(first), port)

    def begin(self, formation: Formation) -> None:
        member = formation.member(self.name)
        assert member is not None
        workers = {0: (f"g{formation.generation}", Rank(member.first_rank))}
        self.snapshots.begin(formation, workers, lambda *a: self.told.append(a), self.said.append)

    async def copies(self, step: int, content: bytes = CONTENT, *, durable: bool = False) -> None:
        """The worker asks for arenas, if it has none, and leaves a copy in a free one."""
        if not self._of("arenas"):
            self.snapshots.asked(0, SIZE, memory_file("plan", plan(self.member.first_rank)))
            await until(lambda: bool(self._of("arenas")))
            self.free = list(self._of("arenas")[0][1]["free"])
        self.free += [each[1]["slot"] for each in self._of("free")]
        self.answers = [each for each in self.answers if each[1]["kind"] != "free"]
        slot = self.free.pop(0)
        arena = Arena(os.dup(self._of("arenas")[0][2][slot]))
        arena.view[: len(content)] = content
        arena.close()
        message = {
            "slot": slot,
            "size": SIZE,
            "step": step,
            "position": None,
            "versions": {},
            "metrics": {},
            "durable": durable,
            "ledger": None,
            "blocked": 0.0,
        }
        values = memory_file("values", VALUES) if self.member.first_rank == 0 else None  # as workers do
        self.snapshots.copied(0, message, values)

    def _of(self, kind: str) -> list[tuple[str, dict[str, Any], list[int]]]:
        return [each for each in self.answers if each[1]["kind"] == kind]

    def forget_answers(self) -> None:
        for _, _, fds in self.answers:
            for fd in fds:
                os.close(fd)
        self.answers = []

    def handed_out(self) -> dict[int, bytes]:
        return {
            each["rank"]: os.pread(fds[0], SIZE, 0)
            for _, each, fds in self._of("image")
            if os.pread(fds[1], 1 << 20, 0) == plan(each["rank"])
            and [os.pread(fd, 1 << 20, 0) for fd in fds[3:]] == ([] if each["rank"] else [VALUES])
        }

    async def close(self) -> None:
        self.snapshots.end()
        for task in list(self.tasks):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.server.close()
        self.forget_answers()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 what the parts under test do is all there is to look at
            await asyncio.sleep(0.01)


@asynccontextmanager
async def two(tmp_path: Path, memory: int | None = None) -> AsyncIterator[tuple[Node, Node, Formation]]:
    """Neighbours of each other, in their first generation."""
    nodes = Node("a", tmp_path), Node("b", tmp_path, memory)
    try:
        for number, node in enumerate(nodes):
            await node.open(number)
        members = tuple(node.member for node in nodes)
        formation = Formation(Term(1), Generation(1), members, None, "00000000", neighbours=True)
        for node in nodes:
            node.begin(formation)
        yield *nodes, formation
    finally:
        for node in nodes:
            await node.close()


def alone(node: Node) -> list[str]:
    return [each.reason for each in node.said if isinstance(each, CopiesAlone)]


def test_a_copy_comes_to_the_neighbour_and_is_handed_out_and_written_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (a, b, first):
            kept = CopiesKept(NodeId("b"), Generation(1), Step(10), NodeId("a"))
            await a.copies(10)
            await until(lambda: kept in b.said)
            assert not alone(a) and SnapshotTaken in {type(each) for each in a.said}
            rest = len(plan(0)) + len(VALUES)
            assert 2 * SIZE + rest < b.snapshots.reserved < 2 * SIZE + rest + 200, "the memory for guests counts"
            # a is lost: b's own copy and a's are the state that the next generation starts from
            await b.copies(10, CONTENT[::-1])
            await until(lambda: any(isinstance(each, SnapshotTaken) for each in b.said))
            restore, by = CheckpointRef(Step(10), Generation(1)), (NodeId("b"), NodeId("b"))
            last = replace(first, generation=Generation(2), members=(replace(b.member, first_rank=Rank(0)),))
            b.begin(replace(last, restore=restore, memory=first.members, handed_by=by, neighbours=False))
            b.snapshots.hand_out()
            assert b.handed_out() == {0: CONTENT, 1: CONTENT[::-1]}
            await until(lambda: len(b.told) == 1)
            assert b.told[0][0] == 1 and not b.snapshots.report(), "its own; what a has made, a may have written"
            b.snapshots.persist(Persist(Term(1), restore, first.members, by, "0000000b"))
            await until(lambda: len(b.told) == 3)
            assert written(b.told[1:]) == {0: "0000000b", 1: "0000000b"}
            assert contents(tmp_path, 10, "0000000b") == [CONTENT, CONTENT[::-1]]

    asyncio.run(scenario())


def written(told: list[tuple[Rank, Mapping[str, Any]]]) -> dict[int, str]:
    """The nonces under which ranks have written their shares."""
    assert all("shard" in message for _, message in told), told
    return {rank: message["shard"]["report"]["nonce"] for rank, message in told}


def contents(root: Path, step: int, nonce: str) -> list[bytes]:
    """Of the shards, by rank."""
    directory = root / staging_name(checkpoint_name(Step(step), Generation(1)), nonce)
    return [each.read_bytes() for each in sorted(directory.glob("*.safetensors"))]


def test_what_a_lost_node_has_written_is_in_nobodys_way(tmp_path: Path) -> None:
    """Its neighbour, which has its copy, writes in another attempt, as all others do."""

    async def scenario() -> None:
        async with two(tmp_path) as (a, b, first):
            await a.copies(10, durable=True)
            await b.copies(10, CONTENT[::-1], durable=True)
            await until(lambda: CopiesKept(NodeId("b"), Generation(1), Step(10), NodeId("a")) in b.said)
            await until(lambda: bool(a.told and b.told))
            assert written([*a.told, *b.told]) == {0: first.nonce, 1: first.nonce}
            b.told.clear()
            restore, by = CheckpointRef(Step(10), Generation(1)), (NodeId("b"), NodeId("b"))
            b.snapshots.persist(Persist(Term(1), restore, first.members, by, "0000000b"))  # it comes before the start
            last = replace(first, generation=Generation(2), members=(replace(b.member, first_rank=Rank(0)),))
            b.begin(replace(last, restore=restore, memory=first.members, handed_by=by, neighbours=False))
            b.snapshots.hand_out()
            await until(lambda: len(b.told) == 2 and not b.snapshots.report())
            assert written(b.told) == {0: "0000000b", 1: "0000000b"}
            assert contents(tmp_path, 10, "0000000b") == [CONTENT, CONTENT[::-1]]

    asyncio.run(scenario())


def test_what_is_durable_already_is_not_written_by_who_hands_it_out(tmp_path: Path) -> None:
    """All have reported, so there is no order to write it."""

    async def scenario() -> None:
        async with two(tmp_path) as (a, b, first):
            await a.copies(10, durable=True)
            await b.copies(10, CONTENT[::-1], durable=True)
            await until(lambda: CopiesKept(NodeId("b"), Generation(1), Step(10), NodeId("a")) in b.said)
            await until(lambda: bool(a.told and b.told))
            restore, by = CheckpointRef(Step(10), Generation(1)), (NodeId("b"), NodeId("b"))
            last = replace(first, generation=Generation(2), members=(replace(b.member, first_rank=Rank(0)),))
            tasks = set(b.tasks)
            b.begin(replace(last, restore=restore, memory=first.members, handed_by=by, neighbours=False))
            b.snapshots.hand_out()
            assert b.handed_out() == {0: CONTENT, 1: CONTENT[::-1]}
            assert b.tasks == tasks, "nothing was begun"

    asyncio.run(scenario())


def test_older_copies_of_guests_go_and_late_ones_do_not_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (a, b, _):
            for step in (10, 20, 30):  # two arenas: the third has to wait until one is free
                await a.copies(step)
            await until(lambda: sum(isinstance(each, CopiesKept) for each in b.said) == 2)
            b.snapshots.keep(Generation(1), Step(20))
            await until(lambda: CopiesKept(NodeId("b"), Generation(1), Step(30), NodeId("a")) in b.said)
            a.snapshots.keep(Generation(1), Step(20))
            b.snapshots.keep(Generation(1), Step(40))
            await a.copies(35)
            await until(lambda: bool(alone(a)))
            assert alone(a) == ["step 35 is of no use any more"]
            order = Persist(Term(1), CheckpointRef(Step(20), Generation(1)), (a.member,), (NodeId("b"),), "00bb")
            b.snapshots.persist(order)
            assert b.told[-1][1]["save_failed"]["reason"] == "its copy is not in memory any more"

    asyncio.run(scenario())


def test_only_the_neighbour_in_this_generation_is_let_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (a, b, _):
            a.tampers = lambda hello: {**hello, "incarnation": "a/0"}
            await a.copies(10)
            await until(lambda: bool(alone(a)))
            assert alone(a) == ["b is not its neighbour in generation 1"]
            await a.copies(20)
            await until(lambda: len(alone(a)) == 2)
            assert len({*alone(a)}) == 1, "it is not asked again for a while"
            assert not b.said

    asyncio.run(scenario())


def test_without_memory_the_neighbour_says_how_much_is_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path, memory=SIZE) as (a, b, _):
            await a.copies(10)
            await until(lambda: bool(alone(a)))
            assert "the copies of a's rank 0 need" in alone(a)[0] and "checkpoint.memory leaves" in alone(a)[0]
            assert b.snapshots.refused == alone(a)[0] and b.snapshots.reserved == 0

    asyncio.run(scenario())


def test_a_step_that_was_copied_twice_is_handed_out_and_written_once(tmp_path: Path) -> None:
    """For a snapshot, and for the checkpoint at the end of the run."""

    async def scenario() -> None:
        async with two(tmp_path) as (a, _, first):
            await a.copies(10)
            await a.copies(10)
            await until(lambda: sum(isinstance(each, SnapshotTaken) for each in a.said) == 2)
            a.forget_answers()
            restore, member = CheckpointRef(Step(10), Generation(1)), (a.member,)
            again = replace(first, generation=Generation(2), members=member, neighbours=False)
            a.begin(replace(again, restore=restore, memory=member, handed_by=(NodeId("a"),)))
            a.snapshots.hand_out()
            assert [each[1]["kind"] for each in a.answers] == ["image", "images"] and a.answers[-1][1]["count"] == 1
            a.snapshots.persist(Persist(Term(1), restore, member, (NodeId("a"),), first.nonce))
            await until(lambda: bool(a.told))
            a.snapshots.persist(Persist(Term(1), restore, member, (NodeId("a"),), first.nonce))
            assert ["shard" in message for _, message in a.told] == [True, True], a.told

    asyncio.run(scenario())


def test_a_step_that_is_being_written_from_memory_is_not_written_twice(tmp_path: Path) -> None:
    """The order for it comes while the copy that its checkpoint was to be made of is being sealed."""

    async def scenario() -> None:
        async with two(tmp_path) as (a, _, first):
            await a.copies(10)
            await until(lambda: any(isinstance(each, SnapshotTaken) for each in a.said))
            await a.copies(10, durable=True)
            restore = CheckpointRef(Step(10), Generation(1))
            a.snapshots.persist(Persist(Term(1), restore, (a.member,), (NodeId("a"),), first.nonce))
            await until(lambda: sum(isinstance(each, SnapshotTaken) for each in a.said) == 2 and bool(a.told))
            await until(lambda: not a.snapshots.report())
            assert ["shard" in message for _, message in a.told] == [True], a.told

    asyncio.run(scenario())


def test_what_there_was_no_memory_for_is_made_when_older_copies_have_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path, memory=3 * SIZE + SIZE // 2) as (_, b, _):
            small = SIZE // 4
            b.snapshots.asked(0, small, memory_file("plan", b"of a smaller world"))
            await until(lambda: bool(b._of("arenas")))
            said = {"slot": 0, "size": small, "step": 10, "durable": False, "blocked": 0.0}
            b.snapshots.copied(0, {**said, "position": None, "versions": {}, "metrics": {}, "ledger": None}, None)
            b.snapshots.copied(0, {**said, "slot": 1, "step": 11}, None)
            await until(lambda: sum(isinstance(each, SnapshotTaken) for each in b.said) == 2)
            b.forget_answers()
            b.snapshots.asked(0, SIZE, memory_file("plan", b"of a larger share"))
            await until(lambda: bool(b._of("arenas")))
            assert len(b._of("arenas")[0][2]) == 2 and "it gets 2" in b.snapshots.refused
            b.snapshots.keep(Generation(1), Step(20))
            await until(lambda: bool(b._of("arena")))
            ((_, about, fds),) = b._of("arena")
            assert about == {"kind": "arena", "size": SIZE, "slot": 2} and os.fstat(fds[0]).st_size == SIZE
            assert b.snapshots.refused == "" or "will need about" in b.snapshots.refused

    asyncio.run(scenario())


def test_that_guests_will_find_no_memory_is_said_before_they_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path, memory=4 * SIZE) as (_, b, _):
            b.snapshots.asked(0, SIZE, memory_file("plan", plan(1)))
            await until(lambda: bool(b.snapshots.refused))
            assert "the copies of a will need about 32 MiB on its neighbour b" in b.snapshots.refused
            assert "checkpoint.memory leaves 16 MiB" in b.snapshots.refused

    asyncio.run(scenario())


def test_bytes_that_change_after_the_seal_do_not_get_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests cross the stream; whatever the connection carries is compared with them."""
    real = guests.offer_of

    async def other(*given: Any) -> Any:
        offer = await real(*given)
        return replace(offer, digests=(*offer.digests[:-1], durable.digest(b"something else")))

    monkeypatch.setattr(guests, "offer_of", other)

    async def scenario() -> None:
        async with two(tmp_path) as (a, b, _):
            await a.copies(10)
            await until(lambda: bool(alone(a)))
            assert alone(a) == ["what has arrived is not what was sealed"]
            assert not any(isinstance(each, CopiesKept) for each in b.said)

    asyncio.run(scenario())


def test_carriers_that_are_killed_cost_the_copy_that_they_carry_and_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (a, b, formation):
            await a.copies(10)
            await until(lambda: any(isinstance(each, CopiesKept) for each in b.said))
            receiver = next(iter(b.snapshots._guests)).memory
            assert receiver._process is not None
            process.send(receiver._process.pid, signal.SIGSTOP)  # it takes the job, and nothing comes of it
            await a.copies(20)
            await until(receiver._turn.locked)
            process.send(receiver._process.pid, signal.SIGKILL)
            await until(lambda: bool(alone(a)))
            assert "has died" in alone(a)[0]
            for node in (a, b):
                node.begin(replace(formation, generation=Generation(2)))
            a.forget_answers()
            await a.copies(30)
            await until(lambda: CopiesKept(NodeId("b"), Generation(2), Step(30), NodeId("a")) in b.said)

    asyncio.run(scenario())


OFFER = {
    "generation": 1,
    "rank": 0,
    "message": {"step": 10, "size": SIZE},
    "digests": ["0", "1"],
    "more": [[len(PLAN), ["2"]], [0, []]],
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"digests": ["0"]},
        {"digests": ["0", "1", "2"]},
        {"more": [[len(PLAN), []]]},
        {"more": [[-1, []]]},
        {"more": [[1 << 50, ["2"]]]},
        {"more": [[MORE_BYTES + 1, ["2"] * durable.chunk_count(MORE_BYTES + 1)]]},
        {"more": []},
        {"message": {"step": 10, "size": 0}, "digests": []},
        {"message": {"step": -1, "size": SIZE}},
    ],
    ids=str,
)
def test_an_offer_names_sizes_that_can_be_and_a_digest_of_each_chunk(wrong: dict[str, Any]) -> None:
    assert Offer.parse({"offer": OFFER}).more[1] == (0, ())
    with pytest.raises(ValueError):
        Offer.parse({"offer": OFFER | wrong})


def test_an_offer_of_nonsense_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (a, b, _):
            for said in ({"offer": {}}, {"more": 1}, {"offer": {"generation": 1, "rank": 0, "message": {}}}):
                peer = await stream.dial(
                    b.server.address, SECRET, {"purpose": "copies", "node": "a", "incarnation": a.member.incarnation}
                )
                peer.send(said)
                assert "refused" in await peer.receive()
                peer.close()

    asyncio.run(scenario())
