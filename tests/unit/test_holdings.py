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


def spoken(
    step: int, *, a: str = "a", b: str = "b", said: tuple[tuple[int, int, str], ...] = ()
) -> list[SnapshotTaken]:
    """Ranks 0 and 1 live on A, 2 and 3 on B; `said` is what B's ranks hold of others' shares."""
    replicas = tuple((Rank(by), Rank(of), digest) for by, of, digest in said)
    return [
        SnapshotTaken(A.node, Generation(1), Step(step), True, ((Rank(0), f"{a}0"), (Rank(1), f"{a}1"))),
        SnapshotTaken(B.node, Generation(1), Step(step), True, ((Rank(2), f"{b}2"), (Rank(3), f"{b}3")), replicas),
    ]


def heard(*words: SnapshotTaken) -> Holdings:
    known = Holdings()
    for word in words:
        known = known.took(word, FIRST)
    return known


def test_replicas_that_differ_are_named_with_their_nodes() -> None:
    assert heard(*spoken(10, said=((2, 0, "a0"), (3, 2, "b2")))).doubt is None
    words = spoken(10, said=((2, 0, "a0"), (3, 1, "else")))
    assert heard(words[1]).doubt is None, "not before both have spoken"
    for order in (words, words[::-1]):
        doubt = heard(*order).doubt
        assert doubt is not None and doubt.step == 10
        assert doubt.reason.startswith("rank 3 on b and rank 1 on a hold different parameters")
    assert heard(*words, *spoken(20, a="x", b="y")).doubt is None


def test_copies_that_stand_still_are_an_alarm() -> None:
    doubt = heard(*spoken(10), *spoken(20)).doubt
    assert doubt is not None and (doubt.step, doubt.generation) == (20, 1)
    assert "does not train" in doubt.reason
    assert heard(*spoken(10), *spoken(20, a="x")).doubt is None, "one rank's share may stand still: it is frozen"
    again = heard(*spoken(10)).begin(FIRST)
    for word in spoken(20):
        again = again.took(word, FIRST)
    assert again.doubt is None, "another generation has other copies"
