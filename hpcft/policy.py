"""What to do, and why.

Theory of operation
-------------------
`decide(world, rules, now)` looks at the world as it is and returns what should happen next, with one sentence
for the operator. It is *level-triggered*: every event has already been folded into the world by `transitions.apply`,
so the same picture always leads to the same decision, however it came about; an event that was missed, doubled
or seen late cannot strand the run, because the next tick asks again. (Why not one rule per event:
docs/decisions/0002-level-triggered-policy.md.)

The guards stand in order of priority, each with its sentence. The recovery ladder is climbed from the cheapest
rung that works: all workers again on the same nodes, the remaining nodes, the queue, and in the end a stop that
says why.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hpcft.cadence import SaveRules
from hpcft.errors import ExitCode
from hpcft.events import (
    Action,
    AskPeer,
    CheckpointDamaged,
    CheckpointKept,
    CheckpointRef,
    Commit,
    Conclude,
    Decided,
    Evict,
    FailureKind,
    Formation,
    HaltWorkers,
    Member,
    Outcome,
    PersistCopies,
    Propose,
    Quarantine,
    Reach,
    Requeue,
    SaveAndStop,
    Termination,
    Verdict,
)
from hpcft.ids import Generation, NodeId, Rank
from hpcft.membership import Timing, takes_effect
from hpcft.units import Cadence, Never, counted, human_duration
from hpcft.world import Budget, Node, Phase, World

NOTHING = Decided((), "")

CAUSE_SECONDS = 0.5
"""Where all that is known is a broken collective, its cause is waited for: a core dump delays the report of it."""


LAST_COMMIT_SECONDS = 600.0
"""How long the last checkpoint's commit is waited for when every rank has returned."""
PERSIST_SECONDS = 600.0
"""How long a run that has to leave waits until what it has in memory is durable."""
NO_STEP_SECONDS = 10.0
"""The same where no step was made: then there is seldom one to come."""

EXAMINE_SECONDS = 600.0
"""How long the leader may take to read a checkpoint that a rank found damaged, before that is tried again as it is."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The configured limits. Seconds where not said otherwise."""

    timing: Timing
    minimum_nodes: int
    multiple_of: int = 1
    """The world size is a multiple of this."""
    join_timeout: float = 60.0
    rejoin_timeout: float = 10.0
    """How long a node whose agent died, but whose keeper lives, is waited for."""
    budgets: tuple[tuple[Budget, int], ...] = ()
    window: float = 3600.0
    backoff: float = 1.0
    backoff_max: float = 60.0
    no_progress_generations: int = 3
    strikes: int = 3
    """Infrastructure failures within the window after which a node is left out, if enough others are there."""
    saves: bool = True
    """The program writes checkpoints with hpcft (a plain command does not)."""
    snapshot_every: Cadence = Never()
    """How often the state is copied into memory, without being written."""
    neighbours: bool = False
    """Each node's copies go to another one as well."""
    requeue: bool = True
    stop_within: float = 60.0
    """How long an operator's stop waits for the last checkpoint."""
    saving: SaveRules = SaveRules()
    """Kept by the leader's loop; nothing is decided by it here."""


def decide(world: World, rules: Rules, now: float) -> Decided:
    """The next thing to do, or `NOTHING`."""
    if world.phase is Phase.ENDED:
        return NOTHING
    gone = _gone(world, rules, now)
    if gone:
        actions = tuple(Evict(node.id, node.incarnation) for node, _ in gone)
        return Decided(actions, "; ".join(why for _, why in gone))
    if world.requeue_asked:
        return _after_requeue(world)
    inquiry = _inquire(world, rules, now)
    if inquiry.actions:
        return inquiry
    finished = _finish(world, rules, now)
    if finished.actions:
        return finished  # nothing is left to do, whoever asks for what
    leaving = _termination(world, rules, now)
    if leaving is not None:
        return leaving
    if world.takeover and world.node(world.lost_leader) is None:
        # only its agent may have died: then its keeper brings it back
        if now < world.term_since + rules.rejoin_timeout:
            return NOTHING
        return _leave(world, rules, now, f"{world.lost_leader}, the leader's node, is lost")
    match world.phase:
        case Phase.GATHERING:
            return _gather(world, rules, now)
        case Phase.FORMING:
            return _form(world, rules, now)
        case Phase.RUNNING:
            return _run(world, rules, now)
        case Phase.LEAVING:
            return NOTHING


