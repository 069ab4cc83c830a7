"""How an event changes the world.

`apply(world, event, now)` returns the next world and does nothing else: no I/O, no clock, no decision. What a leader
has decided is one of the events, so that the journal, replayed, gives the same world. `now` is the run clock, as in
`world`.

An event of an earlier generation, or of an earlier incarnation of a node, is no news: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, assert_never

from hpcft.events import (
    Action,
    AskPeer,
    CheckpointCommitted,
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointKept,
    CheckpointRef,
    CheckpointsFound,
    CheckpointSkipped,
    CheckpointsRetired,
    CheckpointVerified,
    Commit,
    Conclude,
    CopiesAlone,
    CopiesKept,
    CopiesMeasured,
    Decided,
    Event,
    Evict,
    FailureKind,
    HaltWorkers,
    KeeperVanished,
    LeaseRenewed,
    NodeHeard,
    NodeJoined,
    NodeReported,
    Outcome,
    PeerAnswered,
    PersistCopies,
    Progressed,
    Propose,
    Quarantine,
    Requeue,
    RequeueAccepted,
    RequeueRefused,
    SaveAndStop,
    SnapshotDoubtful,
    SnapshotDropped,
    SnapshotTaken,
    StopAsked,
    StreamClosed,
    TermBegan,
    Termination,
    TerminationAsked,
    Ticked,
    WorkerFailed,
    WorkerReturned,
    WorkersReady,
    WorkerStopped,
    WorkersVanished,
    WorldAcknowledged,
    WorldRefused,
)
from hpcft.ids import Generation, Incarnation, NodeId, Step
from hpcft.world import (
    TRANSITIONS,
    Budget,
    Incident,
    Node,
    Persisting,
    Phase,
    Save,
    Spent,
    Stretch,
    Strike,
    Undone,
    World,
    job_of,
)

UNWRITTEN = 100
"""How many generations a lost leader may have formed, at most, that its journal does not show: the run directory was
not answering. Their numbers are skipped, for files carry them."""


LATEST_SAVES = 15
"""So many saves are remembered with what they took."""


def apply(world: World, event: Event, now: float) -> World:
    """The world after `event`, which the leader saw at `now` (seconds on the run clock)."""
    match event:
        case TermBegan():
            return _begin_term(world, event, now)
        case CheckpointsFound():
            asked = event.checkpoints[-1] if event.branch and event.checkpoints else None
            saved = event.checkpoints[-1] if event.checkpoints else world.saved
            # an empty directory may be one that is not mounted: it counts again when it is there
            left = world.checkpoints if event.branch or not event.checkpoints else None
            found = replace(world, checkpoints=event.checkpoints, asked=asked, saved=saved, turned_from=left)
            return found if left is not None else _turn_back(found, event.checkpoints[-1].step)
        case NodeJoined():
            return _join(world, event, now)
        case NodeHeard():
            # what others said of it while it was silent is of no interest any more
            return _change_node(world, event.node, event.incarnation, heard_at=now, asked=NodeId(""), answer=None)
        case StreamClosed() | WorkersVanished() | KeeperVanished():
            return _lose_touch(world, event, now)
        case PeerAnswered():
            return _change_node(world, event.suspect, event.incarnation, answer=event)
        case WorldAcknowledged():
            return _acknowledge(world, event)
        case WorldRefused():
            return _refuse(world, event)
        case LeaseRenewed():
            return replace(world, lease_renewed=True) if event.term == world.term else world
        case WorkersReady():
            return _ready(world, event, now)
        case Progressed():
            return _progress(world, event, now)
        case NodeReported():
            others = tuple(known for known in world.reports if known.node != event.node)
            return replace(world, reports=(*others, event)) if _current(world, event.generation) else world
        case WorkerFailed():
            return _fail(world, event, now)
        case WorkerReturned():
            if not _current(world, event.generation):
                return world
            return replace(world, returned=world.returned | {event.rank}, returned_at=now)
        case WorkerStopped():
            if not _current(world, event.generation):
                return world
            return replace(world, stopped=world.stopped | {event.rank})
        case CheckpointCommitted():
            return _commit_checkpoint(world, event)
        case CheckpointVerified():
            return _verify_checkpoint(world, event, now)
        case CheckpointsRetired():
            return _without(world, event.checkpoints)
        case CheckpointFailed():
            return _fail_checkpoint(world, event, now)
        case SnapshotTaken():
            if world.formation is None or world.formation.generation != event.generation:
                return world
            return replace(world, holdings=world.holdings.took(event, world.formation))
        case CopiesKept() | CopiesAlone():
            if world.formation is None or world.formation.generation != event.generation:
                return world
            return replace(world, holdings=world.holdings.kept(event, world.formation))
        case CopiesMeasured():
            latest = (*world.copies, *(blocked for _, blocked in event.copies))
            return replace(world, copies=latest[-LATEST_SAVES:])
        case SnapshotDoubtful():
            if not _current(world, event.generation):
                return world
            what = f"the copies of step {event.step}: {event.reason}"
            return _note(world, "copies doubtful", what, "training goes on; look at it before you rely on them", now)
        case SnapshotDropped():
            if world.formation is None or world.formation.generation != event.generation:
                return world
            return replace(world, holdings=world.holdings.dropped(event))
        case CheckpointSkipped():
            if not _current(world, event.generation):
                return world
            return replace(world, skipped=world.skipped + 1, save_skipped=(event.step, event.reason))
        case CheckpointDamaged():
            return _lose_checkpoint(world, event, now)
        case CheckpointKept():
            return _keep_checkpoint(world, event, now)
        case TerminationAsked():
            return _ask_termination(world, event, now)
        case StopAsked():
            return replace(world, stop_asked=event.by, stop_asked_at=world.stop_asked_at or now)
        case RequeueAccepted():
            return replace(world, requeue_accepted=True)
        case RequeueRefused():
            return replace(world, requeue_refused=event.reason)
        case Ticked():
            return world
        case Decided():
            return _carry_out(world, event, now)
        case _:
            assert_never(event)


def _current(world: World, generation: Generation) -> bool:
    return world.formation is not None and world.formation.generation == generation


def _begin_term(world: World, event: TermBegan, now: float) -> World:
    before = world.generation, world.step
    world = _give_up_generation(replace(world, checkpoints=world.standing))
    # a leader was there until then; what came after was no training
    world = _close_generation(world, world.restore.step if world.restore else Step(0), now - event.leaderless)
    # an operator who submits it again has mended something, or takes the blame; Slurm's requeue has not
    anew = job_of(event.allocation) != job_of(world.allocation)
    gave_up = world.verdict is not None and world.verdict.outcome is Outcome.FAILED
    # whoever has written a verdict had written everything before it
    complete = event.term == world.term + 1 and (world.term == 0 or world.verdict is not None)
    fresh = World(
        run=event.run,
        allocation=event.allocation,
        term=event.term,
        leader=event.node,
        expected=event.nodes,
        takeover=event.takeover,
        lost_leader=world.leader if event.takeover else NodeId(""),
        term_since=now,
        phase_since=now,
        generation=world.generation if complete else Generation(world.generation + UNWRITTEN),
        previous=world.previous,
        previous_term=world.previous_term,
        checkpoints=world.checkpoints,
        saved=world.saved,
        verified=world.verified,
        saves=world.saves,
        copies=world.copies,
        incidents=world.incidents,
        spent=() if anew and gave_up else world.spent,
        strikes=world.strikes,
        total_steps=world.total_steps,
        known_bugs=world.known_bugs,
        fruitless=0 if anew else world.fruitless,
        high_step=world.high_step,
        starts=world.starts + (event.allocation != world.allocation),
        undone=world.undone,
        base_step=world.restore.step if world.restore else Step(0),
        kept=world.kept,
        undone_seconds=world.undone_seconds,
        recovering=world.recovering,
        idle_since=world.idle_since,
        verdict=None,
    )
    if event.allocation == world.allocation and world.verdict is None:
        # what was asked of the last leader is asked of this one
        fresh = replace(
            fresh,
            stop_asked=world.stop_asked,
            stop_asked_at=world.stop_asked_at,
            termination=world.termination,
            termination_at=world.termination_at,
        )
        if world.takeover:  # no world has taken effect since: the first one that was lost is still waited for
            fresh = replace(fresh, takeover=True, lost_leader=world.lost_leader)
    since = now - event.leaderless
    if event.takeover:
        return _open_incident(fresh, "leader lost", world.leader, Budget.INFRASTRUCTURE, since, before=before)
    if event.allocation == world.allocation and world.verdict is None and world.formation is not None:
        why = f"{event.node}: its agent, the leader, was restarted"
        return _open_incident(fresh, "agent restarted", why, Budget.INFRASTRUCTURE, since, before=before)
    return fresh


def _join(world: World, event: NodeJoined, now: float) -> World:
    node = Node(event.node, event.incarnation, event.address, event.workers, event.port, heard_at=now)
    old = world.node(event.node)
    if old is not None and old.incarnation != event.incarnation:
        world = _remove(world, old, f"{old.id}: its agent was restarted", now, cause="agent restarted")
    others = tuple(known for known in world.nodes if known.id != event.node)
    return replace(world, nodes=tuple(sorted((*others, node), key=lambda known: known.id)))


def _change_node(world: World, node: NodeId, incarnation: Incarnation, **changes: Any) -> World:
    """What is said of an incarnation that is no longer in office changes nothing."""
    known = world.node(node)
    if known is None or known.incarnation != incarnation:
        return world
    changed = replace(known, **changes)
    return replace(world, nodes=tuple(changed if each is known else each for each in world.nodes))


def _lose_touch(world: World, event: StreamClosed | WorkersVanished | KeeperVanished, now: float) -> World:
    """A line to the node has closed; since when it may be gone is told by the first that did."""
    known = world.node(event.node)
    since = known.gone_at if known is not None and known.gone_at else now
    match event:
        case StreamClosed():
            return _change_node(world, event.node, event.incarnation, connected=False, gone_at=since)
        case WorkersVanished():
            return _change_node(world, event.node, event.incarnation, workers_gone=True, gone_at=since)
        case KeeperVanished():
            return _change_node(world, event.node, event.incarnation, keeper_gone=True, gone_at=since)
        case _:
            assert_never(event)


def _remove(world: World, node: Node, why: str, now: float, cause: str = "node lost") -> World:
    """Take an incarnation out of office; if it held ranks, that is an incident."""
    world = replace(
        world,
        nodes=tuple(known for known in world.nodes if known is not node),
        holdings=world.holdings.lost(node.id, node.incarnation),
    )
    formation = world.formation
    member = formation.member(node.id) if formation is not None else None
    if member is None or member.incarnation != node.incarnation:
        return world
    world = replace(world, lost_members=(*world.lost_members, node.id), broken_at=_first(world.broken_at, now))
    if world.phase in (Phase.RUNNING, Phase.LEAVING):
        echoes = all(each.failure.kind is FailureKind.COLLECTIVE for each in world.failures)
        if world.failures and echoes and len(world.lost_members) == 1:
            world = _find_cause(world, cause, why, Budget.INFRASTRUCTURE, now, ())
        else:
            world = _open_incident(world, cause, why, Budget.INFRASTRUCTURE, now)
        world = replace(world, strikes=(*world.strikes, Strike(node.id, now)))
    return world


def _first(known: float | None, now: float) -> float:
    return now if known is None else known


def _acknowledge(world: World, event: WorldAcknowledged) -> World:
    node = world.node(event.node)
    if node is None or node.incarnation != event.incarnation:
        return world
    if event.term != world.term or not _current(world, event.generation):
        return world
    return replace(world, acknowledged=world.acknowledged | {event.node})


def _refuse(world: World, event: WorldRefused) -> World:
    """The refused number is burnt: the next proposal must be above it."""
    if event.promised_term > world.term:
        return world  # no number helps a deposed leader
    formation = world.formation
    refused = formation is not None and event.promised_generation >= formation.generation
    generation = max(world.generation, event.promised_generation)
    return replace(world, generation=generation, refused=world.refused or refused)


def _ready(world: World, event: WorkersReady, now: float) -> World:
    formation = world.formation
    if formation is None or formation.generation != event.generation:
        return world
    ready = world.ready | {event.node}
    if event.total_steps is not None:
        world = replace(world, total_steps=event.total_steps)
    complete = all(member.node in ready for member in formation.members)
    world = replace(world, ready=ready)
    if complete:
        world = _begin_training(world, now)
    if complete and not event.counts_steps and world.open_incident is not None and not world.broken:
        world = _resume(world, world.open_incident, now, counts_steps=False)
    return world


def _begin_training(world: World, now: float) -> World:
    if world.training_since is not None:
        return world
    waited = world.waiting_to_recover(now)
    if world.turned_from is not None:  # what the branch leaves behind is undone from now on
        world = _turn_back(world, world.base_step)
    return replace(world, training_since=now, recovering=world.recovering + waited, turned_from=None)


def _progress(world: World, event: Progressed, now: float) -> World:
    if not _current(world, event.generation):
        return _progress_of_the_undone(world, event)
    reached = max(event.step, world.progress.get(event.node, world.base_step))
    world = replace(
        world,
        progress={**world.progress, event.node: reached},
        losses=world.losses if event.loss is None else {**world.losses, event.node: event.loss},
    )
    step = world.step
    if step > world.base_step:
        world = _begin_training(world, now)  # also where a word of its readiness has been lost
    incident = world.open_incident
    if incident is not None and step > world.base_step and not world.broken:
        world = _resume(world, incident, now, counts_steps=True)
    if step > world.high_step:
        # progress beyond everything seen refills what repeated failures had used up
        bugs = frozenset(bug for bug in world.known_bugs if bug[0] >= step)
        world = replace(world, high_step=step, advanced=True, fruitless=0, known_bugs=bugs)
    return world


def _progress_of_the_undone(world: World, event: Progressed) -> World:
    """The last word on a generation that was given up: it says how many steps the recovery loses."""
    if world.undone is None or world.undone.generation != event.generation:
        return world
    words = {**dict(world.undone.last_words), event.node: event.step}
    return replace(world, undone=replace(world.undone, last_words=tuple(sorted(words.items()))))


def _give_up_generation(world: World) -> World:
    """One that never trained does not hide the one before it."""
    formation = world.formation
    if formation is None or world.training_since is None:
        return world
    incident, earlier = world.open_incident, world.undone
    if incident is not None and earlier is not None and incident.generation <= earlier.generation:
        known = replace(incident, step=max(incident.step, earlier.reached))
        world = replace(world, incidents=(*world.incidents[:-1], known))
    return replace(world, undone=Undone(formation.generation, world.step))


def _resume(world: World, incident: Incident, now: float, *, counts_steps: bool) -> World:
    """The first step after a failure, or the first that is known."""
    lost = None
    if counts_steps:
        reached = world.undone.reached if world.undone is not None else incident.step
        lost = max(0, max(incident.step, reached) - world.base_step)
    closed = replace(incident, resumed_at=now, steps_lost=lost)
    return replace(world, incidents=(*world.incidents[:-1], closed))


def _fail(world: World, event: WorkerFailed, now: float) -> World:
    if not _current(world, event.generation) or any(each.rank == event.rank for each in world.failures):
        return world
    failure = event.failure
    earlier = world.failures
    if failure.kind is FailureKind.COLLECTIVE and earlier:
        return world  # an echo: a thousand nodes send some thousand of them
    world = replace(world, failures=(*earlier, event), broken_at=_first(world.broken_at, now))
    budget = budget_of(failure.kind)
    culprit = f"rank {event.rank} on {event.node}: {failure.what}" + (f" at {failure.where}" if failure.where else "")
    incident = world.open_incident
    # one misfortune kills many workers: a generation pays, and its nodes are blamed, once
    paid = any(budget_of(each.failure.kind) is not None for each in earlier)
    if incident is None or incident.generation != event.generation:
        cause = "checkpoint damaged" if failure.kind is FailureKind.DAMAGED else "worker failed"
        world = _open_incident(world, cause, culprit, None if paid else budget, now, failure.tail)
    elif incident.budget is None and budget is not None:
        world = _find_cause(world, incident.cause, culprit, budget, now, failure.tail)
    if failure.kind is FailureKind.FORGOTTEN:
        world = replace(world, holdings=replace(world.holdings, whole=()))
    if failure.kind is FailureKind.EXCEPTION:
        if (failure.step, failure.signature()) in world.known_bugs and world.repeated_bug is None:
            world = replace(world, repeated_bug=event)
    elif budget is Budget.INFRASTRUCTURE:
        blamed = any(
            each.node == event.node and budget_of(each.failure.kind) is Budget.INFRASTRUCTURE for each in earlier
        )
        if not blamed:
            world = replace(world, strikes=(*world.strikes, Strike(event.node, now)))
    return world


def budget_of(kind: FailureKind) -> Budget | None:
    """Which budget pays. A broken collective is a consequence, and there is another copy: they never count."""
    match kind:
        case FailureKind.COLLECTIVE | FailureKind.DAMAGED | FailureKind.FORGOTTEN:
            return None
        case FailureKind.EXCEPTION | FailureKind.EXIT:
            return Budget.USER_CODE
        case (
            FailureKind.KILLED
            | FailureKind.FENCED
            | FailureKind.STUCK
            | FailureKind.START
            | FailureKind.UNREADABLE
            | FailureKind.SURROUNDINGS
        ):
            return Budget.INFRASTRUCTURE
        case _:
            assert_never(kind)


def _open_incident(
    world: World,
    cause: str,
    culprit: str,
    budget: Budget | None,
    now: float,
    tail: tuple[str, ...] = (),
    before: tuple[Generation, Step] | None = None,
) -> World:
    """Begin an incident, unless one is open: a failure during a recovery prolongs the one that is."""
    spent = world.spent if budget is None else (*world.spent, Spent(budget, now))
    if world.open_incident is not None:
        return replace(world, spent=spent)
    incident = Incident(
        number=len(world.incidents) + 1,
        cause=cause,
        culprit=culprit,
        detected_at=now,
        generation=world.generation if before is None else before[0],
        step=world.step if before is None else before[1],
        budget=budget,
        tail=tail,
    )
    return replace(world, incidents=(*world.incidents, incident), spent=spent)


def _find_cause(world: World, cause: str, culprit: str, budget: Budget, now: float, tail: tuple[str, ...]) -> World:
    """What looked like a broken collective has found its cause, which pays."""
    incident = world.open_incident
    if incident is None or incident.budget is not None:
        return _open_incident(world, cause, culprit, budget, now, tail)
    found = replace(incident, cause=cause, culprit=culprit, budget=budget, tail=tail)
    return replace(world, incidents=(*world.incidents[:-1], found), spent=(*world.spent, Spent(budget, now)))


def _note(world: World, cause: str, culprit: str, decision: str, now: float) -> World:
    """An incident that costs no time: training goes on."""
    if world.open_incident is not None:
        return world
    world = _open_incident(world, cause, culprit, None, now)
    noted = replace(
        world.incidents[-1],
        resumed_at=now,
        steps_lost=0,
        decision=decision,
    )
    return replace(world, incidents=(*world.incidents[:-1], noted))


def _ask_termination(world: World, event: TerminationAsked, now: float) -> World:
    known = world.termination
    if known is not None and known.why is Termination.CANCELLED:
        return world
    if known is not None:
        # the warning came first, the signal later: the reason may be clearer now, the time only shorter
        left = min(world.termination_at + known.seconds_left, now + event.seconds_left) - now
        return replace(world, termination=replace(event, seconds_left=left), termination_at=now)
    if event.why is Termination.PREEMPTED:
        world = replace(world, spent=(*world.spent, Spent(Budget.PREEMPTION, now)))
    return replace(world, termination=event, termination_at=now)


def _commit_checkpoint(world: World, event: CheckpointCommitted) -> World:
    formation = world.formation
    # what this generation has started from, out of memory, may be durable only now
    started_from = formation is not None and formation.memory and formation.restore == event.checkpoint
    if not started_from and not _current(world, event.checkpoint.generation):
        return world  # a straggler of a generation that has been rolled back: not of this lineage
    saves = world.saves
    if event.blocked > 0 or event.lag > 0:
        saves = (*saves, Save(event.blocked, event.lag))[-LATEST_SAVES:]
    lineage = (*world.checkpoints, event.checkpoint)
    return replace(world, checkpoints=lineage, saved=event.checkpoint, saves=saves, turned_from=None)


def _verify_checkpoint(world: World, event: CheckpointVerified, now: float) -> World:
    if event.checkpoint not in world.checkpoints:
        return world
    if not event.damage:
        return replace(world, verified=event.checkpoint)
    what = f"the checkpoint of step {event.checkpoint.step} does not read back as it was written: {event.damage}"
    # one node's word condemns none: it is set aside when another has found the same, at a restart
    return _note(world, "checkpoint damaged", what, "training goes on; the newest verified checkpoint is kept", now)


def _fail_checkpoint(world: World, event: CheckpointFailed, now: float) -> World:
    persisting = world.persisting
    if persisting is not None and persisting.snapshot == CheckpointRef(event.step, event.generation):
        world = replace(world, persisting=replace(persisting, failed=event.reason))
    if not _current(world, event.generation):
        return world
    last = world.incidents[-1] if world.incidents else None
    cause = "checkpoint failed"
    if last is not None and (last.cause, last.generation, last.open) == (cause, event.generation, False):
        again = replace(last, culprit=event.reason, times=last.times + 1)
        world = replace(world, incidents=(*world.incidents[:-1], again))
    else:
        world = _note(world, cause, event.reason, "training goes on; the next save tries again", now)
    return replace(world, save_failed=(event.step, event.reason))


def _without(world: World, gone: Sequence[CheckpointRef]) -> World:
    left = tuple(each for each in world.checkpoints if each not in gone)
    before = world.turned_from
    before = before and tuple(each for each in before if each not in gone)
    return replace(world, checkpoints=left, turned_from=before)


def _lose_checkpoint(world: World, event: CheckpointDamaged, now: float) -> World:
    world = _without(world, (event.checkpoint,))
    if world.suspected == event.checkpoint:
        world = replace(world, suspected=None, examined=event)
    return _note(world, "checkpoint damaged", event.detail, "it is not used; an older one takes its place", now)


def _keep_checkpoint(world: World, event: CheckpointKept, now: float) -> World:
    """A failure of the nodes that could not use it: they are blamed, and the generation pays, once."""
    if world.suspected != event.checkpoint:
        return world
    world = replace(world, suspected=None, examined=event)
    accusing = [each for each in world.failures if each.failure.kind is FailureKind.DAMAGED]
    others = [each for each in world.failures if each not in accusing]
    blamed = {each.node for each in others if budget_of(each.failure.kind) is Budget.INFRASTRUCTURE}
    nodes = [node for node in dict.fromkeys(each.node for each in accusing) if node not in blamed]
    world = replace(world, strikes=(*world.strikes, *(Strike(node, now) for node in nodes)))
    if not accusing or any(budget_of(each.failure.kind) is not None for each in others):
        return world
    first = accusing[0]
    culprit = f"rank {first.rank} on {first.node}: {first.failure.what}; {event.why}"
    return _find_cause(world, "worker failed", culprit, Budget.INFRASTRUCTURE, now, first.failure.tail)


def _close_generation(world: World, kept: Step, now: float) -> World:
    """Account for a generation that ends; the steps up to `kept` survive."""
    if world.training_since is None:
        return world
    until = world.trained_until(now)
    trained = Stretch(world.base_step, world.step, max(0.0, until - world.training_since))
    world = replace(world, kept=(*world.kept, trained), training_since=None, idle_since=until)
    return _turn_back(world, kept)


def _turn_back(world: World, step: Step) -> World:
    """What was trained beyond `step` is undone."""
    left = tuple(each.until(step) for each in world.kept)
    undone = sum(before.seconds - after.seconds for before, after in zip(world.kept, left, strict=True))
    kept = tuple(each for each in left if each.end > each.base)
    return replace(world, kept=kept, undone_seconds=world.undone_seconds + undone)


def _carry_out(world: World, decided: Decided, now: float) -> World:
    world = replace(world, last_reason=decided.reason)
    incident = world.open_incident
    settles = any(not isinstance(action, AskPeer | Evict | Quarantine | PersistCopies) for action in decided.actions)
    if incident is not None and not incident.decision and settles:
        world = replace(world, incidents=(*world.incidents[:-1], replace(incident, decision=decided.reason)))
    for action in decided.actions:
        match action:
            case Propose():
                formation = action.formation
                base = formation.restore.step if formation.restore else Step(0)
                fruitless = world.fruitless_so_far
                bugs = frozenset((each.failure.step, each.failure.signature()) for each in world.failures)
                world = _close_generation(_give_up_generation(world), base, now)
                world = replace(
                    world,
                    generation=formation.generation,
                    formation=formation,
                    acknowledged=frozenset(),
                    refused=False,
                    lease_renewed=False,
                    ready=frozenset(),
                    progress={},
                    reports=(),
                    failures=(),
                    returned=frozenset(),
                    stopped=frozenset(),
                    lost_members=(),
                    broken_at=None,
                    save_failed=None,
                    save_skipped=None,
                    holdings=world.holdings.begin(formation),
                    persisting=None,
                    suspected=None,
                    examined=None,
                    base_step=base,
                    fruitless=fruitless,
                    advanced=False,
                    known_bugs=world.known_bugs | bugs,
                )
            case Commit():
                members = world.formation.members if world.formation is not None else ()
                world = replace(world, previous=members, previous_term=world.term, takeover=False)
            case AskPeer():
                world = _change_node(world, action.suspect, action.incarnation, asked=action.peer)
            case Evict():
                node = world.node(action.node)
                if node is not None and node.incarnation == action.incarnation:
                    world = _remove(world, node, decided.reason, now)
            case PersistCopies():
                known = world.persisting
                since = now if known is None or known.snapshot != action.snapshot else known.since
                world = replace(world, persisting=Persisting(action.snapshot, action.handed_by, since))
            case Quarantine():
                world = replace(world, suspected=action.checkpoint)
            case Requeue():
                world = replace(world, requeue_asked=action.reason)
            case SaveAndStop() | HaltWorkers():
                pass
            case Conclude():
                kept = max((each.step for each in world.checkpoints), default=world.step)
                world = _close_generation(world, kept, now)
                world = replace(world, verdict=action.verdict)
            case _:
                assert_never(action)
        world = _move(world, action, now)
    return world


def _move(world: World, action: Action, now: float) -> World:
    if type(action) not in TRANSITIONS:
        return world
    allowed, phase = TRANSITIONS[type(action)]
    assert world.phase in allowed, f"{action.action} in phase {world.phase}"
    return replace(world, phase=phase, phase_since=now)
