"""A cluster put together: Slurm, faults, and the invariants."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from random import Random

from hpcft.cadence import SaveRules
from hpcft.events import (
    CheckpointsFound,
    FailureKind,
    Formation,
    KeeperVanished,
    NodeHeard,
    Outcome,
    Termination,
    Verdict,
    WorkersVanished,
)
from hpcft.ids import Generation, Incarnation, NodeId, Step, Term
from hpcft.membership import Membership, Timing
from hpcft.policy import Rules
from hpcft.terms import TermRecord
from hpcft.world import Budget, World
from tests.simulation.agent import SimulatedAgent
from tests.simulation.clock import Clock
from tests.simulation.leader import LEAVE_SECONDS, SimulatedLeader
from tests.simulation.machine import Crew, Disk, Machine, Shard
from tests.simulation.network import Network

STEP_SECONDS = 0.5
SAVE_EVERY = 8
MORTAL_DECISIONS = 400
PRESENCE = frozenset(
    {"phase", "phase_since", "nodes", "formation", "acknowledged", "lease_renewed", "ready", "progress", "reports"}
    | {"failures", "returned", "stopped", "lost_members", "broken_at", "refused", "losses"}
    | {"requeue_asked", "requeue_accepted", "requeue_refused"}
)
"""What a new leader forgets; everything else in a `World` is history."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a simulated cluster is made of."""

    nodes: int
    minimum: int
    seed: int
    slowness: float = 0.05
    """Messages take up to this many seconds."""
    repeats: float = 0.05
    """Share of orders that arrive twice."""
    disk_seconds: float = 0.02
    """An access to the run directory takes up to this long."""
    slurm_seconds: float = 3.0
    """How long Slurm takes for each step of a requeue, at most."""
    multiple_of: int = 1
    """The world size divides by this; nodes that do not fit are spares."""
    saving: SaveRules = SaveRules()
    """When the leader orders a save, besides those that the ranks make by themselves."""
    succession: bool = False
    """A leader's loss is followed by another leader in the same allocation, instead of a requeue."""
    total_steps: int = 10_000


@dataclass(frozen=True, slots=True)
class Core:
    """The parts of the core that mutants replace."""

    membership: type[Membership] = Membership
    machine: type[Machine] = Machine