def silence(node: Node, now: float) -> float:
    """Seconds since the leader last heard of the node, on the leader's own clock."""
    return now - node.heard_at


def suspects(world: World, rules: Rules, now: float) -> tuple[Node, ...]:
    """Nodes that may be gone. No world is formed with them, and none against them, until that is known."""
    return tuple(
        node
        for node in world.nodes
        if not node.connected or node.workers_gone or silence(node, now) >= rules.timing.suspect
    )


def _gone(world: World, rules: Rules, now: float) -> list[tuple[Node, str]]:
    """Incarnations that certainly train no longer, each with the evidence."""
    gone = []
    for node in world.nodes:
        quiet = silence(node, now)
        if node.workers_gone and node.keeper_gone:
            gone.append((node, f"{node.id} is gone: all its processes have ended"))
        elif node.workers_gone:
            # nothing is left that a lease could protect from, and its keeper starts another agent
            if now - node.gone_at >= rules.rejoin_timeout:
                why = f"its agent ended and did not come back in {human_duration(rules.rejoin_timeout)}"
                gone.append((node, f"{node.id} is lost: {why}"))
        elif node.answer is not None and node.answer.found is Reach.ENDED:
            gone.append((node, f"{node.id} is lost: it has told {node.answer.node} that its workers have ended"))
        elif quiet >= rules.timing.timeout:
            why = f"no heartbeat for {human_duration(quiet)}, so its lease is over"
            gone.append((node, f"{node.id} is lost: {why}{_second_opinion(node)}"))
    return gone


def _second_opinion(node: Node) -> str:
    """What helps whoever has to mend it: node, or way."""
    if node.answer is None:
        return f" ({node.asked} was asked about it, and has not answered)" if node.asked else ""
    if node.answer.found is Reach.ANSWERS:
        return f" (it answers {node.answer.node}: the way between it and the leader is broken)"
    return f" ({node.answer.node} does not reach it either: {node.answer.detail})"


def _inquire(world: World, rules: Rules, now: float) -> Decided:
    """Ask a second agent about each silent node, once for each silence."""
    silent = [
        node
        for node in world.nodes
        if silence(node, now) >= rules.timing.suspect and not node.asked and not node.workers_gone
    ]
    if not silent:
        return NOTHING
    dubious = {node.id for node in suspects(world, rules, now)}
    # not the leader's own agent: what stands in the leader's way stands in its way, too
    peers = [node.id for node in world.nodes if node.id not in dubious and node.id != world.leader]
    if not peers:
        return NOTHING
    actions, words = [], []
    for number, node in enumerate(silent):
        peer = peers[number % len(peers)]
        actions.append(AskPeer(node.id, node.incarnation, peer))
        words.append(f"{node.id} has been silent for {human_duration(silence(node, now))}: {peer} is asked about it")
    return Decided(tuple(actions), "; ".join(words))


def _gather(world: World, rules: Rules, now: float) -> Decided:
    present = _candidates(world, rules, now)
    waited = now - world.phase_since
    there = {node.id for node in world.nodes}
    missing = [node for node in world.expected if node not in there]
    if len(world.expected) < rules.minimum_nodes:
        return _stop(
            ExitCode.BELOW_MINIMUM,
            f"the allocation has {counted(len(world.expected), 'node')}, nodes.min asks for {rules.minimum_nodes}",
        )
    if missing and waited < rules.join_timeout:
        return NOTHING
    if suspects(world, rules, now):
        return NOTHING
    if len(present) < rules.minimum_nodes:
        if waited < rules.join_timeout:
            return NOTHING
        return _leave(
            world,
            rules,
            now,
            f"only {len(present)} of {len(world.expected)} nodes came within {human_duration(rules.join_timeout)}, "
            f"nodes.min is {rules.minimum_nodes}",
        )
    late = f" without {', '.join(missing)}, not there after {human_duration(rules.join_timeout)}" if missing else ""
    ready = "1 node is ready" if len(present) == 1 else f"{len(present)} nodes are ready"
    return _propose(world, rules, now, f"{ready}{late}")


def _form(world: World, rules: Rules, now: float) -> Decided:
    formation = world.formation
    assert formation is not None
    if world.lost_members:
        return _recover(world, rules, now, f"{_lost(world)} while the world was forming")
    if world.refused:
        return _propose(world, rules, now, f"a node had promised itself to generation {world.generation} already")
    effective, why = takes_effect(
        formation,
        world.previous,
        world.acknowledged,
        in_office=frozenset(node.id for node in world.nodes),
        lease_renewed=world.lease_renewed,
        leases_over=world.previous_term == world.term or now >= world.term_since + rules.timing.timeout,
    )
    if not effective:
        return NOTHING
    return Decided((Commit(formation.generation),), f"generation {formation.generation} starts: {why}")


