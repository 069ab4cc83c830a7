"""The copy of a share in its arena, byte by byte the file that would be written from the tensors themselves; and who
may write an arena when, whatever goes wrong.

No GPU is needed here, and none is used: what a GPU does by itself is played by `Postponed`, so it is the order of
things that is tested (what is said when, and what a copy waits for), not CUDA.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hpcft.checkpoint.arena import Arena
from hpcft.checkpoint.share import content, plan_share, words_of
from hpcft.checkpoint.tree import FlatState, flatten
from hpcft.ids import Generation, Rank, Step
from hpcft.page import NodePage
from hpcft.worker import device
from hpcft.worker.arenas import Arenas, NoArenas
from hpcft.worker.device import SideStream, changes_of
from hpcft.worker.link import Link
from hpcft.worker.run import Run
from hpcft.worker.saving import Saving, named
from hpcft.worker.spec import WorkerSpec

CPU = torch.device("cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def state() -> dict[str, object]:
    complex_ = torch.randn(5, 3, dtype=torch.complex64)
    return {
        "plain": torch.randn(7, 4),
        "large": torch.randn(300, 300),
        "transposed": torch.randn(6, 5).t(),
        "large transposed": torch.randn(200, 300).t(),
        "every other": torch.arange(20)[::2],
        "conjugate": complex_.conj(),
        "negative": complex_.conj().imag,
        "double": torch.randn(3, dtype=torch.complex128).conj(),
        "short": torch.randn(9).to(torch.bfloat16),
        "truth": torch.tensor([True, False, True]),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_copy_is_the_file(rank: int, count: int) -> None:
    flat = flatten(state())
    plan, image = plan_share(flat.index(), flat.boxes, Rank(rank), 2, cut_above=64)
    page = NodePage.create(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, threads(count):
        link = Link(WorkerSpec(rank=Rank(rank), page_fd=page.fd, control_fd=theirs.fileno()))
        arenas = Arenas(link, CPU)
        arenas.prepare(plan, image)
        arena = Arena.reserve(plan.size)
        socket.send_fds(ours, [orjson.dumps({"kind": "arenas", "size": plan.size, "free": [0]})], [arena.fd])
        slot = arenas.take()
        arenas.copy(slot, flat, {}, 0.0, {"step": 1}, words_of(Rank(rank), flat, None))
        kinds = [orjson.loads(ours.recv(1 << 17))["kind"] for _ in range(2)]
        link.close()
    assert kinds == ["reserve", "snapshot"]
    assert bytes(arena.view) == b"".join(map(bytes, content(flat, image)))
    arena.close()
    page.close()


# --- who may write an arena when


class Agent:
    """The other end of a worker's channel: makes arenas when it is told to, and notes what is said."""

    def __init__(self, channel: socket.socket, link: Link, spec: WorkerSpec) -> None:
        self.channel = channel
        self.link = link
        self.spec = spec
        self.said: list[dict[str, Any]] = []

    def hear(self, seconds: float = 0.0) -> list[str]:
        """Kinds of all that was said so far, after waiting for a next one."""
        poller = select.poll()
        poller.register(self.channel, select.POLLIN)
        while poller.poll(seconds * 1000):
            packet, fds, _, _ = socket.recv_fds(self.channel, 1 << 17, 8)
            seconds = 0.0
            for fd in fds:
                os.close(fd)
            if not packet:
                break
            self.said.append(orjson.loads(packet))
        return [message["kind"] for message in self.said]

    def say(self, message: dict[str, Any], *fds: int) -> None:
        socket.send_fds(self.channel, [orjson.dumps(message)], fds)

    def provide(self, count: int = 1) -> None:
        """The answer to the last question."""
        self.hear()
        size = self.said[-1]["size"]
        arenas = [Arena.reserve(size) for _ in range(count)]
        self.say({"kind": "arenas", "size": size, "free": list(range(count))}, *(arena.fd for arena in arenas))
        for arena in arenas:
            arena.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    page = NodePage.create(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    spec = WorkerSpec(
        run_directory=tmp_path, generation=Generation(1), copies=True, page_fd=page.fd, control_fd=theirs.fileno()
    )
    link = Link(spec)
    with ours, theirs:
        yield Agent(ours, link, spec)
    link.close()
    page.close()


class Event(threading.Event):
    def synchronize(self) -> None:
        assert self.wait(60)


class Postponed(SideStream):
    """In place of a GPU's stream: what is to be copied beside the program is copied when `arrive` is called."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.on_its_way: list[tuple[Event, list[tuple[Tensor, Tensor]]]] = []
        self.held_back: list[Event] = []
        self.stream = "first"
        """The program's current one."""
        self.waiting: set[tuple[str, Event]] = set()

    def start(self, first: Iterable[tuple[Tensor, Tensor]], beside: Iterable[tuple[Tensor, Tensor]]) -> Any:
        for place, source in first:
            place.copy_(source)
        self.on_its_way.append((Event(), list(beside)))
        return self.on_its_way[-1][0]

    def hold_back(self, copied: Any) -> None:
        self.held_back.append(copied)
        self.waiting.add((self.stream, copied))

    def arrive(self) -> None:
        copied, pairs = self.on_its_way.pop(0)
        for place, source in pairs:
            place.copy_(source)
        copied.set()

    def pin(self, arena: Arena) -> None:
        pass

    def unpin(self, arena: Arena) -> None:
        assert not self.on_its_way, "the device still writes there"


def postponed(arenas: Arenas | None) -> Postponed:
    assert arenas is not None
    arenas._side = side = Postponed()
    return side


def prepared(arenas: Arenas, agent: Agent, state: dict[str, object], count: int = 1) -> FlatState:
    flat = flatten(state)
    arenas.prepare(*plan_share(flat.index(), flat.boxes, Rank(0), 1))
    agent.provide(count)
    return flat


def copied(arenas: Arenas, flat: FlatState, step: int, later: tuple[str, ...]) -> None:
    arenas.copy(arenas.take(), flat, dict.fromkeys(later), 0.0, {"step": step}, words_of(Rank(0), flat, None))


def meanwhile(*actions: Callable[[], object]) -> None:
    """Does these things in a moment, while somebody waits for them."""
    for number, action in enumerate(actions):
        threading.Timer(0.2 + 0.1 * number, action).start()


def test_what_is_on_its_way_is_said_in_order_and_waited_for_at_the_end(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    flat = prepared(arenas, agent, {"weight": torch.ones(8)}, count=2)
    copied(arenas, flat, 1, ("weight",))
    copied(arenas, flat, 2, ("weight",))
    assert agent.hear() == ["reserve"]
    side.on_its_way[1][0].set()  # the later one first
    assert agent.hear(0.05) == ["reserve"]
    meanwhile(side.arrive)
    arenas.finish()
    assert agent.hear() == ["reserve", "snapshot", "snapshot"]
    assert [message["step"] for message in agent.said[1:]] == [1, 2]


def test_a_run_does_not_end_before_its_last_copy_is_there(agent: Agent) -> None:
    run = Run(agent.spec, agent.link, CPU, {})
    side = postponed(run._saving._arenas)
    model = nn.Linear(3, 3)
    run.restore(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    run._saving.prepare()
    agent.provide()
    run._step = 1
    meanwhile(side.arrive)
    run._finish()
    assert agent.hear() == ["ready", "reserve", "snapshot", "returned"]


def test_an_arena_that_comes_later_is_one_more_and_another_shares_is_none(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    flat = prepared(arenas, agent, {"weight": torch.ones(8)})
    size = agent.said[0]["size"]
    copied(arenas, flat, 1, ())
    assert not arenas.has_slot()
    arena = Arena.reserve(size)
    for wrong in ({"size": size + 1, "slot": 1}, {"size": size, "slot": 2}):
        agent.say({"kind": "arena", **wrong}, arena.fd)
        assert not arenas.has_slot()
    agent.say({"kind": "arena", "size": size, "slot": 1}, arena.fd)
    copied(arenas, flat, 2, ())
    agent.hear()
    assert [message["slot"] for message in agent.said[1:]] == [0, 1]
    assert any(arena.view)
    arena.close()


def test_where_all_memory_was_refused_some_may_come_later(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    flat = flatten({"weight": torch.ones(8)})
    plan, image = plan_share(flat.index(), flat.boxes, Rank(0), 1)
    arenas.prepare(plan, image)
    agent.say({"kind": "no_arenas", "reason": "there is none"})
    with pytest.raises(NoArenas, match="there is none"):
        arenas.take()
    arena = Arena.reserve(plan.size)
    agent.say({"kind": "arena", "size": plan.size, "slot": 0}, arena.fd)
    assert arenas.has_slot() and arenas.take() == 0
    arena.close()


def test_a_new_plan_waits_for_the_copy_of_the_old_one(agent: Agent) -> None:
    """Also that memory is not unpinned before (see `Postponed`)."""
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    flat = prepared(arenas, agent, {"weight": torch.ones(8)})
    copied(arenas, flat, 1, ("weight",))
    meanwhile(side.arrive)
    more = prepared(arenas, agent, {"weight": torch.ones(8), "another": torch.ones(2)})
    assert agent.hear() == ["reserve", "snapshot", "reserve"]
    assert agent.said[0]["size"] == agent.said[1]["size"]
    copied(arenas, more, 2, ())
    side.arrive()
    arenas.finish()
    assert agent.hear()[3:] == ["snapshot"]
    assert agent.said[3]["size"] == agent.said[2]["size"]


def test_what_changes_while_it_is_copied_is_no_copy(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    weight, mean = torch.ones(8), torch.ones(8)
    flat = prepared(arenas, agent, {"model": {"weight": weight, "mean": mean}})
    for step, change in ((1, True), (2, False)):
        copied(arenas, flat, step, ("model.weight",))
        mean.zero_()  # copied before what follows
        if change:
            weight.clamp_(max=0.5)
        arenas.guard()
        weight.add_(1.0)
        assert len(side.held_back) == step  # by the device
        side.arrive()
        arenas.finish()
    assert agent.hear() == ["reserve", "save_failed", "snapshot"]
    assert agent.said[1]["step"] == 1 and "model.weight was changed outside" in agent.said[1]["reason"]
    assert agent.said[2]["step"] == 2


def test_an_optimizer_on_another_stream_is_held_back_too(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    one, two = torch.ones(8), torch.ones(8)
    flat = prepared(arenas, agent, {"one": one, "two": two})
    copied(arenas, flat, 1, ("one", "two"))
    event = side.on_its_way[0][0]
    for side.stream, weight in (("first", one), ("second", two)):
        arenas.guard()
        assert (side.stream, event) in side.waiting
        weight.add_(1.0)  # of a step: it is not reported as a change outside one
    side.arrive()
    arenas.finish()
    side.waiting.clear()
    arenas.guard()
    assert not side.waiting  # the copy is there
    assert agent.hear() == ["reserve", "snapshot"]


def test_a_step_begins_when_the_changes_before_it_are_counted(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy has just come, and its thread is reading the counters: the step's change must not be one of them."""
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    weight = torch.ones(8)
    flat = prepared(arenas, agent, {"weight": weight})
    copied(arenas, flat, 1, ("weight",))
    reading, go_on = threading.Event(), threading.Event()

    def slow(tensor: Tensor) -> int:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            go_on.wait(60)
        return changes_of(tensor)

    monkeypatch.setattr(device, "changes_of", slow)
    side.arrive()
    assert reading.wait(60)
    meanwhile(go_on.set)
    arenas.guard()
    weight.add_(1.0)
    go_on.set()
    arenas.finish()
    assert agent.hear() == ["reserve", "snapshot"]


def test_without_a_step_what_has_changed_until_it_is_there_counts(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    weight = torch.ones(8)
    flat = prepared(arenas, agent, {"weight": weight})
    copied(arenas, flat, 1, ("weight",))
    weight.zero_()
    side.arrive()
    arenas.finish()
    copied(arenas, flat, 2, ("weight",))
    side.arrive()
    arenas.finish()
    weight.zero_()
    arenas.guard()
    assert agent.hear() == ["reserve", "save_failed", "snapshot"]
    assert not side.held_back  # nothing was on its way


def test_a_device_that_fails_is_told_and_the_arena_is_free_again(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    side = postponed(arenas)
    flat = prepared(arenas, agent, {"weight": torch.ones(8)})

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    arenas.guard()
    slot = arenas.take()
    start = side.start

    def started(*pairs: Any) -> Any:
        event = start(*pairs)
        event.synchronize = broken
        return event

    side.start = started  # type: ignore[method-assign]
    arenas.copy(slot, flat, {"weight": None}, 0.0, {"step": 1}, words_of(Rank(0), flat, None))
    arenas.finish()
    assert agent.hear() == ["reserve", "save_failed"]
    assert "illegal memory access" in agent.said[1]["reason"]
    assert arenas.has_slot()


@pytest.mark.parametrize("gpu", [False, True])
def test_an_agent_that_is_not_told_of_a_copy_does_not_keep_its_arena(agent: Agent, gpu: bool) -> None:
    saving = Saving(agent.spec, agent.link, CPU)
    arenas = saving._arenas
    assert arenas is not None
    side = postponed(arenas) if gpu else None
    saving.remember(named({"model": nn.Linear(3, 3)}), None, None)
    saving.prepare()
    agent.provide()
    assert saving.prepared() and arenas.has_slot()
    agent.channel.close()
    saving.save(Step(1))
    if side is not None:
        side.arrive()
    saving.finish()
    assert list(arenas._free) == [0]


def test_an_agent_that_hears_no_question_is_asked_again(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    flat = flatten({"weight": torch.ones(8)})
    agent.channel.close()
    for _ in range(2):
        with pytest.raises(NoArenas, match="was not asked"):
            arenas.prepare(*plan_share(flat.index(), flat.boxes, Rank(0), 1))


def test_what_a_rank_writes_itself_keeps_to_its_part_of_the_bandwidth(agent: Agent) -> None:
    (agent.spec.run_directory / "checkpoints").mkdir()  # type: ignore[operator]
    model, bandwidth = nn.Linear(100, 100), 200_000.0
    saving = Saving(replace(agent.spec, copies=False, nonce="5eed", bandwidth=bandwidth), agent.link, CPU)
    saving.remember(named({"model": model}), None, None)
    saving.save(Step(1))
    assert agent.hear() == ["shard"]
    assert agent.said[0]["blocked"] >= sum(each.nbytes for each in model.parameters()) / bandwidth


def test_a_rank_that_writes_slowly_ends_with_its_lease(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    (agent.spec.run_directory / "checkpoints").mkdir()  # type: ignore[operator]
    saving = Saving(replace(agent.spec, copies=False, nonce="5eed", bandwidth=1.0), agent.link, CPU)
    saving.remember(named({"model": nn.Linear(100, 100)}), None, None)

    class Fenced(BaseException):
        pass

    def fence(link: Link) -> None:
        raise Fenced

    monkeypatch.setattr(Link, "_fence", fence)
    agent.link.page.lease_until_ns = 1  # long ago
    with pytest.raises(Fenced):
        saving.save(Step(1))


class Moody:
    """A state that cannot be had at times."""

    def __init__(self) -> None:
        self.bad = False
        self.asked = 0

    def state_dict(self) -> dict[str, object]:
        self.asked += 1
        if self.bad:
            raise OSError(24, "Too many open files")
        return {"a": 1}

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise AssertionError


def test_a_save_that_fails_leaves_its_arena_to_the_next(agent: Agent) -> None:
    saving = Saving(agent.spec, agent.link, CPU)
    position = Moody()
    saving.remember(named({"model": nn.Linear(3, 3)}), position, None)  # type: ignore[arg-type]
    saving.prepare()
    agent.provide()
    position.bad = True
    for step in (1, 2):
        saving.save(Step(step))
    position.bad = False
    saving.save(Step(3))
    assert agent.hear() == ["reserve", "save_failed", "save_failed", "snapshot"]
    assert "Too many open files" in agent.said[1]["reason"]


def test_a_state_that_cannot_be_had_after_the_first_step_does_not_end_the_run(agent: Agent) -> None:
    run = Run(agent.spec, agent.link, CPU, {})
    moody = Moody()
    run.restore(model=nn.Linear(3, 3), moody=moody)
    moody.bad = True
    run._look_for_memory(1)
    run._look_for_memory(2)
    assert agent.hear() == ["ready"]
    moody.bad = False
    threading.Timer(0.1, lambda: agent.hear(60) and agent.provide()).start()
    run._saving.save(Step(3))
    assert agent.hear()[1:] == ["reserve", "snapshot"]


def test_memory_is_asked_for_once_and_the_state_is_not_looked_at_while_the_agent_makes_it(agent: Agent) -> None:
    run = Run(agent.spec, agent.link, CPU, {})
    counted = Moody()
    run.restore(model=nn.Linear(3, 3), counted=counted)
    before = counted.asked
    for step in range(1, 6):
        assert run._look_at <= step
        run._look_for_memory(step)
    agent.provide()
    run._look_for_memory(6)
    assert counted.asked == before + 1
    assert run._look_at > 10**9  # it is known now
    assert agent.hear() == ["ready", "reserve"]


def test_descriptors_that_nobody_has_asked_for_are_closed(agent: Agent) -> None:
    """Copies to start from, of a program that does not call run.restore."""
    arenas = Arenas(agent.link, CPU)
    reader, writer = os.pipe()
    agent.say({"kind": "image", "rank": 0, "values": True}, writer, writer, writer, writer)
    os.close(writer)
    assert not arenas.has_slot()
    assert os.read(reader, 1) == b""  # the end: nobody else holds it
    os.close(reader)


def test_memory_that_cannot_be_mapped_is_none(agent: Agent) -> None:
    arenas = Arenas(agent.link, CPU)
    flat = flatten({"weight": torch.ones(8)})
    arenas.prepare(*plan_share(flat.index(), flat.boxes, Rank(0), 1))
    agent.hear()
    arena = Arena.reserve(agent.said[0]["size"])
    unwritable = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDONLY)
    agent.say({"kind": "arenas", "size": arena.size, "free": [0, 1]}, arena.fd, unwritable)
    os.close(unwritable)
    arena.close()
    assert arenas.answered()
    with pytest.raises(NoArenas, match="could not be mapped"):
        arenas.take()


def test_settings_of_an_optimizer_change_at_any_time(agent: Agent) -> None:
    """A learning rate that is a tensor is set between steps: it is copied in the order of the program's own work."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False, capturable=False)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saving = Saving(agent.spec, agent.link, CPU)
    saving.remember(named({"model": model, "optimizer": optimizer}), None, None)
    names = flatten(saving._state(Step(0))).index()
    assert "optimizer.param_groups.0.lr" in names
    others = {"optimizer.param_groups.0.lr", *(f"model.1.{x}" for x in ("running_mean", "running_var"))}
    assert names.keys() - saving._stepped(names).keys() == others | {"model.1.num_batches_tracked"}


def test_a_sharded_parameter_that_changes_while_it_is_copied_is_seen(agent: Agent) -> None:
    """Its part, which is what is copied, does not count changes that are made through the parameter."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        saving = Saving(agent.spec, agent.link, CPU)
        side = postponed(saving._arenas)
        saving.remember(named({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}), None, None)
        saving.prepare()
        agent.provide()
        saving.save(Step(1))
        with torch.no_grad():
            model.weight.clamp_(max=0.0)
        side.arrive()
        saving.finish()
    finally:
        dist.destroy_process_group()
    assert agent.hear() == ["reserve", "save_failed"]
    assert "model.weight was changed" in agent.said[1]["reason"]
