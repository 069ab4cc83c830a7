"""What can go wrong, drawn by hypothesis; and one simulated life of a run under it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum

from hypothesis import strategies as st

from hpcft.cadence import SaveRules
from hpcft.events import FailureKind, Termination
from hpcft.ids import NodeId
from hpcft.units import Auto, EverySeconds
from tests.simulation.cluster import Cluster, Core, Shape
from tests.simulation.machine import Machine

HEALED_WITHIN = 240.0
"""After the last fault the run trains again, or has a verdict, within this many seconds."""


class Kind(StrEnum):
    CRASH_AGENT = "crash agent"
    KILL_WORKER = "kill worker"
    FAIL_WORKER = "exception in worker"
    KILL_PROCESSES = "kill all processes"
    POWER_OFF = "power off"
    ISOLATE = "isolate"
    CUT_LINK = "cut link"
    HANG_DISK = "hang disk"
    STOP_AGENT = "stop agent"
    FREEZE = "freeze"
    TIME_LIMIT = "time limit"
    PREEMPT = "preempt"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    kind: Kind
    node: int
    other: int
    seconds: float


def _tenths(low: float, high: float) -> st.SearchStrategy[float]:
    return st.integers(round(low * 10), round(high * 10)).map(lambda tenths: tenths / 10)


def faults(*, succession: bool = False) -> st.SearchStrategy[list[Fault]]:
    """A few faults close together, so that they meet each other's recoveries."""
    kinds = [kind for kind in Kind if not (succession and kind is Kind.HANG_DISK)]
    fault = st.builds(
        Fault,
        at=st.one_of(_tenths(0.0, 1.5), _tenths(1.5, 9.0)),
        kind=st.sampled_from(kinds),
        node=st.integers(0, 4),
        other=st.integers(0, 4),
        seconds=st.one_of(_tenths(0.1, 4.0), _tenths(4.0, 15.0)),
    )

    def accumulate(gaps: list[Fault]) -> list[Fault]:
        starts = itertools.accumulate((fault.at for fault in gaps), initial=2.0)
        return [replace(fault, at=round(start + fault.at, 1)) for start, fault in zip(starts, gaps, strict=False)]

    return st.lists(fault, min_size=1, max_size=8).map(accumulate)


SELF_TUNED = SaveRules(Auto(), mtbf=60.0, shortest=2.0, longest=8.0)


def shapes(*, succession: bool = False) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        nodes=st.integers(2, 5),
        minimum=st.integers(1, 2),
        seed=st.integers(0, 2**32),
        slowness=st.sampled_from([0.02, 0.3, 1.0]),
        repeats=st.sampled_from([0.0, 0.3]),
        disk_seconds=st.sampled_from([0.02, 0.5]),
        slurm_seconds=st.sampled_from([0.3, 3.0]),
        multiple_of=st.sampled_from([1, 1, 2, 3]),
        saving=st.sampled_from([SaveRules(), SaveRules(EverySeconds(3.0)), SELF_TUNED]),
        succession=st.just(succession),
    )


def simulate(shape: Shape, schedule: list[Fault], core: Core | None = None) -> Cluster:
    """From the first start to the first step after the last fault; raises `Violation`."""
    cluster = Cluster(shape, core)
    clock = cluster.clock
    for fault in schedule:
        clock.after(fault.at, lambda fault=fault: _strike(cluster, fault))  # type: ignore[misc]
    clock.run_until(max(fault.at + fault.seconds for fault in schedule) + 1.0)
    cluster.narrate("all is healed")
    _heal(cluster)
    steps = cluster.steps

    def well() -> bool:
        trains = cluster.steps > steps + 2 and not cluster.slurm.to_end
        return cluster.verdict is not None or cluster.slurm.over or trains

    clock.run_until(clock.now + HEALED_WITHIN, well)
    if not well():
        what = "neither trains nor has a verdict" if not cluster.slurm.to_end else "goes on, though it was to end"
        cluster.violate(f"{HEALED_WITHIN:.0f} s after the last fault the run {what}")
    clock.run_until(clock.now + 5.0)
    cluster.check_history()
    return cluster


