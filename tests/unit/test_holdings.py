"""Which state is complete in memory, and when it is not any more."""

from __future__ import annotations

from dataclasses import replace

from hpcft.events import CheckpointRef, Formation, Member, SnapshotDropped, SnapshotTaken
from hpcft.holdings import KNOWN, Holdings
from hpcft.ids import Generation, Incarnation, NodeId, Rank, Step, Term

A, B = (
    Member(NodeId(name), Incarnation(f"{name}1"), "10.0.0.1", 2, Rank(first)) for name, first in (("a", 0), ("b", 2))
)
FIRST = Formation(Term(1), Generation(1), (A, B), None, "0")


def taken(step: int, *members: Member, in_memory: bool = True, known: Holdings | None = None) -> Holdings:
    for member in members:
        event = SnapshotTaken(member.node, Generation(1), Step(step), in_memory)
        known = (known or Holdings()).took(event, FIRST)
    return known or Holdings()


def ref(step: int, generation: int = 1) -> CheckpointRef:
    return CheckpointRef(Step(step), Generation(generation))


def test_a_step_is_held_when_the_last_member_has_sealed_it() -> None:
    half = taken(10, A)
    assert half.held is None and not half.all_took(Step(10), FIRST)
    whole = taken(10, B, known=half)
    assert whole.held is not None and whole.held.snapshot == ref(10) and whole.held.members == (A, B)
    assert whole.all_took(Step(10), FIRST)


def test_what_one_rank_has_only_written_is_taken_and_not_held() -> None:
    mixed = taken(10, B, in_memory=False, known=taken(10, A))
    assert mixed.all_took(Step(10), FIRST) and mixed.held is None


def test_the_newest_that_is_held_stays_until_a_newer_one_is() -> None:
    known = taken(20, A, known=taken(10, A, B))
    assert known.held is not None and known.held.snapshot == ref(10)
    known = taken(20, B, known=known)
    assert known.held is not None and known.held.snapshot == ref(20)
    late = taken(10, A, B, known=known)  # said once more
    assert late.held is not None and late.held.snapshot == ref(20)


def test_few_steps_are_remembered() -> None:
    known = Holdings()
    for step in range(1, 10):
        known = taken(step, A, known=known)
    assert list(known.taken) == list(range(10 - KNOWN, 10))


def test_it_goes_with_an_agent_or_with_a_copy() -> None:
    known = taken(10, A, B)
    assert known.lost(A.node, Incarnation("another")).held is not None
    assert known.lost(B.node, B.incarnation).held is None
    assert known.dropped(SnapshotDropped(A.node, Generation(1), Step(9))).held is not None
    dropped = known.dropped(SnapshotDropped(A.node, Generation(1), Step(10)))
    assert dropped.held is None
    assert taken(10, B, known=dropped).held is None, "what was dropped does not come back by another's word"


def test_only_the_agents_that_hold_it_can_start_from_it_and_only_if_it_is_the_newest() -> None:
    known = taken(10, A, B)
    assert known.usable((A, B), None) is not None
    assert known.usable((B, A), ref(10)) is not None, "durable meanwhile: memory is nearer"
    assert known.usable((A, B), ref(20)) is None
    assert known.usable((A,), None) is None
    assert known.usable((A, replace(B, incarnation=Incarnation("b2"))), None) is None


def test_the_next_generation_keeps_what_it_starts_from_and_nothing_else() -> None:
    known = taken(10, A, B)
    second = replace(FIRST, generation=Generation(2))
    assert known.begin(second).held is None
    again = known.begin(replace(second, restore=ref(10), memory=(A, B)))
    assert again.held is not None and again.taken == {}
