"""Transcripts of a run's life through the pure core: tests/scenarios/*.txt.

A transcript reads from top to bottom. `at SECONDS something happens` is an event; time passes in ticks of 0.1 s, in
which every node that is not silent sends its heartbeat. `=> actions: sentence` is a decision, exactly as an operator
sees it, `=> SECONDS actions: sentence` one that came with the time. `== something` is how the world then looks.
Every decision must be listed. HPCFT_REWRITE_SCENARIOS=1 writes what happens now: read the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hpcft import events as ev
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.membership import Timing
from hpcft.policy import Rules, decide
from hpcft.transitions import apply
from hpcft.world import Budget, World

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))
TICK = 0.1
WHY = {each.value: each for each in ev.Termination}


class Stage:
    """A leader that is told what happens, and nothing else."""

    def __init__(self) -> None:
        self.world = World()
        self.rules = Rules(
            timing=Timing(0.5, 2.0, 5.0),
            minimum_nodes=1,
            budgets=((Budget.INFRASTRUCTURE, 20), (Budget.USER_CODE, 5), (Budget.PREEMPTION, 100)),
        )
        self.now = 0.0
        self.term = 0
        self.lives: dict[str, int] = {}
        self.silent: set[str] = set()
        self.decided: list[str] = []

    # --- time and events ---

    def advance(self, to: float) -> None:
        while round(self.now + TICK, 6) < to:
            self.now = round(self.now + TICK, 6)
            for node in self.world.nodes:
                if node.id not in self.silent and node.connected:
                    self.world = apply(self.world, ev.NodeHeard(node.id, node.incarnation, Generation(0), 0), self.now)
            self.feed(ev.Ticked(), f"{self.now:.1f} ")
        self.now = max(self.now, to)

    def feed(self, event: ev.Event, when: str = "") -> None:
        self.world = apply(self.world, event, self.now)
        for _ in range(20):
            decided = decide(self.world, self.rules, self.now)
            if not decided.actions:
                return
            self.decided.append(f"=> {when}{line(decided)}")
            self.world = apply(self.world, decided, self.now)
        raise AssertionError(f"the policy does not settle: {decided.reason}")

    @property
    def generation(self) -> Generation:
        return self.world.formation.generation if self.world.formation is not None else Generation(0)

    @property
    def suspected(self) -> ev.CheckpointRef:
        assert self.world.suspected is not None
        return self.world.suspected

    def life(self, node: str) -> Incarnation:
        return Incarnation(f"{node}/{self.lives.get(node, 1)}")

    def members(self) -> list[NodeId]:
        return [member.node for member in self.world.formation.members] if self.world.formation else []

    def happens(self, text: str) -> None:
        for pattern, action in EVENTS:
            if match := re.fullmatch(pattern, text):
                action(self, *match.groups(default=""))
                return
        raise AssertionError(f"nothing that can happen: {text!r}")

    # --- what can happen ---

    def leads(self, node: str, allocation: str, nodes: str, takeover: str, checkpoints: str, branch: str) -> None:
        self.term += 1
        self.silent.clear()
        named = tuple(NodeId(each) for each in nodes.split())
        began = ev.TermBegan(
            RunId("r"), Term(self.term), NodeId(node), self.life(node), allocation, named, bool(takeover)
        )
        self.feed(began)
        found = [each.split("/g") for each in checkpoints.split()]
        refs = tuple(ev.CheckpointRef(Step(int(step)), Generation(int(generation))) for step, generation in found)
        self.feed(ev.CheckpointsFound(refs or self.world.checkpoints, branch))

    def joins(self, node: str, again: str, workers: str) -> None:
        if again:
            self.lives[node] = self.lives.get(node, 1) + 1
        self.silent.discard(node)
        self.feed(ev.NodeJoined(NodeId(node), self.life(node), "10.0.0.1", int(workers), 7000))

    def acknowledges(self, who: str) -> None:
        for node in [known.id for known in self.world.nodes] if who == "all" else [NodeId(who)]:
            self.feed(ev.WorldAcknowledged(node, self.life(node), Term(self.term), self.generation))

    def ready(self, who: str) -> None:
        for node in self.members() if who == "all" else [NodeId(who)]:
            self.feed(ev.WorkersReady(node, self.generation))

    def at_step(self, who: str, step: str) -> None:
        for node in self.members() if who == "all" else [NodeId(who)]:
            self.feed(ev.Progressed(node, self.generation, Step(int(step)), None))

    def fails(
        self, rank: str, node: str, kind: ev.FailureKind, what: str, where: str, step: str, generation: str = ""
    ) -> None:
        failure = ev.Failure(kind, what, Step(int(step)), where)
        of = Generation(int(generation)) if generation else self.generation
        self.feed(ev.WorkerFailed(NodeId(node), self.life(node), of, Rank(int(rank)), failure))

    def finds(self, peer: str, suspect: str, found: str, detail: str = "") -> None:
        self.feed(ev.PeerAnswered(NodeId(peer), NodeId(suspect), self.life(suspect), ev.Reach(found), detail))

    def copied(self, who: str, step: str) -> None:
        for node in self.members() if who == "all" else [NodeId(who)]:
            self.feed(ev.SnapshotTaken(node, self.generation, Step(int(step))))

    def persisted(self, step: int) -> ev.CheckpointRef:
        assert self.world.persisting is not None and self.world.persisting.snapshot.step == step
        return self.world.persisting.snapshot

    def ends(self, who: str, how: str, step: str) -> None:
        assert self.world.formation is not None
        for member in self.world.formation.members:
            for rank in member.ranks():
                if who in ("all ranks", f"rank {rank}"):
                    if how == "return":
                        self.feed(ev.WorkerReturned(member.node, self.generation, Rank(rank), Step(int(step))))
                    else:
                        self.feed(ev.WorkerStopped(member.node, self.generation, Rank(rank)))


def rules(stage: Stage, text: str) -> None:
    known = {field.name: field.type for field in fields(Rules)}
    changes: dict[str, object] = {}
    for name, value in (each.split("=") for each in text.split()):
        budget = next((each for each in Budget if each.value.replace(" ", "_") == name), None)
        if budget is not None:
            changes["budgets"] = tuple((b, int(value) if b is budget else n) for b, n in stage.rules.budgets)
        else:
            changes[name] = value == "yes" if known[name] == "bool" else float(value)
    stage.rules = replace(stage.rules, **changes)  # type: ignore[arg-type]


def committed(stage: Stage, step: str) -> None:
    stage.feed(ev.CheckpointCommitted(ev.CheckpointRef(Step(int(step)), stage.generation), 0.5, 1 << 20))


NODE, NUMBER = r"(node\d+)", r"(\d+)"
OLD = r"(?: of generation (\d+))?"
EVENTS: list[tuple[str, Callable[..., None]]] = [
    (
        rf"{NODE} leads (\S+) on ([\w ]+?)( after its leader was lost)?"
        r"(?: with checkpoints ([\d/g ]+?)( as asked for)?)?",
        Stage.leads,
    ),
    (rf"{NODE} joins( again)? with {NUMBER} workers?", Stage.joins),
    (r"(node\d+|all) acknowledges?", Stage.acknowledges),
    (
        rf"{NODE} refuses, it has promised generation {NUMBER}",
        lambda s, node, g: s.feed(ev.WorldRefused(NodeId(node), s.life(node), Term(s.term), Generation(int(g)))),
    ),
    (r"the term is renewed", lambda s: s.feed(ev.LeaseRenewed(Term(s.term)))),
    (r"(node\d+|all) (?:is|are) ready", Stage.ready),
    (rf"(node\d+|all) (?:is|are) at step {NUMBER}", Stage.at_step),
    (
        rf"rank {NUMBER} on {NODE} is (killed by \w+) at step {NUMBER}{OLD}",
        lambda s, rank, node, what, step, old: s.fails(rank, node, ev.FailureKind.KILLED, what, "", step, old),
    ),
    (
        rf"rank {NUMBER} on {NODE} raises (.+) at (\S+:\d+), step {NUMBER}{OLD}",
        lambda s, rank, node, what, where, step, old: s.fails(
            rank, node, ev.FailureKind.EXCEPTION, what, where, step, old
        ),
    ),
    (
        rf"rank {NUMBER} on {NODE} meets (.+) at (\S+:\d+), step {NUMBER}{OLD}",
        lambda s, rank, node, what, where, step, old: s.fails(
            rank, node, ev.FailureKind.SURROUNDINGS, what, where, step, old
        ),
    ),
    (
        rf"rank {NUMBER} on {NODE} loses its peers at step {NUMBER}{OLD}",
        lambda s, rank, node, step, old: s.fails(
            rank, node, ev.FailureKind.COLLECTIVE, "connection closed by peer", "", step, old
        ),
    ),
    (
        rf"rank {NUMBER} on {NODE} finds its checkpoint damaged: (.+)",
        lambda s, rank, node, what: s.fails(rank, node, ev.FailureKind.DAMAGED, what, "", "0"),
    ),
    (
        rf"rank {NUMBER} on {NODE} cannot read its checkpoint: (.+)",
        lambda s, rank, node, what: s.fails(rank, node, ev.FailureKind.UNREADABLE, what, "", "0"),
    ),
    (r"the leader finds it damaged: (.+)", lambda s, what: s.feed(ev.CheckpointDamaged(s.suspected, what))),
    (r"the leader keeps it: (.+)", lambda s, why: s.feed(ev.CheckpointKept(s.suspected, why))),
    (rf"(all ranks|rank \d+) (return)s? after step {NUMBER}", Stage.ends),
    (rf"(all ranks|rank \d+) (stop)s? at step {NUMBER}", Stage.ends),
    (
        rf"rank {NUMBER} on {NODE} cannot be started: (.+)",
        lambda s, rank, node, what: s.fails(rank, node, ev.FailureKind.START, what, "", "0"),
    ),
    (rf"{NODE} falls silent", lambda s, node: s.silent.add(node)),
    (rf"{NODE} speaks again", lambda s, node: s.silent.discard(node)),
    (
        rf"{NODE} disconnects",
        lambda s, node: s.feed(ev.StreamClosed(NodeId(node), s.life(node), "connection reset")),
    ),
    (rf"{NODE} finds that {NODE} (answers|ended)", Stage.finds),
    (rf"{NODE} does not reach {NODE}: (.+)", lambda s, peer, node, why: s.finds(peer, node, "silent", why)),
    (rf"no worker of {NODE} is left", lambda s, node: s.feed(ev.WorkersVanished(NodeId(node), s.life(node)))),
    (rf"the keeper of {NODE} is gone", lambda s, node: s.feed(ev.KeeperVanished(NodeId(node), s.life(node)))),
    (rf"the checkpoint of step {NUMBER} is committed", committed),
    (r"(node\d+|all) (?:has|have) copies of step (\d+)", Stage.copied),
    (
        rf"{NODE} keeps those of {NODE} of step {NUMBER}",
        lambda s, keeper, of, step: s.feed(ev.CopiesKept(NodeId(keeper), s.generation, Step(int(step)), NodeId(of))),
    ),
    (
        rf"the copy of step {NUMBER} is committed",
        lambda s, step: s.feed(ev.CheckpointCommitted(s.persisted(int(step)), 0.5, 1 << 20)),
    ),
    (
        rf"the copy of step {NUMBER} cannot be written: (.+)",
        lambda s, step, why: s.feed(ev.CheckpointFailed(Step(int(step)), s.persisted(int(step)).generation, why)),
    ),
    (
        rf"the checkpoint of step {NUMBER} fails: (.+)",
        lambda s, step, why: s.feed(ev.CheckpointFailed(Step(int(step)), s.generation, why)),
    ),
    (
        rf"Slurm says (time limit|preempted|requeued|cancelled), {NUMBER} s left(?:; (.+))?",
        lambda s, why, left, detail: s.feed(ev.TerminationAsked(WHY[why], float(left), detail or "")),
    ),
    (r"(\w+) stops the run", lambda s, by: s.feed(ev.StopAsked(by))),
    (r"Slurm accepts the requeue", lambda s: s.feed(ev.RequeueAccepted())),
    (r"Slurm refuses the requeue: (.+)", lambda s, why: s.feed(ev.RequeueRefused(why))),
    (r"nothing else happened", lambda s: s.feed(ev.Ticked())),
]


def line(decided: ev.Decided) -> str:
    return f"{', '.join(dict.fromkeys(action.action for action in decided.actions))}: {decided.reason}"


def look(stage: Stage, about: str) -> str:
    """How the world looks, as a line of the transcript says it."""
    world = stage.world
    match about.split():
        case ["incident", number]:
            found = world.incidents[int(number) - 1]
            if found.downtime is None:
                return f"== incident {number}: {found.cause}, {found.culprit}; not over"
            lost = "" if found.steps_lost is None else f", {found.steps_lost} steps lost"
            return f"== incident {number}: {found.cause}, {found.culprit}; {found.downtime:.1f} s down{lost}"
        case ["members"]:
            members = world.formation.members if world.formation else ()
            ranks = ", ".join(f"{each.node} has {min(each.ranks())}-{max(each.ranks())}" for each in members)
            return f"== members: {ranks}"
        case ["spares"]:
            spares = [node.id for node in world.nodes if node.id not in stage.members()]
            return f"== spares: {', '.join(spares) or 'none'}"
        case ["verdict"]:
            verdict = world.verdict
            return (
                f"== verdict: {verdict.outcome} with exit code {verdict.exit_code}" if verdict else "== verdict: none"
            )
        case ["spent"]:
            spent = ", ".join(f"{sum(s.budget is b for s in world.spent)} {b}" for b in Budget)
            return f"== spent: {spent}"
    raise AssertionError(f"nothing to look at: {about!r}")


def play(text: str) -> str:
    """The transcript as it happens now."""
    stage = Stage()
    out: list[str] = []
    for written in text.splitlines():
        if written.startswith("=>"):
            continue
        if written.startswith("rules "):
            rules(stage, written.removeprefix("rules "))
        elif happening := re.fullmatch(r"at (\d+(?:\.\d+)?) (.+)", written):
            stage.advance(float(happening[1]))
            out += stage.decided
            stage.decided = []
            stage.happens(happening[2])
        elif written.startswith("== "):
            out.append(look(stage, written.removeprefix("== ").partition(":")[0]))
            continue
        elif written and not written.startswith("#"):
            raise AssertionError(f"not a line of a transcript: {written!r}")
        out += [written, *stage.decided]
        stage.decided = []
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_what_is_decided_and_why(path: Path) -> None:
    written = path.read_text()
    happened = play(written)
    if os.environ.get("HPCFT_REWRITE_SCENARIOS"):
        path.write_text(happened)
    assert happened == written


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 15