class Slurm:
    """Gives nodes to one start of the job after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.start = -1
        self.nodes: tuple[NodeId, ...] = ()
        self.ending = False
        self.over = False
        self.to_end: Termination | None = None
        """Why this start was signalled; what follows has to come from the run."""
        self.stale: set[NodeId] = set()
        """Nodes on which processes of an earlier start may live: nobody could reach them."""

    def begin(self) -> None:
        cluster = self.cluster
        usable = tuple(
            machine.name
            for machine in cluster.machines.values()
            if machine.powered and not machine.frozen and machine.name not in cluster.network.isolated | self.stale
        )
        if len(usable) < cluster.rules.minimum_nodes:
            cluster.clock.after(1.0, self.begin)
            return
        if self.over:
            return
        self.start += 1
        self.ending = False
        self.to_end = None
        self.nodes = usable
        cluster.narrate(f"Slurm starts the job for the {self.start + 1}. time on {', '.join(usable)}")
        for index, name in enumerate(usable):
            machine = cluster.machines[name]
            machine.keeper = True
            machine.signals.clear()
            cluster.clock.after(self._delay(), lambda m=machine, i=index: self._launch(m, i))  # type: ignore[misc]

        cluster.clock.after(5.0, lambda: self._look(self.start))

    def signal(self, why: Termination) -> None:
        """SIGTERM for every agent there is. A cancelled job is over some time later, whatever it does."""
        if self.ending or self.over:
            return
        cluster, start = self.cluster, self.start
        self.to_end = why
        for name in self.nodes:
            machine = cluster.machines[name]
            agent = machine.agent
            if not machine.powered or name in cluster.network.isolated:
                continue
            if agent is not None and agent.alive:
                agent.deliver(lambda agent=agent: agent.signalled(why))  # type: ignore[misc]
            elif machine.keeper:
                machine.signals.setdefault(why, machine.now())  # which holds it for the next agent
        if why is Termination.CANCELLED:
            cluster.clock.after(2 * LEAVE_SECONDS, lambda: self._killed(start))

    def _killed(self, start: int) -> None:
        if start == self.start and not self.over:
            self.over = True
            for name in self.nodes:
                self.cluster.end_job(self.cluster.machines[name])

    def _look(self, start: int) -> None:
        """A job whose step has ended everywhere without a verdict goes back to the queue, as after a node failure."""
        if start != self.start or self.ending or self.over:
            return
        if any(self.cluster.machines[name].keeper for name in self.nodes):
            self.cluster.clock.after(2.0, lambda: self._look(start))
        else:
            self.ending = True
            self._end_start()

    def _launch(self, machine: Machine, index: int) -> None:
        if machine.powered and machine.keeper and machine.agent is None:
            self.cluster.start_agent(machine, self.start, index)

    def _delay(self) -> float:
        return self.cluster.random.uniform(0.01, self.cluster.shape.slurm_seconds)

    def requeue(self, agent: SimulatedAgent, answer: Callable[[bool], None]) -> None:
        start = agent.start

        def control() -> None:
            accepted = start == self.start and not self.over
            if accepted and not self.ending:
                self.ending = True
                self.cluster.clock.after(self._delay(), self._end_start)
            agent.deliver(lambda: answer(accepted))

        self.cluster.clock.after(self._delay(), control)

    def _end_start(self) -> None:
        """SIGKILL everywhere it can be delivered, and on the leader's node in any case."""
        cluster = self.cluster
        leading = {leader.record.node for leader in cluster.leaders.values() if not leader.gone and leader.agent.alive}
        for name in self.nodes:
            machine = cluster.machines[name]
            if not machine.powered:
                continue
            if (name in cluster.network.isolated or machine.frozen) and name not in leading:
                self.stale.add(name)
                self._catch_up(machine, machine.boots)
            else:
                cluster.end_job(machine)
        cluster.clock.after(self._delay(), self.begin)

    def _catch_up(self, machine: Machine, boot: int) -> None:
        """slurmd ends what is left of an earlier start as soon as it hears of it."""
        if machine.boots != boot or not machine.powered:
            self.stale.discard(machine.name)
        elif machine.name in self.cluster.network.isolated or machine.frozen:
            self.cluster.clock.after(0.5, lambda: self._catch_up(machine, boot))
        else:
            self.cluster.clock.after(self.cluster.random.uniform(0.0, 2.0), lambda: self._cleared(machine))

    def _cleared(self, machine: Machine) -> None:
        self.cluster.end_job(machine)
        self.stale.discard(machine.name)