def _strike(cluster: Cluster, fault: Fault) -> None:
    machines = list(cluster.machines.values())
    machine = machines[fault.node % len(machines)]
    other = machines[fault.other % len(machines)]
    clock, network = cluster.clock, cluster.network
    agent = machine.agent
    cluster.narrate(f"FAULT {fault.kind} {machine.name} ({other.name}) for {fault.seconds} s")
    match fault.kind:
        case Kind.CRASH_AGENT:
            if agent is not None and machine.powered and not machine.frozen:
                cluster.end_agent(agent, "killed")
        case Kind.KILL_WORKER | Kind.FAIL_WORKER:
            crew = machine.crew
            if crew is not None and crew.ranks and agent is not None and agent.alive and machine.powered:
                kind = FailureKind.KILLED if fault.kind is Kind.KILL_WORKER else FailureKind.EXCEPTION
                agent.worker_failed(crew, kind, f"{fault.kind} at {fault.at}")
        case Kind.KILL_PROCESSES:
            if machine.powered:
                cluster.end_job(machine)
        case Kind.POWER_OFF:
            power_off(cluster, machine)
            clock.after(fault.seconds, lambda: boot(cluster, machine))
        case Kind.ISOLATE:
            network.isolated.add(machine.name)
            network.changed()
            clock.after(fault.seconds, lambda: _join(cluster, machine))
        case Kind.CUT_LINK:
            link = frozenset((machine.name, other.name))
            network.cut_links.add(link)
            network.changed()
            clock.after(fault.seconds, lambda: _reconnect(cluster, link))
        case Kind.HANG_DISK:
            machine.disk_reachable = False
            clock.after(fault.seconds, lambda: _disk_back(machine))
        case Kind.STOP_AGENT:
            if agent is not None and agent.alive:
                agent.stopped = True
                clock.after(fault.seconds, lambda: _go_on(cluster, machine))
        case Kind.FREEZE:
            machine.frozen = True
            clock.after(fault.seconds, lambda: _thaw(cluster, machine))
        case Kind.TIME_LIMIT:
            cluster.slurm.signal(Termination.TIME_LIMIT)
        case Kind.PREEMPT:
            cluster.slurm.signal(Termination.PREEMPTED)
        case Kind.CANCEL:
            cluster.slurm.signal(Termination.CANCELLED)


def power_off(cluster: Cluster, machine: Machine) -> None:
    if not machine.powered:
        return
    machine.powered = False
    machine.boots += 1
    machine.keeper = machine.frozen = False
    machine.crew = None
    machine.disk_waits.clear()
    agent, machine.agent = machine.agent, None
    if agent is not None:
        agent.alive = False
        if agent.leader is not None:
            agent.leader.gone = True
        for connection in list(cluster.network.connections):
            connection.died(agent, tells=False)
    cluster.network.changed()


def boot(cluster: Cluster, machine: Machine) -> None:
    machine.powered = True
    machine.lease_until = None
    cluster.network.changed()


def _join(cluster: Cluster, machine: Machine) -> None:
    cluster.network.isolated.discard(machine.name)
    cluster.network.changed()


def _reconnect(cluster: Cluster, link: frozenset[NodeId]) -> None:
    cluster.network.cut_links.discard(link)
    cluster.network.changed()


def _disk_back(machine: Machine) -> None:
    machine.disk_reachable = True
    waiting, machine.disk_waits = machine.disk_waits, []
    for call in waiting:
        machine.clock.after(machine.random.uniform(0.0, 0.2), call)


def _go_on(cluster: Cluster, machine: Machine) -> None:
    agent = machine.agent
    if agent is not None and agent.stopped:
        agent.stopped = False
        if not machine.frozen:
            agent.resume()


def _thaw(cluster: Cluster, machine: Machine) -> None:
    if not machine.frozen:
        return
    machine.frozen = False
    cluster.look()
    if machine.agent is not None:
        machine.agent.resume()


def _heal(cluster: Cluster) -> None:
    for machine in cluster.machines.values():
        if not machine.powered:
            boot(cluster, machine)
        _thaw(cluster, machine)
        _go_on(cluster, machine)
        _disk_back(machine)
    cluster.network.isolated.clear()
    cluster.network.cut_links.clear()
    cluster.network.changed()
