"""Which state is complete in memory, and when it is not any more."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hpcft.events import CheckpointRef, CopiesAlone, CopiesKept, Formation, Member, SnapshotDropped, SnapshotTaken
from hpcft.holdings import KNOWN, STANDSTILL_STEPS, Holdings
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


def test_what_nobody_can_start_from_is_useless() -> None:
    assert taken(10, A).useless(FIRST) == {}, "the other one may still come"
    assert taken(10, A, B).useless(FIRST) == {}
    mixed = taken(10, B, in_memory=False, known=taken(10, A))
    assert mixed.useless(FIRST) == {10: True}, "it is being written, and saved by all"
    passed = taken(11, B, known=taken(10, A))
    assert passed.useless(FIRST) == {10: False}, "ranks come to steps in order"
    failed = taken(10, A).dropped(SnapshotDropped(B.node, Generation(1), Step(10)))
    assert failed.useless(FIRST) == {10: False}
    assert failed.all_took(Step(10), FIRST), "nobody will come back to it"
    again = taken(10, B, known=failed)  # its other rank's copy, or said once more
    assert again.useless(FIRST) == {10: False} and again.held is None
    many = failed
    for step in range(11, 11 + KNOWN):
        many = taken(step, A, B, known=many)
    assert many.useless(FIRST) == {}


def test_the_slowest_node_says_for_how_long_a_copy_stopped_training() -> None:
    known = Holdings()
    for member, seconds in ((A, 0.5), (B, 0.2)):
        known = known.took(SnapshotTaken(member.node, Generation(1), Step(10), blocked=seconds), FIRST)
    assert known.held is not None and known.held.blocked == 0.5
    known = taken(11, A, B, known=known)
    assert known.held is not None and (known.held.snapshot, known.held.blocked) == (ref(11), 0.0)


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
    doubt = heard(*spoken(10), *spoken(30)).doubt
    assert doubt is not None and (doubt.step, doubt.generation) == (30, 1)
    assert "the same as those of step 10" in doubt.reason and "does not train" in doubt.reason
    assert heard(*spoken(10), *spoken(30, a="x")).doubt is None, "one rank's share may stand still: it is frozen"
    assert heard(*spoken(10), *spoken(10)).doubt is None, "one step, copied twice"
    again = heard(*spoken(10)).begin(FIRST)
    for word in spoken(30):
        again = again.took(word, FIRST)
    assert again.doubt is None, "another generation has other copies"


def test_steps_that_a_gradient_scaler_passes_over_are_none() -> None:
    def copied(steps: range) -> Holdings:
        return heard(*(word for step in steps for word in spoken(step)))

    assert copied(range(10, 10 + STANDSTILL_STEPS)).doubt is None
    assert copied(range(10, 10 + STANDSTILL_STEPS + 1)).doubt is not None
    trained = heard(*(word for step in (10, 25, 30, 40) for word in spoken(step, a=str(step // 20))))
    assert trained.doubt is None, "each change begins anew"


C = Member(NodeId("c"), Incarnation("c1"), "10.0.0.3", 2, Rank(4))
ABC = Formation(Term(1), Generation(1), (A, B, C), None, "0", neighbours=True)


def kept(known: Holdings, step: int, *owners: Member, formation: Formation = ABC) -> Holdings:
    """The neighbours of these have their copies."""
    for owner in owners:
        keeper = formation.neighbour(owner.node)
        assert keeper is not None
        known = known.kept(CopiesKept(keeper.node, Generation(1), Step(step), owner.node), formation)
    return known


def held_by_all(*steps: int) -> Holdings:
    known = Holdings()
    for step in steps:
        for member in ABC.members:
            known = known.took(SnapshotTaken(member.node, Generation(1), Step(step)), ABC)
    return known


def test_the_next_member_keeps_a_members_copies_and_nobody_its_own() -> None:
    assert [ABC.neighbour(each.node) for each in ABC.members] == [B, C, A]
    assert [ABC.guest(each.node) for each in ABC.members] == [C, A, B]
    assert FIRST.neighbour(A.node) is None and FIRST.guest(A.node) is None
    alone = replace(ABC, members=(A,))
    assert alone.neighbour(A.node) is None and alone.guest(A.node) is None


def test_a_step_is_safe_when_each_neighbour_has_it_or_never_will() -> None:
    known = kept(held_by_all(10), 10, A, B)
    assert known.held is not None and known.safe is None
    safe = kept(known, 10, C)
    assert safe.safe is not None and safe.safe.snapshot == ref(10)
    given_up = known.kept(CopiesAlone(C.node, Generation(1), Step(10), "no memory"), ABC)
    assert given_up.safe is not None and given_up.usable((A, B), None) is None and given_up.usable((B, C), None)
    assert kept(given_up, 10, C).usable((A, B), None), "it has come after all"


def test_what_is_safe_stays_until_a_newer_step_is() -> None:
    """So a node that is lost in between costs the newest copies, and not all of them."""
    known = kept(held_by_all(10, 20), 10, A, B, C)
    assert known.held is not None and known.held.snapshot == ref(20)
    assert known.safe is not None and known.safe.snapshot == ref(10)
    found = known.lost(C.node, C.incarnation).usable((A, B), None)
    assert found is not None and found.snapshot == ref(10) and found.handed_by((A, B)) == ("a", "b", "a")
    assert known.usable((A, B, C), None) == known.held, "of a living node the newest counts"
    later = kept(known, 20, A, B, C)
    assert [each.snapshot for each in later.whole] == [ref(20)]


def test_a_copy_that_was_kept_before_all_had_sealed_counts() -> None:
    known = kept(Holdings(), 10, A, B, C)
    for member in ABC.members:
        known = known.took(SnapshotTaken(member.node, Generation(1), Step(10)), ABC)
    assert known.safe is not None and known.usable((B, C), None) is not None


def test_a_lost_keeper_does_not_come_back_by_what_others_say_late() -> None:
    known = kept(held_by_all(10), 10, A).lost(B.node, B.incarnation)
    assert known.held is None, "nobody has what B has made"
    known = kept(held_by_all(10), 10, A, B).lost(B.node, B.incarnation)
    for late in (
        kept(known, 10, C),
        known.kept(CopiesKept(B.node, Generation(1), Step(10), A.node), ABC),
        known.took(SnapshotTaken(C.node, Generation(1), Step(20)), ABC),
        known.took(SnapshotTaken(C.node, Generation(1), Step(10)), ABC),
    ):
        assert late.held is not None and late.held.holders[A.node] == ((A.node, A.incarnation),)
        assert late.usable((A, C), None) is not None
        assert late.lost(A.node, A.incarnation).held is None, "the last copies of A's share were A's"


def test_a_step_that_a_lost_node_has_taken_costs_no_older_one_that_is_there() -> None:
    """What others say late would make it whole and safe, with nobody who has the lost node's share."""
    known = kept(held_by_all(10), 10, A, B, C)
    for member in (A, B):
        known = known.took(SnapshotTaken(member.node, Generation(1), Step(20)), ABC)
    known = kept(known, 20, A, C).kept(CopiesAlone(B.node, Generation(1), Step(20), "no memory"), ABC)
    late = SnapshotTaken(C.node, Generation(1), Step(20))
    assert [each.snapshot for each in known.took(late, ABC).whole] == [ref(20)]
    found = known.lost(B.node, B.incarnation).took(late, ABC)
    assert [each.snapshot for each in found.whole] == [ref(10)] and found.usable((A, C), None) is not None