def _run(world: World, rules: Rules, now: float) -> Decided:
    if _all_returned(world):
        return NOTHING  # the last checkpoint is being committed
    if world.repeated_bug is not None:
        bug = world.repeated_bug
        where = f" at {bug.failure.where}" if bug.failure.where else ""
        return _stop(
            ExitCode.USER_CODE,
            f"rank {bug.rank} on {bug.node} failed twice at step {bug.failure.step} with the same error: "
            f"{bug.failure.what}{where}; another try would end the same way",
        )
    if _cause_is_open(world, now):
        return NOTHING
    if world.failures:
        return _recover(world, rules, now, _root_cause(world))
    if world.lost_members:
        return _recover(world, rules, now, _lost(world))
    return NOTHING


def _cause_is_open(world: World, now: float) -> bool:
    """Only consequences are known so far, and the cause may still be reported: it is to be named, and to pay."""
    echoes = all(each.failure.kind is FailureKind.COLLECTIVE for each in world.failures)
    waited = world.broken_at is None or now >= world.broken_at + CAUSE_SECONDS
    return bool(world.failures) and echoes and not world.lost_members and not waited


def _lost(world: World) -> str:
    """Which members are gone, and which have come back as others."""
    back = [node for node in world.lost_members if world.node(node) is not None]
    gone = [node for node in world.lost_members if node not in back]
    parts = []
    if gone:
        parts.append(f"{', '.join(gone)} {'was' if len(gone) == 1 else 'were'} lost")
    if back:
        parts.append(f"{', '.join(back)} came back with a new agent")
    return " and ".join(parts)


def _root_cause(world: World) -> str:
    first = next(
        (each for each in world.failures if each.failure.kind is not FailureKind.COLLECTIVE), world.failures[0]
    )
    if first.failure.kind is FailureKind.DAMAGED:
        accusing = dict.fromkeys(each.node for each in world.failures if each.failure.kind is FailureKind.DAMAGED)
        match world.examined:
            case CheckpointDamaged(checkpoint):
                return f"{_damaged(world.examined)}; {_instead(world, checkpoint)}"
            case CheckpointKept(checkpoint, why):
                return f"{', '.join(accusing)} found the checkpoint of step {checkpoint.step} damaged; {why}"
            case None:
                return f"rank {first.rank} on {first.node} found its checkpoint damaged ({first.failure.what})"
    if first.failure.kind is FailureKind.COLLECTIVE and world.lost_members:
        return _lost(world)
    return f"rank {first.rank} on {first.node} failed ({first.failure.what})"


def _damaged(found: CheckpointDamaged) -> str:
    return f"the checkpoint of step {found.checkpoint.step} is damaged ({found.detail})"


def _instead(world: World, checkpoint: CheckpointRef) -> str:
    if checkpoint == world.asked:
        return "it was asked for, so none is taken in its place"
    return "the next older one is used" if world.checkpoints else "there is no other"


def _recover(world: World, rules: Rules, now: float, what: str) -> Decided:
    """The ladder: again on the same nodes, on the remaining ones, through the queue, or stop and say why."""
    spent = _exhausted(world, rules, now)
    if spent:
        return _stop(ExitCode.GAVE_UP, f"{what}; {spent}")
    damaged = next((each for each in world.failures if each.failure.kind is FailureKind.DAMAGED), None)
    if (
        damaged is not None
        and world.formation is not None
        and world.formation.restore is not None
        and (not world.formation.memory)
    ):
        checkpoint = world.formation.restore
        if world.examined is None:
            if world.suspected is None:
                return Decided(
                    (Quarantine(checkpoint, damaged.failure.what),),
                    f"rank {damaged.rank} on {damaged.node} finds the checkpoint of step {checkpoint.step} damaged "
                    f"({damaged.failure.what}): the leader looks at it before it is set aside",
                )
            if world.broken_at is None or now < world.broken_at + EXAMINE_SECONDS:
                return NOTHING  # the leader is looking at it
            what = f"{what}, and the leader has not read it in {human_duration(EXAMINE_SECONDS)}"
        if isinstance(world.examined, CheckpointDamaged) and (checkpoint == world.asked or not world.checkpoints):
            return _stop_damaged(world, what)
    if suspects(world, rules, now):
        return NOTHING  # whether they are in or out is known soon: by their rejoining, or by their lease
    if len(_candidates(world, rules, now)) < rules.minimum_nodes:
        return _leave(
            world,
            rules,
            now,
            f"{what}; {counted(len(world.nodes), 'node')} left, nodes.min is {rules.minimum_nodes}",
        )
    older_instead = isinstance(world.examined, CheckpointDamaged)
    if not older_instead and world.broken_at is not None and now < world.broken_at + _backoff(world, rules):
        return NOTHING
    return _propose(world, rules, now, what)