class Cluster:
    def __init__(self, shape: Shape, core: Core | None = None) -> None:
        core = core or Core()
        self.shape = shape
        self.membership = core.membership
        self.clock = Clock()
        self.random = Random(shape.seed)
        self.repeats = shape.repeats
        self.succession = shape.succession
        self.network = Network(self.clock, self.random, shape.slowness)
        self.disk = Disk()
        self.rules = Rules(
            timing=Timing(0.5, 2.0, 5.0),
            minimum_nodes=shape.minimum,
            multiple_of=shape.multiple_of,
            join_timeout=8.0,
            rejoin_timeout=10.0,
            budgets=((Budget.INFRASTRUCTURE, 60), (Budget.USER_CODE, 20), (Budget.PREEMPTION, 50)),
            no_progress_generations=0,
            saving=shape.saving,
        )
        self.machines: dict[NodeId, Machine] = {}
        for number in range(shape.nodes):
            name = NodeId(f"node{number + 1}")
            rate = self.random.uniform(0.995, 1.005)
            machine = core.machine(name, self.clock, self.random, 1 + number % 2, rate, self.random.uniform(0, 1000))
            machine.on_crew_lost = self._crew_lost
            self.machines[name] = machine
        self.network.machines = self.machines
        self.leaders: dict[Term, SimulatedLeader] = {}
        self.slurm = Slurm(self)
        self.verdict: Verdict | None = None
        self.story: list[str] = []
        self.steps = 0
        self._incarnations = itertools.count(1)
        self._groups: dict[tuple[Term, Generation], set[NodeId]] = {}
        """Worlds whose workers were started, and on which nodes."""
        self._crews: dict[NodeId, Generation] = {}
        self.slurm.begin()

    # --- the story, for a failing example ---

    def narrate(self, line: str) -> None:
        self.story.append(f"{self.clock.now:9.3f} {line}")

    def violate(self, what: str) -> None:
        raise Violation(f"at {self.clock.now:.3f}: {what}\n" + "\n".join(self.story[-60:]))

    def next_incarnation(self) -> int:
        return next(self._incarnations)

    # --- processes ---

    def start_agent(self, machine: Machine, start: int, index: int) -> None:
        machine.agent = SimulatedAgent(self, machine, start, index)
        self.narrate(f"{machine.agent.incarnation} starts")
        machine.agent.live()

    def end_agent(self, agent: SimulatedAgent, reason: str) -> None:
        """The agent's process is gone; the pool ends the workers, the keeper starts another."""
        machine = agent.machine
        if not agent.alive:
            return
        self.narrate(f"{agent.incarnation} ends: {reason}")
        self._die(agent)
        boot = machine.boots
        kill = self.random.uniform(0.0, 0.15)

        def pool_kills() -> None:
            if machine.boots != boot or not machine.powered:
                return
            if machine.frozen:
                self.clock.after(0.1, pool_kills)
                return
            machine.kill_crew()
            self._lines_close(agent, keeper=not machine.keeper)
            if machine.keeper:
                self.clock.after(self.random.uniform(0.1, 1.0), restart)

        def restart() -> None:
            if machine.boots == boot and machine.powered and machine.keeper and machine.agent is agent:
                self.start_agent(machine, agent.start, agent.index)

        self.clock.after(kill, pool_kills)

    def _die(self, agent: SimulatedAgent, *, tells: bool = True) -> None:
        agent.alive = False
        if agent.leader is not None:
            agent.leader.gone = True
        for connection in list(self.network.connections):
            connection.died(agent, tells=tells)

    def end_job(self, machine: Machine) -> None:
        """Every process of the job on this node is killed."""
        machine.keeper = False
        agent = machine.agent
        machine.kill_crew()
        if agent is not None:
            if agent.alive:
                self.narrate(f"{agent.incarnation} is killed with all of its node's processes")
                self._die(agent)
                self._lines_close(agent, keeper=True)
            machine.agent = None

    def lifeline(self, agent: SimulatedAgent, leader: SimulatedLeader) -> None:
        pass  # its end is told by _lines_close

    def _lines_close(self, agent: SimulatedAgent, *, keeper: bool) -> None:
        machine, boot = agent.machine, agent.machine.boots
        for link in agent.links.values():
            self._line_end(machine, boot, link.leader, agent, keeper)

    def _line_end(
        self, machine: Machine, boot: int, leader: SimulatedLeader, agent: SimulatedAgent, keeper: bool
    ) -> None:
        """The FIN of a lifeline: retransmitted over cuts, lost with the power."""
        if machine.boots != boot or not machine.powered or leader.gone or not leader.agent.machine.powered:
            return
        if not self.network.reachable(machine.name, leader.record.node):
            self.clock.after(1.0, lambda: self._line_end(machine, boot, leader, agent, keeper))
            return

        def tell() -> None:
            leader.feed(WorkersVanished(machine.name, agent.incarnation))
            if keeper:
                leader.feed(KeeperVanished(machine.name, agent.incarnation))

        self.clock.after(self.network.delay(), lambda: leader.agent.deliver(tell))

    def reaches(self, agent: SimulatedAgent, record: TermRecord) -> bool:
        holder = self.machines[record.node]
        return holder.powered and self.network.reachable(agent.machine.name, record.node)

    def heartbeat(self, agent: SimulatedAgent, leader: SimulatedLeader, beat: NodeHeard) -> None:
        """Through the store: the leader reads the newest one a little later."""
        name = agent.machine.name

        def read() -> None:
            if self.network.reachable(name, leader.record.node) and leader.agent.machine.powered:
                leader.agent.deliver(lambda: leader.heard(beat))
            elif self.random.random() < 0.2:
                self.clock.after(self.random.uniform(0.5, 6.0), read)

        self.clock.after(self.network.delay() + self.random.uniform(0.0, 0.2), read)

    def lead(self, agent: SimulatedAgent, record: TermRecord) -> SimulatedLeader:
        if record.term in self.leaders:
            self.violate(f"term {record.term} has two leaders")
        self.narrate(f"{agent.incarnation} leads term {record.term}")
        head = max(self.disk.journals, key=lambda each: each.term, default=None)
        leader = SimulatedLeader(self, agent, record, head)
        self.leaders[record.term] = leader
        before = leader.world
        known = [each for each in before.checkpoints if each in self.disk.checkpoints]
        unwritten = sorted(
            (each for each in self.disk.checkpoints if each.generation == before.generation and each not in known),
            key=lambda each: each.step,
        )
        lineage = [*known, *(each for each in unwritten if not known or each.step > known[-1].step)]
        leader.lead(CheckpointsFound(tuple(lineage)), self.slurm.nodes)
        return leader

    # --- workers ---

    def started(self, machine: Machine, crew: Crew) -> None:
        generation = crew.formation.generation
        if generation <= self._crews.get(machine.name, Generation(0)):
            self.violate(f"{machine.name} starts generation {generation} after {self._crews[machine.name]}")
        self._crews[machine.name] = generation
        self.narrate(f"{machine.name} starts the workers of generation {generation}, term {crew.formation.term}")
        self.look()
        if crew.world not in self._groups:
            self._groups[crew.world] = {machine.name}
            self._step(crew.formation)
        self._groups[crew.world].add(machine.name)

    def look(self) -> None:
        """No two worlds train at once. Called whenever a node may have begun to."""
        worlds = {world: machine.name for machine in self.machines.values() if (world := machine.trains()) is not None}
        if len(worlds) > 1:
            listed = ", ".join(
                f"{machine.name} trains {world}" for machine in self.machines.values() if (world := machine.trains())
            )
            self.violate(f"two worlds train at once (term, generation): {listed}")

    def _step(self, formation: Formation) -> None:
        world = (formation.term, formation.generation)
        machines = [self.machines[member.node] for member in formation.members]
        crews = [machine.crew for machine in machines]
        mine = [crew for crew in crews if crew is not None and crew.world == world]
        if not mine and self._begun(formation):
            return
        self.clock.after(STEP_SECONDS * self.random.uniform(0.9, 1.1), lambda: self._step(formation))
        complete = len(mine) == len(machines) and all(
            crew.ready and len(crew.ranks) == machine.workers and machine.trains() == world
            for crew, machine in zip(mine, machines, strict=True)
        )
        complete = complete and not any(crew.holding for crew in mine)  # the others wait in their next step
        joined = all(self.network.reachable(machines[0].name, other.name) for other in machines)
        if complete and joined:
            for machine, member in zip(machines, mine, strict=True):
                self._advance(machine, member)
            self.steps += 1
            return
        for machine, crew in zip(machines, crews, strict=True):
            if crew is None or crew.world != world or not crew.ready or not crew.ranks or machine.trains() != world:
                continue
            broken = (
                any(
                    other is not machine
                    and other.name in self._groups[world]
                    and other.powered
                    and self.network.reachable(machine.name, other.name)
                    and (peer is None or peer.world != world or len(peer.ranks) < other.workers)
                    and not (peer is not None and peer.ended and not peer.muted)
                    for other, peer in zip(machines, crews, strict=True)
                )
                or len(crew.ranks) < machine.workers
            )
            if broken and machine.agent is not None:
                machine.agent.worker_failed(crew, FailureKind.COLLECTIVE, "connection closed by peer")

    def _begun(self, formation: Formation) -> bool:
        """Whether every member's node has gone beyond this formation, or cannot start it any more."""
        return all(
            self._crews.get(member.node, Generation(0)) >= formation.generation
            or (agent := self.machines[member.node].agent) is None
            or agent.incarnation != member.incarnation
            or agent.membership.promised > formation.generation
            for member in formation.members
        )

    def _advance(self, machine: Machine, crew: Crew) -> None:
        agent = machine.agent
        if agent is None or not agent.alive:
            return
        crew.step = step = Step(crew.step + 1)
        agent.progressed(crew)
        crew.see_order()
        final = step >= self.shape.total_steps
        ordered = crew.order is not None and crew.order.step == step
        if final or ordered or step % SAVE_EVERY == 0:
            crew.saving = True
            agent.timer(self.random.uniform(0.02, 0.2), lambda: self._save(machine, crew, agent, step))
        if final:
            agent.timer(0.3, lambda: agent.left(crew, returned=True))
        elif ordered and crew.order is not None and crew.order.stop:
            crew.holding = True
            if not crew.waits:
                agent.timer(0.3, lambda: agent.left(crew, returned=False))

    def _save(self, machine: Machine, crew: Crew, agent: SimulatedAgent, step: Step) -> None:
        crew.saving = False
        failed = "" if machine.disk_reachable else "the run directory does not answer"
        agent.saved(crew, Shard(machine.name, crew.formation.generation, step, failed))

    def _crew_lost(self, machine: Machine, crew: Crew) -> None:
        """The pool reports exits to the agent, if it still runs."""
        agent = machine.agent
        if agent is None or crew.muted:
            return
        crew.ranks.add(crew.formation.member(machine.name).first_rank)  # type: ignore[union-attr]
        agent.deliver(lambda: agent.worker_failed(crew, FailureKind.FENCED, "its node's lease ran out"))

    # --- what the leaders do ---

    def proposed(self, leader: SimulatedLeader, formation: Formation) -> None:
        ranks = [rank for member in formation.members for rank in member.ranks()]
        if ranks != list(range(formation.world_size)) or not ranks:
            self.violate(f"ranks of generation {formation.generation} are {ranks}")
        if formation.generation <= leader.proposed:
            self.violate(f"term {leader.record.term} proposes {formation.generation} after {leader.proposed}")
        leader.proposed = formation.generation

    def evicted(self, leader: SimulatedLeader, node: NodeId, incarnation: Incarnation) -> None:
        machine = self.machines[node]
        crew = machine.crew
        if machine.trains() is None or crew is None:
            return
        member = crew.formation.member(node)
        if member is not None and member.incarnation == incarnation:
            self.violate(f"{incarnation} trains generation {crew.formation.generation} while it is evicted")

    def concluded(self, leader: SimulatedLeader, verdict: Verdict) -> None:
        self.narrate(f"verdict of {leader.record.node}: {verdict.outcome.value}, {verdict.reason}")
        if verdict.outcome is not Outcome.REQUEUED and leader.agent.start == self.slurm.start:
            self.verdict = verdict
            self.slurm.over = True

    def check_history(self) -> None:
        """What a successor would read is what the leader knew."""
        for leader in self.leaders.values():
            world = leader.replayed()
            for each in fields(World):
                if each.name not in PRESENCE and getattr(world, each.name) != getattr(leader.world, each.name):
                    self.violate(
                        f"term {leader.record.term}: replayed {each.name} is {getattr(world, each.name)!r}, "
                        f"it was {getattr(leader.world, each.name)!r}"
                    )
            if leader.decisions > MORTAL_DECISIONS:
                self.violate(f"term {leader.record.term} took {leader.decisions} decisions")
            for incident in leader.world.incidents:
                if not incident.open and not incident.decision:
                    self.violate(f"incident {incident.number} ({incident.culprit}) has passed without a decision")
