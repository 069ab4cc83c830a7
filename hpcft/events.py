"""The vocabulary: everything that can happen to a run, and everything a leader can tell an agent.

Theory of operation
-------------------
*Events* are facts. Edges (streams, workers, Slurm, signals, the clock) turn what they see into one of the small
frozen records below; the leader's loop applies each to its `World` and asks the policy what follows. What the
policy decided comes back as an event as well (`Decided`), so that the journal is a list of events and replaying
it rebuilds the world.

*Orders* are what the leader sends to an agent over its stream. An agent obeys an order only from the highest
term it has promised itself to (see `membership`).

Both unions are closed: `match` with `assert_never` makes a new kind without a consequence fail to type-check.
Nothing in here reads a clock; where a time is needed it is an argument of whoever applies the event.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term

# --- values that events and orders are made of ---


@dataclass(frozen=True, slots=True)
class Member:
    """One node's share of a world: `workers` ranks from `first_rank` on."""

    node: NodeId
    incarnation: Incarnation
    address: str
    workers: int
    first_rank: Rank
    port: int = 0
    """Where its agent answers other agents; 0: not known."""

    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.workers)


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A committed checkpoint. Generation and step together are its name, so a late writer can never replace one."""

    step: Step
    generation: Generation


@dataclass(frozen=True, slots=True)
class Formation:
    """A world as it is proposed to its members: who holds which ranks, and from which state they start."""

    term: Term
    generation: Generation
    members: tuple[Member, ...]
    restore: CheckpointRef | None
    nonce: str
    """Names the temporary directories of this generation's checkpoints (8 hex digits)."""
    memory: tuple[Member, ...] = ()
    """The members of the generation that made `restore`, whose agents hold it in memory: from there its workers take
    their state. Empty: from the file system."""
    handed_by: tuple[NodeId, ...] = ()
    """For each of `memory` the member whose agent hands out its copies: itself, or, where that node is lost, one that
    has them as well. Empty: each hands out its own."""
    neighbours: bool = False
    """Each member's copies go to its neighbour, too."""

    @property
    def world_size(self) -> int:
        return sum(member.workers for member in self.members)

    def member(self, node: NodeId) -> Member | None:
        return next((member for member in self.members if member.node == node), None)

    def neighbour(self, node: NodeId) -> Member | None:
        """Who keeps this member's copies as well: the next one. None: nobody does."""
        nodes = [member.node for member in self.members]
        if not self.neighbours or len(nodes) < 2 or node not in nodes:
            return None
        return self.members[(nodes.index(node) + 1) % len(nodes)]

    def guest(self, node: NodeId) -> Member | None:
        """Whose copies this member keeps."""
        return next((each for each in self.members if (kept := self.neighbour(each.node)) and kept.node == node), None)

    def handed_out(self) -> tuple[tuple[Member, Member], ...]:
        """Each of `memory`, with the member of this world that hands out its copies."""
        by = self.handed_by or tuple(member.node for member in self.memory)
        pairs = zip(self.memory, map(self.member, by), strict=True)
        return tuple((member, now) for member, now in pairs if now is not None)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a node says of one of its workers, for people to read."""

    rank: Rank
    pid: int
    phase: str
    step: Step
    step_age: float | None
    """Seconds since its last completed step, on its node's clock."""
    loss: float | None
    steps_per_second: float | None
    tokens: int | None
    """Of its last step, if the program counts them."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A copy of a rank's share that is being written, for people to read."""

    rank: Rank
    step: Step
    seconds: float
    """Since the copy was made."""
    written: int
    """Bytes, as far as is known."""
    size: int
    silent: float
    """Seconds since the last sign of progress."""


class FailureKind(StrEnum):
    """How a worker failed. Decides which budget pays for it."""

    KILLED = "killed"
    """By a signal: infrastructure, unless it happens again at the same step."""
    EXCEPTION = "exception"
    """An uncaught exception of the training code."""
    SURROUNDINGS = "surroundings"
    """An exception that comes of something around the training code: a file system, the network, a broken GPU."""
    COLLECTIVE = "collective"
    """A collective failed because a peer went: the consequence of another failure, never a cause."""
    EXIT = "exit"
    """A non-zero exit status without a word."""
    FENCED = "fenced"
    """Its node's lease ran out: the node was cut off or its agent stopped."""
    DAMAGED = "damaged"
    """The checkpoint it was to start from failed its verification there."""
    FORGOTTEN = "forgotten"
    """The copy of the state that was to be in its node's memory could not be had: the file system still has one."""
    UNREADABLE = "unreadable"
    """Its node could not read the checkpoint (an I/O error, a permission): that is the node's, not the checkpoint's."""
    STUCK = "stuck"
    """Did not go after SIGKILL (uninterruptible sleep)."""
    START = "start"
    """Could not be started at all: its node is short of memory or processes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of one worker's failure; `what` is the sentence an operator reads."""

    kind: FailureKind
    what: str
    step: Step
    where: str = ""
    """`file:line` of the user's innermost frame, where there is one."""
    tail: tuple[str, ...] = ()
    """The worker's last output lines."""

    def signature(self) -> tuple[str, str, str]:
        """Two failures with the same signature at the same step are the same bug."""
        return (self.kind, self.what, self.where)