def _stop_damaged(world: World, what: str) -> Decided:
    if world.asked is not None and world.turned_from:
        newest = world.turned_from[-1].step
        return _stop(
            ExitCode.DAMAGED, f"{what}; a start without --from goes on from step {newest}, as if nothing had been"
        )
    if world.checkpoints:
        return _stop(ExitCode.DAMAGED, f"{what}; `hpcft ckpt ls` shows which others there are")
    return _stop(
        ExitCode.DAMAGED,
        f"{what}, and the run, which had saved step {world.saved.step if world.saved else 0}, does not start from the "
        "beginning by itself: put a sound checkpoint back into checkpoints/ (what was set aside is in "
        "checkpoints/.quarantine) and start with --from STEP, or start anew under another run.name",
    )


def _exhausted(world: World, rules: Rules, now: float) -> str:
    """The sentence that says which budget is spent, or nothing."""
    for budget, limit in rules.budgets:
        used = sum(each.budget is budget and each.at > now - rules.window for each in world.spent)
        if used > limit:
            what = "preemptions" if budget is Budget.PREEMPTION else f"failures of {budget}"
            return f"{used} {what} within {rules.window:.0f} s, {limit} are allowed"
    fruitless = world.fruitless_so_far
    if rules.saves and rules.no_progress_generations and fruitless >= rules.no_progress_generations:
        return f"{counted(fruitless, 'generation')} in a row ended without passing step {world.high_step}"
    return ""


def _backoff(world: World, rules: Rules) -> float:
    """Seconds to wait before the next generation: none after progress, then doubling, with jitter.

    The jitter is a function of the run and the generation, so that the decision stays a function of the world.
    """
    fruitless = world.fruitless_so_far
    if fruitless == 0:
        return 0.0
    digest = hashlib.blake2b(f"{world.run}/{world.generation}".encode(), digest_size=2).digest()
    jitter = 0.5 + int.from_bytes(digest, "big") / 65535
    doubled: float = rules.backoff * 2 ** (fruitless - 1) * jitter
    return min(rules.backoff_max, doubled)


def _candidates(world: World, rules: Rules, now: float) -> tuple[Node, ...]:
    """Nodes that may hold ranks, former members first and in their old order."""
    dubious = {node.id for node in suspects(world, rules, now)}
    sound = [node for node in world.nodes if node.id not in dubious]
    strikes = {
        node.id: sum(each.node == node.id and each.at > now - rules.window for each in world.strikes) for node in sound
    }
    trusted = [node for node in sound if strikes[node.id] < rules.strikes]
    if len(trusted) >= rules.minimum_nodes:
        sound = trusted
    order = {member.node: member.first_rank for member in world.previous}
    last = Rank(1 << 30)
    return tuple(sorted(sound, key=lambda node: (order.get(node.id, last), node.id)))


def assign(candidates: tuple[Node, ...], multiple_of: int) -> tuple[Member, ...]:
    """Ranks 0 … n-1 over the candidates, in order; whole nodes are left out until the size fits."""
    chosen = list(candidates)
    while chosen and sum(node.workers for node in chosen) % multiple_of:
        chosen.pop()
    members = []
    first = 0
    for node in chosen:
        members.append(Member(node.id, node.incarnation, node.address, node.workers, Rank(first), node.port))
        first += node.workers
    return tuple(members)


