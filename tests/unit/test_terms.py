"""Terms in a real directory, claimed by real processes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from hpcft import terms
from hpcft.ids import Incarnation, NodeId, Term
from hpcft.terms import Deposed, TermLease, TermRecord, TermWatch


def record(term: int, node: str = "node1") -> TermRecord:
    return TermRecord(Term(term), NodeId(node), Incarnation(f"{node}-x"), "10.0.0.1", 4711, "17.0")


def _race(directory: Path, name: str, rounds: int, start: object, won: object) -> None:
    for term in range(1, rounds + 1):
        start.wait()  # type: ignore[attr-defined]
        if terms.claim(directory, record(term, name)):
            won.put((term, name))  # type: ignore[attr-defined]


def test_of_many_claimants_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    claimants, rounds = 4, 25
    start, won = context.Barrier(claimants), context.Queue()
    processes = [
        context.Process(target=_race, args=(tmp_path, f"node{number}", rounds, start, won))
        for number in range(claimants)
    ]
    for process in processes:
        process.start()
    winners = dict(won.get(timeout=60) for _ in range(rounds))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert won.empty()
    assert sorted(winners) == list(range(1, rounds + 1))
    for term, name in winners.items():
        assert (tmp_path / f"{term:06}").exists()
        assert name.encode() in (tmp_path / f"{term:06}").read_bytes()
    newest = terms.newest(tmp_path)
    assert newest is not None
    assert newest == record(rounds, winners[rounds])


def test_nobody_leads_an_empty_directory(tmp_path: Path) -> None:
    assert terms.newest(tmp_path) is None
    sight = TermWatch(tmp_path).look()
    assert (sight.holder, sight.lease, sight.next_term) == (None, TermLease(), 1)


def test_a_claim_is_never_taken_back(tmp_path: Path) -> None:
    assert terms.claim(tmp_path, record(1))
    assert not terms.claim(tmp_path, record(1, "node2"))
    assert terms.newest(tmp_path) == record(1)


def test_leases_and_leftovers_are_no_terms(tmp_path: Path) -> None:
    terms.claim(tmp_path, record(1))
    terms.renew(tmp_path, Term(1), TermLease(5))
    (tmp_path / ".000009.1234.aside").write_bytes(b"torn")
    assert terms.newest(tmp_path) == record(1)
    assert terms.lease(tmp_path, Term(1)) == TermLease(5)
    assert terms.lease(tmp_path, Term(2)) == TermLease()


def test_a_deposed_holder_learns_it_when_it_renews(tmp_path: Path) -> None:
    terms.claim(tmp_path, record(1))
    terms.renew(tmp_path, Term(1), TermLease(1))
    terms.claim(tmp_path, record(2, "node2"))
    with pytest.raises(Deposed, match="node2 has claimed term 2"):
        terms.renew(tmp_path, Term(1), TermLease(2))
    terms.renew(tmp_path, Term(2), TermLease(1))


def test_a_record_that_stands_still_is_timed_on_the_watchers_own_clock(tmp_path: Path) -> None:
    terms.claim(tmp_path, record(1))
    watch = TermWatch(tmp_path)
    assert watch.look().unchanged_for == 0.0
    began = time.monotonic()
    while (sight := watch.look()).unchanged_for < 0.2:
        assert time.monotonic() - began < 30
    assert sight.unchanged_for <= time.monotonic() - began + 0.05
    terms.renew(tmp_path, Term(1), TermLease(1))
    assert watch.look().unchanged_for == 0.0
    terms.claim(tmp_path, record(2, "node2"))
    changed = watch.look()
    assert (changed.holder, changed.unchanged_for, changed.next_term) == (record(2, "node2"), 0.0, 3)


def test_an_answer_that_was_long_on_its_way_proves_no_standstill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms.claim(tmp_path, record(1))
    watch = TermWatch(tmp_path)
    watch.look()
    at_once = terms.lease

    def late(directory: Path, term: Term) -> TermLease:
        found = at_once(directory, term)
        time.sleep(0.5)  # the file server answered, and then the network hung
        return found

    monkeypatch.setattr(terms, "lease", late)
    assert watch.look().unchanged_for < 0.4


def test_a_released_term_is_seen(tmp_path: Path) -> None:
    terms.claim(tmp_path, record(1))
    terms.renew(tmp_path, Term(1), TermLease(9, released=True))
    assert TermWatch(tmp_path).look().lease.released