class Reach(StrEnum):
    """What a second agent finds of a silent one."""

    ANSWERS = "answers"
    """It lives: only the way between it and the leader is broken. Its workers train on until their lease is over."""
    ENDED = "ended"
    """This incarnation has ended its workers, for good: nothing that a lease protects from is left."""
    SILENT = "silent"
    """Not for the second agent either."""


class Termination(StrEnum):
    """Why the run has to leave its allocation."""

    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    REQUEUED = "requeued"
    """Somebody else asked Slurm to requeue the job: it is going to happen whatever we do."""
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """How one start of a run ended."""

    FINISHED = "finished"
    REQUEUED = "requeued"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of one start: what every agent, the batch script and `hpcft status` report."""

    outcome: Outcome
    exit_code: int
    reason: str


# --- events: what the leader's loop is fed with ---


@dataclass(frozen=True, slots=True)
class TermBegan:
    """This agent leads. First event of every journal; `nodes` are those of the allocation."""

    run: RunId
    term: Term
    node: NodeId
    incarnation: Incarnation
    allocation: str
    nodes: tuple[NodeId, ...]
    takeover: bool
    """The previous term belonged to the same allocation and was not released: its leader is lost."""
    leaderless: float = 0.0
    """For how many seconds nobody had led."""


@dataclass(frozen=True, slots=True)
class CheckpointsFound:
    """The checkpoints this term may start from, oldest first: the lineage, as far as it is on disk."""

    checkpoints: tuple[CheckpointRef, ...]
    branch: str = ""
    """Why the newest is not the newest on disk: an operator's `--from`."""


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """An agent's first words. It says so only after the workers of its node's earlier lives are gone."""

    node: NodeId
    incarnation: Incarnation
    address: str
    workers: int
    port: int
    """Where it answers other agents."""


@dataclass(frozen=True, slots=True)
class NodeHeard:
    """A heartbeat that the leader had not seen yet."""

    node: NodeId
    incarnation: Incarnation
    generation: Generation
    sequence: int


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """The agent's connection is gone. Its workers may live on until its lease ends."""

    node: NodeId
    incarnation: Incarnation
    reason: str


@dataclass(frozen=True, slots=True)
class WorkersVanished:
    """The kernel closed the lifeline: no process that could train is left of this incarnation."""

    node: NodeId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class KeeperVanished:
    """The node line closed: pool and keeper are gone too, nobody will restart the agent."""

    node: NodeId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class PeerAnswered:
    """What `node` has found of a silent one; it may come twice, for who answers may end later."""

    node: NodeId
    suspect: NodeId
    incarnation: Incarnation
    """The suspect's."""
    found: Reach
    detail: str


@dataclass(frozen=True, slots=True)
class WorldAcknowledged:
    """The node has ended all workers of earlier generations and refuses every lower generation from now on."""

    node: NodeId
    incarnation: Incarnation
    term: Term
    generation: Generation


@dataclass(frozen=True, slots=True)
class WorldRefused:
    """The node had promised itself to a higher term or generation."""

    node: NodeId
    incarnation: Incarnation
    promised_term: Term
    promised_generation: Generation


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """The leader's claim on its term has reached the run directory (at a time after it was asked for)."""

    term: Term


@dataclass(frozen=True, slots=True)
class WorkersReady:
    """All workers of the node hold their state and may take their first step."""

    node: NodeId
    generation: Generation
    counts_steps: bool = True
    """False for plain commands: of their steps nothing is known, so they count as resumed when started."""
    total_steps: Step | None = None
    """How many steps the program means to make, if it said so."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """The lowest step completed by all workers of the node."""

    node: NodeId
    generation: Generation
    step: Step
    loss: float | None


@dataclass(frozen=True, slots=True)
class NodeReported:
    """The state of a node's workers, about once a second. Nothing is decided by it."""

    node: NodeId
    generation: Generation
    workers: tuple[WorkerReport, ...]
    saves: tuple[SaveReport, ...] = ()
    reserved: int = 0
    """Bytes of shared memory that the node holds for copies of the state."""
    low_memory: str = ""
    """Why there is less of it than there should be."""


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    node: NodeId
    incarnation: Incarnation
    generation: Generation
    rank: Rank
    failure: Failure


