"""The whole protocol under faults: what must hold whatever happens is checked by `cluster` all the time.

`make test` runs a fixed sample. With HPCFT_SEARCH=100 a hundred times as many are searched at random.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import Phase as Search
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft import cadence
from hpcft.cadence import SaveRules
from hpcft.events import FailureKind, Outcome, Termination
from hpcft.units import EverySeconds
from hpcft.world import Phase, World
from tests.search import sampled
from tests.simulation.cluster import Cluster, Shape, Violation
from tests.simulation.faults import SELF_TUNED, Fault, Kind, faults, shapes, simulate
from tests.simulation.machine import Crew
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
    # a node hears from nobody, and trains on until its lease is over
    "silence for two is taken for death": (Shape(3, 2, seed=0), [Fault(12.0, Kind.ISOLATE, 2, 0, 15.0)]),
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
    assert "two worlds train at once" in found or "while it is evicted" in found


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


# --- the last checkpoint of a start


def leave(shape: Shape, at: float, breaks: list[tuple[float, int]]) -> None:
    """A time limit in a world that trains undisturbed, but for streams that break; raises `Violation`."""
    cluster = Cluster(shape)
    clock = cluster.clock
    clock.run_until(at)
    (leader,) = cluster.leaders.values()
    step = leader.world.step
    assert leader.world.phase is Phase.RUNNING and step > 0
    cluster.narrate("the time limit is near")
    cluster.slurm.signal(Termination.TIME_LIMIT)
    for after, node in breaks:
        machine = cluster.machines[list(cluster.machines)[node % shape.nodes]]
        clock.after(after, lambda machine=machine: cluster.network.break_connections(machine))  # type: ignore[misc]
    clock.run_until(clock.now + 60.0, lambda: cluster.verdict is not None or cluster.slurm.ending)
    fenced = any(each.failure.kind is FailureKind.FENCED for each in leader.world.failures)
    if fenced or any("its lease is over" in line for line in cluster.story):
        return  # a node was so long without a confirmation
    restore = leader.world.restore
    if restore is None or restore.step < step or restore.generation != leader.world.generation:
        cluster.violate(f"no last checkpoint was made after step {step}: there is {restore}")
    if len({machine.crew.step for machine in cluster.machines.values() if machine.crew is not None}) > 1:
        cluster.violate("somebody has trained on after the last checkpoint")


LEAVES = st.tuples(
    st.builds(
        Shape,
        nodes=st.integers(2, 5),
        minimum=st.just(1),
        seed=st.integers(0, 2**32),
        slowness=st.sampled_from([0.02, 0.3, 0.9]),
        repeats=st.sampled_from([0.0, 0.3]),
        disk_seconds=st.sampled_from([0.02, 0.5]),
        saving=st.sampled_from([SaveRules(), SaveRules(EverySeconds(3.0)), SELF_TUNED]),
    ),
    st.integers(150, 250).map(lambda tenths: tenths / 10),
    st.lists(st.tuples(st.integers(0, 40).map(lambda tenths: tenths / 10), st.integers(1, 4)), max_size=3),
)


@sampled(200)
@given(LEAVES)
def test_the_last_checkpoint_is_made_however_late_its_order_reaches_a_node(
    case: tuple[Shape, float, list[tuple[float, int]]],
) -> None:
    leave(*case)


def told_once(
    self: cadence.Saving, world: World, pace: Any, now: float, every: Any, settled: Any
) -> tuple[cadence.Saving, cadence.Order | None]:
    """Repeats an order only for a rank that has missed it."""
    saving, told = NEXT(self, world, pace, now, every, settled)
    return saving, None if told == self.order else told


NEXT = cadence.Saving.next
WITHOUT = {
    "orders are not told again": patch.object(cadence.Saving, "next", told_once),
    "nobody looks for ranks that have missed it": patch.object(cadence, "missed", lambda *a, **k: False),
    "nobody waits for the others": patch.object(Crew, "waits", False),
}


@pytest.mark.parametrize("mutant", sorted(WITHOUT))
def test_without_it_the_last_checkpoint_is_missed(mutant: str) -> None:
    @settings(max_examples=300, deadline=None, database=None, derandomize=True, phases=[Search.generate])
    @given(LEAVES)
    def look(case: tuple[Shape, float, list[tuple[float, int]]]) -> None:
        leave(*case)

    with WITHOUT[mutant], pytest.raises(Violation):
        look()
