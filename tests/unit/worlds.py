"""Worlds for tests: built from events, as leaders build them."""

from __future__ import annotations

from hpcft.events import (
    CheckpointRef,
    Commit,
    Decided,
    Event,
    Failure,
    FailureKind,
    Formation,
    Member,
    NodeJoined,
    Progressed,
    Propose,
    TermBegan,
    WorkerFailed,
    WorkersReady,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.transitions import apply
from hpcft.world import World


def node(name: str) -> NodeId:
    return NodeId(name)


def life(name: str, number: int = 1) -> Incarnation:
    return Incarnation(f"{name}{number}")


def began(names: str = "ab", term: int = 1, allocation: str = "7.0", *, takeover: bool = False) -> TermBegan:
    nodes = tuple(NodeId(name) for name in names)
    return TermBegan(RunId("r"), Term(term), nodes[0], life(names[0]), allocation, nodes, takeover)


def joined(name: str, workers: int = 2, number: int = 1) -> NodeJoined:
    return NodeJoined(NodeId(name), life(name, number), "10.0.0.1", workers, 7000)


def formation(names: str, generation: int, restore: CheckpointRef | None = None, term: int = 1) -> Formation:
    members = tuple(
        Member(NodeId(name), life(name), "10.0.0.1", 2, Rank(2 * index)) for index, name in enumerate(names)
    )
    return Formation(Term(term), Generation(generation), members, restore, "0")


def proposed(formed: Formation) -> Decided:
    return Decided((Propose(formed),), "proposed")


def committed(generation: int) -> Decided:
    return Decided((Commit(Generation(generation)),), "committed")


def ready(name: str, generation: int = 1) -> WorkersReady:
    return WorkersReady(NodeId(name), Generation(generation))


def at_step(name: str, step: int, generation: int = 1) -> Progressed:
    return Progressed(NodeId(name), Generation(generation), Step(step), None)


def failed(
    name: str,
    rank: int,
    kind: FailureKind = FailureKind.KILLED,
    *,
    generation: int = 1,
    step: int = 0,
    what: str = "killed by SIGKILL",
) -> WorkerFailed:
    return WorkerFailed(NodeId(name), life(name), Generation(generation), Rank(rank), Failure(kind, what, Step(step)))


def happen(world: World, *events: Event, now: float = 0.0) -> World:
    for event in events:
        world = apply(world, event, now)
    return world


def training(names: str = "ab", *, step: int = 10, since: float = 0.0) -> World:
    """Generation 1 runs on all nodes and has reached `step`; two workers each."""
    world = happen(World(), began(names), *(joined(name) for name in names), now=since)
    world = happen(world, proposed(formation(names, 1)), committed(1), *(ready(name) for name in names), now=since)
    return happen(world, *(at_step(name, step) for name in names), now=since + 1.0)