@dataclass(frozen=True, slots=True)
class WorkerReturned:
    """The training function of this rank returned (or its command exited with 0), after `step` steps."""

    node: NodeId
    generation: Generation
    rank: Rank
    step: Step


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """The rank ended as ordered, after its part of the last checkpoint."""

    node: NodeId
    generation: Generation
    rank: Rank


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """All ranks of the node have copied, or written, their shares of this step: it will not come again."""

    node: NodeId
    generation: Generation
    step: Step
    in_memory: bool = True
    """The copies are there, and sealed by their digests."""
    digests: tuple[tuple[Rank, str], ...] = ()
    """Of each rank's copy."""
    replicas: tuple[tuple[Rank, Rank, str], ...] = ()
    """What a rank holds of what another one copied: the first rank's word on the second one's share."""
    blocked: float = 0.0
    """For how many seconds training stood still: the longest of the ranks' own words. 0: these copies are written as
    well, and their commit says it."""


@dataclass(frozen=True, slots=True)
class CopiesMeasured:
    """All nodes have copies of these steps that are not written: for how many seconds each stopped training."""

    generation: Generation
    copies: tuple[tuple[Step, float], ...]


@dataclass(frozen=True, slots=True)
class CopiesKept:
    """The node has all copies of this step that its neighbour `of` has made, byte by byte what was sealed."""

    node: NodeId
    generation: Generation
    step: Step
    of: NodeId


@dataclass(frozen=True, slots=True)
class CopiesAlone:
    """The node's copies of this step are in its own memory only: its neighbour could not take them."""

    node: NodeId
    generation: Generation
    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotDoubtful:
    """The copies of this step are not what they should be; the sentence says what is wrong with them."""

    generation: Generation
    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotDropped:
    """The node does not have copies of this step of all its ranks, and will not: one could not be made."""

    node: NodeId
    generation: Generation
    step: Step


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    checkpoint: CheckpointRef
    seconds: float
    """The commit itself: manifest and rename."""
    size: int
    blocked: float = 0.0
    """For how long training stood still: the longest of the ranks' own words; 0: nobody has measured it."""
    lag: float = 0.0
    """From the moment the first rank began to save until the commit was durable, on the leader's clock."""


@dataclass(frozen=True, slots=True)
class CheckpointVerified:
    """The leader has read a committed checkpoint back, byte by byte."""

    checkpoint: CheckpointRef
    damage: str = ""
    """What it found; empty: all of it is what was written."""