def _propose(world: World, rules: Rules, now: float, what: str) -> Decided:
    members = assign(_candidates(world, rules, now), rules.multiple_of)
    if world.saved is not None and world.restore is None and world.holdings.usable(members, None) is None:
        return _stop_damaged(world, f"{what}; no checkpoint is left")
    if len(members) < rules.minimum_nodes:
        least = f"{counted(rules.minimum_nodes, 'node')} or more"
        reason = f"{what}; no world of {least} has a number of ranks divisible by {rules.multiple_of}"
        if len(world.nodes) >= len(world.expected):
            return _stop(ExitCode.BELOW_MINIMUM, reason)  # more nodes than there are cannot come
        return _leave(world, rules, now, reason)
    generation = Generation(world.generation + 1)
    nonce = hashlib.blake2b(
        f"{world.run}/{world.term}/{generation}/{members[0].incarnation}".encode(), digest_size=4
    ).hexdigest()
    restore = world.restore
    memory: tuple[Member, ...] = ()
    handed_by: tuple[NodeId, ...] = ()
    start = f"from the checkpoint of step {restore.step}" if restore else "from the beginning"
    # what has led to a failure twice is not tried a third time: the older state, which has been on a disk, may be sound
    held = world.holdings.usable(members, restore) if not world.fruitless_so_far else None
    if held is not None:
        restore, memory, handed_by = held.snapshot, held.members, held.handed_by(members) or ()
        start = f"from the copy of step {restore.step} in memory{_instead_of_the_lost(memory, handed_by)}"
    formation = Formation(
        world.term,
        generation,
        members,
        restore,
        nonce,
        memory,
        handed_by,
        neighbours=rules.neighbours and len(members) > 1,
    )
    return Decided(
        (Propose(formation),),
        f"{what}: generation {generation} with {counted(len(members), 'node')} "
        f"and {counted(formation.world_size, 'rank')}, {start}",
    )


def _instead_of_the_lost(made_by: tuple[Member, ...], handed_by: tuple[NodeId, ...]) -> str:
    """Whose copies come from a neighbour."""
    words = [f"{made.node}'s from {by}" for made, by in zip(made_by, handed_by, strict=True) if made.node != by]
    return f" ({', '.join(words)})" if words else ""


def _all_returned(world: World) -> bool:
    return world.formation is not None and len(world.returned) == world.formation.world_size


def _finish(world: World, rules: Rules, now: float) -> Decided:
    """The end, if every rank has returned and what they have reached is safe."""
    if not _all_returned(world):
        return NOTHING
    step = world.step
    if not rules.saves:
        verdict = Verdict(Outcome.FINISHED, int(ExitCode.OK), "the command has ended on all ranks, with status 0")
        return Decided((Conclude(verdict),), verdict.reason)
    if world.restore is None or world.restore.step < step:
        # exit status 0 without the final checkpoint is not success
        if world.save_failed is None or world.save_failed[0] < step:
            patience = LAST_COMMIT_SECONDS if step else NO_STEP_SECONDS
            if now < world.returned_at + patience:
                return NOTHING  # its commit is on its way
            if not step:
                return _stop(
                    ExitCode.USER_CODE,
                    "all ranks ended well without a step and without a checkpoint: does the program call "
                    "`hpcft.main(train)`? (a program of its own is started with job.command)",
                )
            return _stop(
                ExitCode.UNUSABLE,
                f"training returned after step {step}, and its last checkpoint was not committed within "
                f"{human_duration(LAST_COMMIT_SECONDS)}",
            )
        return _stop(
            ExitCode.UNUSABLE,
            f"training returned after step {step}, but its last checkpoint could not be written: "
            f"{world.save_failed[1]}",
        )
    verdict = Verdict(Outcome.FINISHED, int(ExitCode.OK), f"the training function returned after step {step}")
    return Decided((Conclude(verdict),), verdict.reason)


