"""The whole protocol under faults: what must hold whatever happens is checked by `cluster` all the time.

`make test` runs a fixed sample. With HPCFT_SEARCH=100 a hundred times as many are searched at random.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase as Search
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.events import Outcome
from hpcft.world import Phase
from tests.search import sampled
from tests.simulation.cluster import Cluster, Shape, Violation
from tests.simulation.faults import Fault, Kind, faults, shapes, simulate
from tests.simulation.mutants import MUTANTS


@sampled(250)
@given(shapes(), faults())
def test_no_fault_breaks_a_run(shape: Shape, schedule: list[Fault]) -> None:
    simulate(shape, schedule)


@sampled(150)
@given(shapes(succession=True), faults(succession=True))
def test_no_fault_breaks_a_succession(shape: Shape, schedule: list[Fault]) -> None:
    """Leaders that follow each other within one allocation, as a later version will have them."""
    simulate(shape, schedule)


RARE = {
    # a node is cut off just as the others are requeued, and these are very quick
    "no waiting for an earlier leader's leases": (
        Shape(3, 2, seed=0, repeats=0.0, slowness=0.02, slurm_seconds=0.3),
        [
            Fault(12.0, Kind.ISOLATE, 1, 0, 15.0),
            Fault(12.0, Kind.KILL_WORKER, 0, 1, 0.1),
            Fault(12.1, Kind.TIME_LIMIT, 0, 0, 0.1),
        ],
    ),
    # a node is lost, and without it another one does not fit into the world any more
    "no acknowledgement of nodes left out": (
        Shape(4, 1, seed=0, multiple_of=3),
        [Fault(12.0, Kind.KILL_PROCESSES, 3, 0, 0.1)],
    ),
}
"""What is seldom met by chance: where to look for it."""


def search(mutant: str, cases: st.SearchStrategy[tuple[Shape, list[Fault]]]) -> str:
    """What the properties above say of the protocol without one of its safeguards; empty if they see nothing."""

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=[Search.generate])
    @given(cases)
    def look(case: tuple[Shape, list[Fault]]) -> None:
        with MUTANTS[mutant]() as core:
            simulate(*case, core)

    try:
        look()
    except Violation as violation:
        return str(violation).partition("\n")[0]
    return ""


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_without_a_safeguard_the_search_finds_a_violation(mutant: str) -> None:
    if mutant not in RARE:
        assert search(mutant, st.tuples(shapes(), faults()))
        return
    shape, schedule = RARE[mutant]
    found = search(
        mutant, st.tuples(st.integers(0, 500).map(lambda seed: replace(shape, seed=seed)), st.just(schedule))
    )
    assert "two worlds train at once" in found


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_undisturbed(nodes: int) -> None:
    cluster = Cluster(Shape(nodes, nodes, seed=1, total_steps=100))
    cluster.clock.run_until(200.0, lambda: cluster.verdict is not None)
    assert cluster.verdict is not None
    assert (cluster.verdict.outcome, cluster.verdict.exit_code) == (Outcome.FINISHED, 0)
    assert cluster.steps == 100
    assert [leader.world.generation for leader in cluster.leaders.values()] == [1]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("node", [0, 1])
def test_one_fault(kind: Kind, node: int) -> None:
    cluster = simulate(Shape(3, 2, seed=3), [Fault(12.0, kind, node, (node + 1) % 3, 9.0)])
    assert cluster.verdict is None or (kind, cluster.verdict.outcome) == (Kind.CANCEL, Outcome.CANCELLED)
    assert max(leader.world.step for leader in cluster.leaders.values()) > 0


def test_many_simulated_seconds_in_a_real_one() -> None:
    """So that a search sees recoveries by the thousand."""
    cluster = Cluster(Shape(4, 2, seed=2))
    cluster.clock.run_until(300.0)
    (leader,) = cluster.leaders.values()
    assert leader.world.phase is Phase.RUNNING
    assert cluster.steps > 500