def test_a_step_that_a_lost_node_has_taken_is_there_if_its_neighbour_has_its_copies() -> None:
    known = Holdings()
    for member in (A, B):
        known = known.took(SnapshotTaken(member.node, Generation(1), Step(20)), ABC)
    known = kept(known, 20, A, B).lost(B.node, B.incarnation)
    found = known.took(SnapshotTaken(C.node, Generation(1), Step(20)), ABC).usable((A, C), None)
    assert found is not None and found.handed_by((A, C)) == ("a", "c", "c")


def test_a_node_that_lives_hands_out_its_own() -> None:
    known = kept(held_by_all(10), 10, A, B, C)
    assert known.held is not None and known.held.handed_by((C, A, B)) == ("a", "b", "c")
    again = replace(A, incarnation=Incarnation("a2"))
    assert known.held.handed_by((again, B, C)) == ("b", "b", "c")


MEMBERS = st.integers(2, 5).map(
    lambda count: tuple(
        Member(NodeId(f"n{number}"), Incarnation("1"), "10.0.0.1", 1, Rank(number)) for number in range(count)
    )
)


@given(MEMBERS, st.data())
def test_usable_if_and_only_if_each_share_has_a_holder_that_lives(
    members: tuple[Member, ...], data: st.DataObject
) -> None:
    formation = replace(ABC, members=members)
    replicated = data.draw(st.sets(st.sampled_from(members)))
    alive = tuple(data.draw(st.sets(st.sampled_from(members), min_size=1)))
    told = [SnapshotTaken(each.node, Generation(1), Step(10)) for each in members]
    events: list[SnapshotTaken | CopiesKept | CopiesAlone] = [*told]
    for each in members:
        keeper = formation.neighbour(each.node)
        assert keeper is not None
        done = each in replicated
        events.append(
            CopiesKept(keeper.node, Generation(1), Step(10), each.node)
            if done
            else CopiesAlone(each.node, Generation(1), Step(10), "why")
        )
    known = Holdings()
    for event in data.draw(st.permutations(events)):
        known = known.took(event, formation) if isinstance(event, SnapshotTaken) else known.kept(event, formation)
    assert known.safe is not None
    for each in members:
        if each not in alive:
            known = known.lost(each.node, each.incarnation)
    holders = {each: [each, formation.neighbour(each.node)] if each in replicated else [each] for each in members}
    expected = all(any(holder in alive for holder in found) for found in holders.values())
    found = known.usable(alive, None)
    assert (found is not None) == expected
    if found is not None:
        by = found.handed_by(alive)
        assert by is not None
        for made, node in zip(members, by, strict=True):
            assert node == (made.node if made in alive else next(k.node for k in holders[made] if k and k in alive))