def _termination(world: World, rules: Rules, now: float) -> Decided | None:
    """Leaving because Slurm or an operator says so: checkpoint if one can still be made, then go."""
    if world.stop_asked:
        reason, deadline = f"stopped by {world.stop_asked}", world.stop_asked_at + rules.stop_within
        why_now = ""
    elif world.termination is not None:
        asked = world.termination
        reason, deadline = asked.why.value, world.termination_at + asked.seconds_left
        why_now = f"; {asked.detail}" if asked.detail else ""
    else:
        return None
    formation = world.formation
    training = world.phase is Phase.RUNNING and formation is not None and not world.failures and rules.saves
    if training and formation is not None and now < deadline:
        return Decided(
            (SaveAndStop(formation.generation),),
            f"{reason}: a last checkpoint is made ({human_duration(deadline - now)} left for it{why_now})",
        )
    if world.phase is Phase.LEAVING and formation is not None:
        all_stopped = len(world.stopped | world.returned) == formation.world_size
        saved = world.restore is not None and world.restore.step >= world.step
        failed = world.save_failed if world.save_failed is not None and world.save_failed[0] >= world.step else None
        settled = all_stopped and (saved or failed is not None)
        if not settled and not world.failures and not world.lost_members and now < deadline:
            return NOTHING
        newest = f"the newest is of step {world.restore.step}" if world.restore else "there is none"
        why = f" ({failed[1]})" if failed is not None else ""
        state = (
            f"saved at step {world.step}" if all_stopped and saved else f"no last checkpoint was made{why}, {newest}"
        )
        reason = f"{reason}; {state}"
    if (writing := _persist(world, rules, now, reason)) is not None:
        return writing
    halt: tuple[Action, ...] = (HaltWorkers(formation.generation),) if formation is not None else ()
    if world.stop_asked or (world.termination is not None and world.termination.why is Termination.CANCELLED):
        verdict = Verdict(Outcome.CANCELLED, ExitCode.CANCELLED, reason)
        return Decided((*halt, Conclude(verdict)), reason)
    assert world.termination is not None
    if world.termination.why is Termination.REQUEUED:
        verdict = Verdict(Outcome.REQUEUED, ExitCode.REQUEUED, f"{reason}: Slurm requeues the job")
        return Decided((*halt, Conclude(verdict)), verdict.reason)
    decided = _leave(world, rules, now, reason)
    return Decided((*halt, *decided.actions), decided.reason)


def _leave(world: World, rules: Rules, now: float, reason: str) -> Decided:
    """Give the job back to the queue, if that is allowed and worth it; what is only in memory is made durable first."""
    if (writing := _persist(world, rules, now, reason)) is not None:
        return writing
    spent = _exhausted(world, rules, now)
    if spent:
        return _stop(ExitCode.GAVE_UP, f"{reason}; {spent}")
    if not rules.requeue:
        return _stop(ExitCode.GAVE_UP, f"{reason}; slurm.requeue is off")
    return Decided((Requeue(reason),), f"{reason}: the job is requeued")


def _persist(world: World, rules: Rules, now: float, reason: str) -> Decided | None:
    """Have a state written that is only in memory, and wait for it; None: there is none, or it has taken too long."""
    asked = world.termination
    if world.stop_asked and now >= world.stop_asked_at + rules.stop_within:
        return None
    if asked is not None and now >= world.termination_at + asked.seconds_left:
        return None
    known = world.persisting
    there = assign(tuple(node for node in world.nodes if node not in suspects(world, rules, now)), 1)
    if known is None:
        held = world.holdings.usable(there, world.restore)
    else:
        if known.failed or known.snapshot in world.checkpoints or now >= known.since + PERSIST_SECONDS:
            return None
        held = next((each for each in world.holdings.whole if each.snapshot == known.snapshot), None)
        if held is None:
            return None  # whoever had the last copy of some share is gone
        if held.has(known.handed_by):
            return NOTHING
    by = held.handed_by(there) if held is not None else None
    if held is None or by is None:
        return None if known is None else NOTHING  # who has it is silent at present
    if held.snapshot in world.checkpoints:
        return None
    return Decided(
        (PersistCopies(held.snapshot, held.members, by),),
        f"{reason}: first the copy of step {held.snapshot.step}, which is in memory only"
        f"{_instead_of_the_lost(held.members, by)}, is made a checkpoint",
    )


def _after_requeue(world: World) -> Decided:
    """Slurm was asked; the verdict follows its answer, or a cancellation that comes before it."""
    asked = world.termination
    unwanted = world.stop_asked or (asked is not None and asked.why is Termination.CANCELLED)
    if unwanted and not world.requeue_accepted:
        by = f"stopped by {world.stop_asked}" if world.stop_asked else Termination.CANCELLED.value
        verdict = Verdict(Outcome.CANCELLED, ExitCode.CANCELLED, f"{by}, before Slurm had requeued the job")
        return Decided((Conclude(verdict),), verdict.reason)
    if world.requeue_refused:
        verdict = Verdict(
            Outcome.FAILED,
            ExitCode.UNUSABLE,
            f"{world.requeue_asked}; Slurm refused to requeue the job: {world.requeue_refused}",
        )
        return Decided((Conclude(verdict),), verdict.reason)
    if world.requeue_accepted:
        verdict = Verdict(Outcome.REQUEUED, ExitCode.REQUEUED, world.requeue_asked)
        return Decided((Conclude(verdict),), f"{verdict.reason}: requeued")
    return NOTHING


def _stop(code: ExitCode, reason: str) -> Decided:
    verdict = Verdict(Outcome.FAILED, int(code), reason)
    return Decided((Conclude(verdict),), reason)