@dataclass(frozen=True, slots=True)
class CheckpointsRetired:
    """Retention, or an operator, has deleted these."""

    checkpoints: tuple[CheckpointRef, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """A save that did not become a checkpoint. Training goes on."""

    step: Step
    generation: Generation
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointSkipped:
    """A save that was left out: the copies of earlier ones were still being written. Training was not to wait."""

    step: Step
    generation: Generation
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointDamaged:
    """The leader has read it itself: it is not what was committed, and it was set aside."""

    checkpoint: CheckpointRef
    detail: str


@dataclass(frozen=True, slots=True)
class CheckpointKept:
    """The leader did not find the damage that a rank has reported: the trouble is that rank's node's."""

    checkpoint: CheckpointRef
    why: str


@dataclass(frozen=True, slots=True)
class TerminationAsked:
    why: Termination
    seconds_left: float
    """How long the workers may still take; the agents need a little time after them."""
    detail: str = ""
    """Why now, where that was reckoned."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """An operator's command."""

    by: str


@dataclass(frozen=True, slots=True)
class RequeueAccepted:
    """Slurm took the requeue: it ends this start within KillWait."""


@dataclass(frozen=True, slots=True)
class RequeueRefused:
    """Slurm did not take the requeue."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time went by."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What the policy made of an event, with its sentence."""

    actions: tuple[Action, ...]
    reason: str


# --- actions: what a decision asks the edges to do ---


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask all nodes to end their workers and to promise themselves to this world."""

    formation: Formation
    action: Literal["propose"] = "propose"


@dataclass(frozen=True, slots=True)
class Commit:
    """Acknowledged by all members and a quorum: workers may start."""

    generation: Generation
    action: Literal["commit"] = "commit"


@dataclass(frozen=True, slots=True)
class AskPeer:
    """Let `peer` see whether it can reach a silent node."""

    suspect: NodeId
    incarnation: Incarnation
    peer: NodeId
    action: Literal["ask-peer"] = "ask-peer"


@dataclass(frozen=True, slots=True)
class Evict:
    """Forget the node's incarnation and close its stream: its workers have ended, or its lease is over."""

    node: NodeId
    incarnation: Incarnation
    action: Literal["evict"] = "evict"


@dataclass(frozen=True, slots=True)
class SaveAndStop:
    """Let every rank save at the same near step and stop there."""

    generation: Generation
    action: Literal["save-and-stop"] = "save-and-stop"


@dataclass(frozen=True, slots=True)
class PersistCopies:
    """Write a state that is in memory, without any worker: it becomes a checkpoint. `handed_by` as in `Formation`."""

    snapshot: CheckpointRef
    members: tuple[Member, ...]
    handed_by: tuple[NodeId, ...]
    action: Literal["persist-copies"] = "persist-copies"


@dataclass(frozen=True, slots=True)
class HaltWorkers:
    """End the workers of a generation that will not be followed by another: TERM, grace, KILL."""

    generation: Generation
    action: Literal["halt"] = "halt"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Read a checkpoint that a rank found damaged; if it is, rename it aside, so that it is never offered again."""

    checkpoint: CheckpointRef
    detail: str
    action: Literal["quarantine"] = "quarantine"


@dataclass(frozen=True, slots=True)
class Requeue:
    """Give the job back to Slurm's queue."""

    reason: str
    action: Literal["requeue"] = "requeue"


@dataclass(frozen=True, slots=True)
class Conclude:
    """Write the verdict, release the term, let all agents end with its exit code."""

    verdict: Verdict
    action: Literal["conclude"] = "conclude"


Action: TypeAlias = (
    Propose | Commit | AskPeer | Evict | SaveAndStop | PersistCopies | HaltWorkers | Quarantine | Requeue | Conclude
)

Event: TypeAlias = (
    TermBegan
    | CheckpointsFound
    | NodeJoined
    | NodeHeard
    | StreamClosed
    | WorkersVanished
    | KeeperVanished
    | PeerAnswered
    | WorldAcknowledged
    | WorldRefused
    | LeaseRenewed
    | WorkersReady
    | Progressed
    | NodeReported
    | WorkerFailed
    | WorkerReturned
    | WorkerStopped
    | SnapshotTaken
    | CopiesMeasured
    | CopiesKept
    | CopiesAlone
    | SnapshotDoubtful
    | SnapshotDropped
    | CheckpointCommitted
    | CheckpointVerified
    | CheckpointsRetired
    | CheckpointFailed
    | CheckpointSkipped
    | CheckpointDamaged
    | CheckpointKept
    | TerminationAsked
    | StopAsked
    | RequeueAccepted
    | RequeueRefused
    | Ticked
    | Decided
)

# --- orders: what the leader sends to an agent ---


@dataclass(frozen=True, slots=True)
class Prepare:
    formation: Formation


@dataclass(frozen=True, slots=True)
class Start:
    term: Term
    generation: Generation


@dataclass(frozen=True, slots=True)
class Confirm:
    """The heartbeat `sequence` was read: the lease runs from the moment it was sent."""

    term: Term
    sequence: int


@dataclass(frozen=True, slots=True)
class Probe:
    """See whether a node that the leader does not hear answers you."""

    term: Term
    suspect: NodeId
    incarnation: Incarnation
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class OrderSave:
    term: Term
    generation: Generation
    step: Step
    stop: bool
    in_memory: bool = False
    """Only a copy is wanted. Who comes too late for it has none, and it is of no use to anybody."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Every member has sealed its copies of this step: keep them, and older ones no longer."""

    term: Term
    generation: Generation
    step: Step


@dataclass(frozen=True, slots=True)
class Forget:
    """Not all ranks have a copy of this step, so nothing can be started from those that have."""

    term: Term
    generation: Generation
    step: Step
    written: bool = False
    """All have saved it all the same: what is being written becomes a checkpoint, and is of use until then."""


@dataclass(frozen=True, slots=True)
class Persist:
    """Write the copies of this state that you hand out (`handed_by`, one for each of `members`)."""

    term: Term
    snapshot: CheckpointRef
    members: tuple[Member, ...]
    handed_by: tuple[NodeId, ...]
    nonce: str
    """Of the attempt: what is there of another one, written or being written, is of no use."""


@dataclass(frozen=True, slots=True)
class Halt:
    term: Term
    generation: Generation


@dataclass(frozen=True, slots=True)
class End:
    """The verdict; the agent ends its workers and itself."""

    term: Term
    verdict: Verdict


Order: TypeAlias = Prepare | Start | Confirm | Probe | OrderSave | Keep | Forget | Persist | Halt | End
