"""What `hpcft status` says in every state a run can be in: worlds made by events and the policy, and real files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest

from hpcft import durable, status
from hpcft.cadence import SaveRules
from hpcft.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    CheckpointsFound,
    Conclude,
    Decided,
    Event,
    Failure,
    FailureKind,
    NodeHeard,
    NodeJoined,
    NodeReported,
    Outcome,
    Progressed,
    RequeueAccepted,
    StreamClosed,
    TermBegan,
    Termination,
    TerminationAsked,
    Ticked,
    Verdict,
    WorkerFailed,
    WorkerReport,
    WorkerReturned,
    WorkersReady,
    WorkerStopped,
    WorldAcknowledged,
)
from hpcft.ids import Generation, Incarnation, NodeId, Rank, RunId, Step, Term
from hpcft.journal import Journal, replay
from hpcft.membership import Timing
from hpcft.mirror.plan import Progress
from hpcft.policy import Rules, decide
from hpcft.rundir import RunDirectory
from hpcft.transitions import apply
from hpcft.units import Auto
from hpcft.world import Budget, World

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs" / "status.schema.json").read_text())
COLUMNS = 100
RULES = Rules(
    timing=Timing(0.5, 2.0, 5.0),
    minimum_nodes=1,
    budgets=((Budget.INFRASTRUCTURE, 20), (Budget.USER_CODE, 5), (Budget.PREEMPTION, 100)),
    backoff=0.0,
)


@dataclass
class Scene:
    """A run whose leader sees one event after the other, and whose policy answers."""

    names: tuple[str, ...] = ("node1", "node2")
    workers: int = 2
    rules: Rules = RULES
    world: World = field(default_factory=World)
    now: float = 0.0
    history: list[tuple[float, Event]] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(NodeId(name) for name in self.names)

    @property
    def generation(self) -> Generation:
        return self.world.generation

    def see(self, *events: Event, after: float = 0.0) -> Scene:
        self.now += after
        for event in events:
            self._take(event)
            while (decided := decide(self.world, self.rules, self.now)).actions:
                self._take(decided)
        return self

    def _take(self, event: Event) -> None:
        self.history.append((self.now, event))
        self.world = apply(self.world, event, self.now)

    def begin(self, allocation: str = "42.0") -> Scene:
        term = Term(self.world.term + 1)
        began = TermBegan(
            RunId("0123456789abcdef"), term, self.nodes[0], _life(self.nodes[0]), allocation, self.nodes, False
        )
        return self.see(began, CheckpointsFound(self.world.checkpoints))

    def join(self, *nodes: NodeId) -> Scene:
        return self.see(
            *(NodeJoined(node, _life(node), "10.0.0.1", self.workers, 7000) for node in nodes or self.nodes), after=0.5
        )

    def acknowledge(self) -> Scene:
        formation = self.world.formation
        assert formation is not None
        return self.see(
            *(
                WorldAcknowledged(each.node, each.incarnation, formation.term, formation.generation)
                for each in formation.members
            ),
            after=0.1,
        )

    def train(self, step: int, seconds: float = 1.0) -> Scene:
        """All workers get ready if they are not, and complete `step`."""
        formation = self.world.formation
        assert formation is not None
        nodes = [each.node for each in formation.members]
        self.see(*(WorkersReady(node, self.generation, total_steps=Step(300)) for node in nodes), after=0.2)
        self.now += seconds
        for each in formation.members:
            reports = tuple(
                WorkerReport(Rank(rank), 1000 + rank, "train", Step(step), 0.01, 2.5, 12.3, 512)
                for rank in each.ranks()
            )
            self.see(
                NodeHeard(each.node, each.incarnation, self.generation, step),
                Progressed(each.node, self.generation, Step(step), 2.5),
                NodeReported(each.node, self.generation, reports),
            )
        return self

    def training(self, step: int = 50) -> Scene:
        return self.begin().join().acknowledge().train(step)

    def commit(self, step: int) -> Scene:
        return self.see(CheckpointCommitted(CheckpointRef(Step(step), self.generation), 0.1, 1000))

    def fail(self, rank: int, failure: Failure) -> Scene:
        node = self.nodes[rank // self.workers]
        return self.see(WorkerFailed(node, _life(node), self.generation, Rank(rank), failure), after=0.3)

    def finish(self, step: int) -> Scene:
        formation = self.world.formation
        assert formation is not None
        self.train(step).commit(step)
        return self.see(
            *(
                WorkerReturned(each.node, self.generation, Rank(rank), Step(step))
                for each in formation.members
                for rank in each.ranks()
            )
        )

    def shown(self, directory: Path) -> tuple[dict[str, Any], str]:
        """As the command would read it, after the leader wrote it; checked against the schema."""
        run = RunDirectory(directory / "demo")
        run.prepare()
        durable.replace(run.status, orjson.dumps(status.snapshot(self.world, self.rules, self.now)))
        found = status.read(run)
        conforms(found)
        text = status.render(found, COLUMNS)
        assert max(map(len, text.splitlines())) <= COLUMNS
        return found, text


def _life(node: NodeId) -> Incarnation:
    return Incarnation(f"life-of-{node}")


def conforms(found: object) -> None:
    plain = json.loads(json.dumps(found))  # as a reader in any language gets it
    jsonschema.Draft202012Validator(SCHEMA).validate(plain)


def killed(step: int) -> Failure:
    return Failure(FailureKind.KILLED, "SIGKILL", Step(step), tail=("the last line",))


def test_of_a_leader_that_is_silent_nothing_is_said_that_passes_with_time() -> None:
    seen = status.snapshot(Scene().begin().join().acknowledge().train(10).train(20).world, RULES, 9.0)
    alive, silent = (status.render({**seen, "live": live, "age_seconds": 40.0}) for live in (True, False))
    assert "done in" in alive and " 0.0 s" not in silent and "done in" not in silent
    assert "leader has been silent for 40" in silent


def test_a_branch_that_came_to_nothing_has_left_nothing_behind() -> None:
    def listed() -> list[int]:
        return [each["step"] for each in status.snapshot(scene.world, RULES, scene.now)["checkpoints"]]

    old = [CheckpointRef(Step(step), Generation(1)) for step in (10, 20, 30)]
    scene = Scene().begin().see(CheckpointsFound(tuple(old)), CheckpointsFound(tuple(old[:2]), "--from 20 of job 42"))
    assert listed() == [10, 20]
    failed = Verdict(Outcome.FAILED, 16, "the checkpoint of step 20 is damaged")
    scene.see(Decided((Conclude(failed),), "damaged"))
    assert listed() == [10, 20, 30]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    found, _ = Scene().training().shown(tmp_path)
    for spoilt in (
        {**found, "colour": "blue"},
        {key: value for key, value in found.items() if key != "goodput"},
        {**found, "state": "fine"},
        {**found, "workers": [{**found["workers"][0], "step": -1}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            conforms(spoilt)


def test_not_started(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "demo")
    identity = run.prepare()
    found = status.read(run)
    conforms(found)
    assert (found["name"], found["run"], found["state"]) == ("demo", identity, "not started")
    assert status.render(found, COLUMNS) == "demo: not started"


def test_gathering(tmp_path: Path) -> None:
    found, text = Scene().begin().join(NodeId("node1")).shown(tmp_path)
    assert (found["state"], found["live"], found["goodput"]) == ("gathering", True, 0.0)
    assert "node1" in text
    assert "spare" in text


def test_forming_and_starting(tmp_path: Path) -> None:
    scene = Scene().begin().join()
    found, text = scene.shown(tmp_path)
    assert found["state"] == "forming"
    assert "generation 1 with 2 nodes and 4 ranks, from the beginning" in text
    assert found["restored"] is None
    found, text = scene.acknowledge().shown(tmp_path)
    assert found["state"] == "starting"
    assert "3 (starting)" in text


def test_training(tmp_path: Path) -> None:
    found, text = Scene().training(50).commit(40).shown(tmp_path)
    assert (found["state"], found["step"], found["world_size"]) == ("training", 50, 4)
    assert found["steps_per_second"] == pytest.approx(50 / 1.0)
    assert found["eta_seconds"] == pytest.approx(5.0)
    assert found["tokens_per_second"] == pytest.approx(4 * 512 * 50)
    assert found["goodput"] == pytest.approx(1.0 / 1.8)
    assert "50 of 300, 50.0 steps/s, 102400 tokens/s, done in 5s" in text
    assert "4 ranks on 2 nodes, generation 1, start 1, leader node1" in text
    assert "checkpoints 40" in text
    assert "infrastructure 0/20, user code 0/5, preemption 0/100" in text
    node2 = next(line for line in text.splitlines() if line.startswith("  node2"))
    assert node2.split()[1] == "member"
    assert "2 (50, 12.3)  3 (50, 12.3)" in node2


def test_how_often_is_saved_and_why(tmp_path: Path) -> None:
    auto = replace(RULES, saving=SaveRules(Auto(), mtbf=3600.0, shortest=1.0))
    scene = Scene(rules=auto).training(50)
    found, text = scene.shown(tmp_path)
    assert found["cadence"]["every"] == "auto" and found["cadence"]["expected_loss"] is None
    assert "saves       every 1m 00s; what a save costs has not been measured yet" in text
    done = CheckpointCommitted(CheckpointRef(Step(40), scene.generation), 0.1, 1000, blocked=2.0, lag=5.0)
    found, text = scene.see(done, after=1.0).shown(tmp_path)
    cadence = found["cadence"]
    assert (cadence["blocked_seconds"], cadence["durable_seconds"], cadence["saves"]) == (2.0, 5.0, 1)
    assert cadence["interval_seconds"] == pytest.approx(120.7, abs=0.2)
    assert " ".join(text.split()).count(cadence["reason"]) == 1
    found, text = Scene().training(50).shown(tmp_path)
    assert "saves       no checkpoint is made before the end, as configured" in text
    assert (found["cadence"]["every"], found["cadence"]["interval_seconds"]) == ("off", None)
    found, text = Scene(rules=replace(RULES, saves=False)).training(50).shown(tmp_path)
    assert found["cadence"] is None and "  saves" not in text


def test_tokens_are_counted_when_all_ranks_have_reported(tmp_path: Path) -> None:
    scene = Scene().training(50)
    first, second = scene.world.reports
    scene.world = replace(scene.world, reports=(first, replace(second, workers=second.workers[:1])))
    found, text = scene.shown(tmp_path)
    assert found["tokens_per_second"] is None and "tokens" not in text
    none = tuple(
        replace(each, workers=tuple(replace(worker, tokens=0) for worker in each.workers)) for each in (first, second)
    )
    scene.world = replace(scene.world, reports=none)
    found, text = scene.shown(tmp_path)
    assert found["tokens_per_second"] is None and "tokens" not in text


def test_of_a_plain_command_no_steps_are_shown(tmp_path: Path) -> None:
    found, text = Scene(rules=replace(RULES, saves=False)).training(0).shown(tmp_path)
    assert found["plain_command"] is True
    for word in ("step", "checkpoints", "goodput", "(0"):
        assert word not in text, text
    assert next(line for line in text.splitlines() if line.startswith("  node2")).endswith("  2  3")


def test_of_a_plain_command_the_last_line_is_all_that_is_known_of_its_failure(tmp_path: Path) -> None:
    bug = Failure(FailureKind.EXIT, "exit status 1", Step(0), tail=("Traceback:", "ValueError: odd"))
    scene = Scene(rules=replace(RULES, saves=False)).training(0).fail(1, bug)
    _, text = scene.shown(tmp_path)
    assert "#1 worker failed: rank 1 on node1: exit status 1" in text
    assert "its last line: ValueError: odd" in text


def test_incidents_that_are_not_shown_are_counted() -> None:
    scene = Scene().training(50).commit(40).fail(1, killed(50))
    (incident,) = scene.world.incidents
    many = tuple(replace(incident, number=number) for number in range(1, 8))
    snapshot = status.snapshot(replace(scene.world, incidents=many), RULES, scene.now)
    text = status.render(snapshot, COLUMNS)
    assert "INCIDENTS (2 earlier: hpcft status --json)" in text
    assert "#2 " not in text and "#3 " in text and "#7 " in text


def test_what_an_earlier_version_left_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    scene = Scene().training(50).commit(40).fail(1, killed(50)).acknowledge().train(41, seconds=0.4)
    snapshot, _ = scene.shown(tmp_path)
    for added in ("seconds", "plain_command", "cadence"):
        del snapshot[added]
    for incident in snapshot["incidents"]:
        del incident["times"]
    durable.replace(RunDirectory(tmp_path / "demo").status, orjson.dumps(snapshot))
    text = status.render(status.read(RunDirectory(tmp_path / "demo")), COLUMNS)
    assert re.search(r"goodput     \d+\.\d% of [\d.]+m?s$", text, re.MULTILINE), text
    assert "#1 worker failed: rank 1 on node1: SIGKILL (0.70 s down, 10 steps lost)" in text


def test_an_incident_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    scene = Scene().training(50).commit(40).fail(1, killed(50))
    found, text = scene.shown(tmp_path)
    assert found["state"] == "recovering"
    assert "#1 worker failed: rank 1 on node1: SIGKILL (not over yet)" in text
    scene.acknowledge().train(41, seconds=0.4)
    found, text = scene.shown(tmp_path)
    assert found["state"] == "training"
    assert found["restored"] == {"step": 40, "generation": 1, "memory": False}
    (incident,) = found["incidents"]
    assert incident["cause"] == "worker failed"
    assert incident["culprit"] == "rank 1 on node1: SIGKILL"
    assert incident["decision"] == "generation 2 with 2 nodes and 4 ranks, from the checkpoint of step 40"
    assert incident["reason"] == f"rank 1 on node1 failed (SIGKILL): {incident['decision']}"
    assert incident["downtime_seconds"] == pytest.approx(0.7)
    assert (incident["steps_lost"], incident["budget"], incident["last_output"]) == (
        10,
        "infrastructure",
        ["the last line"],
    )
    assert "(0.70 s down, 10 steps lost)" in text
    assert "infrastructure 1/20" in text


def test_an_exceptions_words_do_not_hide_what_was_done_nor_how_long_it_took(tmp_path: Path) -> None:
    words = "ValueError: shape: expected (32, 64): got (32, 63)\nthe batch is odd; " + "and so on " * 12
    bug = Failure(FailureKind.EXCEPTION, words, Step(50), where="train.py:17")
    scene = Scene().training(50).commit(40).fail(2, bug).acknowledge().train(41)
    found, text = scene.shown(tmp_path)
    (incident,) = found["incidents"]
    assert incident["decision"] == "generation 2 with 2 nodes and 4 ranks, from the checkpoint of step 40"
    flat = " ".join(text.split())
    assert "rank 2 on node2: ValueError: shape: expected (32, 64): got (32, 63) the batch is odd" in flat
    assert "at train.py:17 (1.30 s down, 10 steps lost)" in flat


def test_the_users_bug_ends_the_run_with_its_place(tmp_path: Path) -> None:
    bug = Failure(FailureKind.EXCEPTION, "ValueError: odd batch", Step(50), where="train.py:17")
    scene = Scene().training(50).fail(2, bug).acknowledge().train(50).fail(2, bug)
    found, text = scene.shown(tmp_path)
    assert (found["state"], found["verdict"]["exit_code"], found["live"]) == ("failed", 10, False)
    flat = " ".join(text.split())
    assert "rank 2 on node2 failed twice at step 50 with the same error: ValueError: odd batch at train.py:17" in flat


def test_a_node_falls_silent_and_is_lost(tmp_path: Path) -> None:
    scene = Scene().training(50).commit(40)
    beat = NodeHeard(NodeId("node1"), _life(NodeId("node1")), scene.generation, 99)
    found, text = scene.see(beat, Ticked(), after=3.0).shown(tmp_path)
    assert {each["node"]: each["state"] for each in found["nodes"]} == {"node1": "member", "node2": "suspect"}
    assert "suspect" in text
    found, text = scene.see(beat, Ticked(), after=2.5).shown(tmp_path)
    assert [each["node"] for each in found["nodes"]] == ["node1"]
    flat = " ".join(text.split())
    assert "#1 node lost: node2" in text
    assert "(not over yet)" in flat
    assert scene.world.last_reason in flat
    assert "2 ranks on 1 node, generation 2" in text


def test_a_node_whose_stream_broke_is_disconnected(tmp_path: Path) -> None:
    scene = Scene().training(50)
    found, text = scene.see(StreamClosed(NodeId("node2"), _life(NodeId("node2")), "reset")).shown(tmp_path)
    assert found["nodes"][1]["state"] == "disconnected"
    assert "disconnected" in text


def test_a_restarted_agent_is_the_cause_not_the_collectives_that_broke_with_it(tmp_path: Path) -> None:
    echo = Failure(FailureKind.COLLECTIVE, "RuntimeError: connection closed by peer", Step(50))
    scene = Scene().training(50).commit(40)
    node1, node2 = scene.nodes
    scene.see(WorkerFailed(node1, _life(node1), scene.generation, Rank(0), echo), after=0.01)
    scene.see(NodeJoined(node2, Incarnation("another-life"), "10.0.0.2", 2, 7000), after=0.2)
    found, _ = scene.see(Ticked(), after=1.5).shown(tmp_path)
    assert found["state"] == "recovering"
    assert "node2" in found["incidents"][0]["reason"]
    assert "closed by peer" not in found["incidents"][0]["reason"]


def test_surplus_nodes_are_spares(tmp_path: Path) -> None:
    names = ("node1", "node2", "node3")
    found, text = Scene(names, rules=replace(RULES, multiple_of=4)).training(50).shown(tmp_path)
    assert [each["state"] for each in found["nodes"]] == ["member", "member", "spare"]
    (line,) = (line for line in text.splitlines() if "node3" in line)
    assert line.split() == ["node3", "spare", "1.3", "s", "-"]
    assert "4 ranks on 2 nodes" in text


def test_a_failed_save_is_an_incident_that_costs_no_time(tmp_path: Path) -> None:
    scene = Scene().training(50)
    failed = CheckpointFailed(Step(50), scene.generation, "rank 3: no space left on device")
    found, text = scene.see(failed).shown(tmp_path)
    assert found["state"] == "training"
    assert found["incidents"][0]["budget"] is None
    assert "#1 checkpoint failed: rank 3: no space left on device (training went on)" in text
    assert "training goes on; the next save tries again" in text
    again = CheckpointFailed(Step(60), scene.generation, "rank 1: no space left on device")
    found, text = scene.see(again, again).shown(tmp_path)
    assert [each["times"] for each in found["incidents"]] == [3], "one line, however often it happens"
    assert "#1 checkpoint failed: rank 1: no space left on device (3 times, the latest; training went on)" in text
    scene.fail(1, killed(60)).acknowledge().train(41)
    found, _ = scene.see(replace(again, generation=scene.generation)).shown(tmp_path)
    assert [each["cause"] for each in found["incidents"]] == ["checkpoint failed", "worker failed", "checkpoint failed"]


def test_where_the_time_has_gone(tmp_path: Path) -> None:
    scene = Scene().training(50).commit(40)  # 0.8 s until all are ready, 1 s for 50 steps
    scene.see(after=0.2).fail(1, killed(50))  # 0.3 s later
    scene.acknowledge().train(60, seconds=4.0)
    found, text = scene.shown(tmp_path)
    seconds = found["seconds"]
    assert sum(seconds.values()) == pytest.approx(found["elapsed_seconds"])
    assert seconds["kept"] == pytest.approx(1.5 * 40 / 50 + 4.0)
    assert seconds["repeated"] == pytest.approx(1.5 * 10 / 50)
    assert seconds["recovery"] == pytest.approx(0.3)  # from the proposal until all are ready
    assert seconds["other"] == pytest.approx(0.8)
    assert found["goodput"] == pytest.approx(seconds["kept"] / found["elapsed_seconds"])
    assert "78.8% of 6.6s (repeated steps 300ms, recovery 300ms, start-up and leaving 800ms)" in text


def leaving(why: Termination) -> Scene:
    return Scene().training(50).commit(40).see(TerminationAsked(why, 60.0), after=0.5)


def stopped(scene: Scene) -> Scene:
    members = scene.world.formation.members if scene.world.formation is not None else ()
    return scene.train(52).see(
        CheckpointCommitted(CheckpointRef(Step(52), scene.generation), 0.1, 1000),
        *(WorkerStopped(each.node, scene.generation, Rank(rank)) for each in members for rank in each.ranks()),
    )


def test_leaving_ahead_of_the_time_limit_and_requeued(tmp_path: Path) -> None:
    scene = leaving(Termination.TIME_LIMIT)
    found, text = scene.shown(tmp_path)
    assert found["state"] == "leaving"
    assert "time limit: a last checkpoint is made" in text
    found, text = stopped(scene).see(RequeueAccepted()).shown(tmp_path)
    assert (found["state"], found["verdict"]["exit_code"]) == ("requeued", 75)
    assert scene.world.last_reason in text
    assert found["checkpoints"][-1]["step"] == 52
    # the next start goes on with the history
    found, text = scene.begin("42.1").join().shown(tmp_path)
    assert (found["state"], found["start"], found["step"], found["verdict"]) == ("forming", 2, 52, None)
    assert "from the checkpoint of step 52" in text


def test_cancelled(tmp_path: Path) -> None:
    scene = stopped(leaving(Termination.CANCELLED))
    found, text = scene.shown(tmp_path)
    assert (found["state"], found["verdict"]["exit_code"]) == ("cancelled", 12)
    assert text.startswith(f"demo: cancelled\n  {scene.world.last_reason}\n")
    assert "52" in scene.world.last_reason


def test_finished(tmp_path: Path) -> None:
    found, text = Scene().training(50).finish(300).shown(tmp_path)
    assert (found["state"], found["live"], found["verdict"]["outcome"]) == ("finished", False, "finished")
    assert found["incidents"] == []
    assert text.startswith("demo: finished\n  the training function returned after step 300\n")
    assert "300 of 300" in text
    assert "done in" not in text, "nothing is to come"
    assert {each["state"] for each in found["nodes"]} == {"ended"}
    assert re.search(r"node1 +ended +- ", text), "nobody waits for heartbeats any more"


def test_workers_are_not_shown_behind_what_is_known_of_all(tmp_path: Path) -> None:
    """Reports come once a second, progress at once."""
    scene = Scene().training(50)
    found, _ = scene.see(*(Progressed(node, scene.generation, Step(60), 2.4) for node in scene.nodes)).shown(tmp_path)
    assert [each["step"] for each in found["workers"]] == [60] * 4


def test_no_rank_of_a_large_node_is_cut_off(tmp_path: Path) -> None:
    names = ("a-node-with-a-long-name-0001", "a-node-with-a-long-name-0002")
    _, text = Scene(names, workers=16).training(50).shown(tmp_path)
    for rank in range(32):
        assert f" {rank} (50, 12.3)" in text, rank


def test_what_the_leader_warns_of_is_shown() -> None:
    rules = Rules(Timing(0.5, 2.0, 5.0), minimum_nodes=1)
    found = {**status.snapshot(World(), rules, 1.0), "warnings": ["the journal cannot be written: No space left"]}
    assert "warning: the journal cannot be written: No space left" in status.render(found, COLUMNS)


def test_how_far_the_mirror_is(tmp_path: Path) -> None:
    found, _ = Scene(("node1",)).training(50).shown(tmp_path)
    for progress, line in (
        (Progress(), "mirror      nothing yet"),
        (Progress(mirrored=Step(40)), "mirror      up to step 40"),
        (
            Progress(Step(40), "step-00000050-g0001", 3 << 30, 1),
            "mirror      up to step 40; step-00000050-g0001 is under way, 3 GiB to go",
        ),
    ):
        found["mirror"] = progress.to_json()
        conforms(found)
        assert line in status.render(found, COLUMNS)


def test_a_leader_that_fell_silent(tmp_path: Path) -> None:
    scene = Scene().training(50)
    scene.shown(tmp_path)
    run = RunDirectory(tmp_path / "demo")
    long_ago = time.time() - 120
    os.utime(run.status, (long_ago, long_ago))
    found = status.read(run)
    conforms(found)
    assert found["live"] is False
    assert found["age_seconds"] == pytest.approx(120, abs=30)
    assert status.render(found, COLUMNS).startswith("demo: training (but its leader has been silent for 2m")


# --- a real run directory ---


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    """What the code's own writers leave of a finished run."""
    run = RunDirectory(tmp_path / "runs" / "demo")
    run.prepare()
    scene = Scene().training(50).commit(40).fail(1, killed(50)).acknowledge().finish(300)

    async def write() -> None:
        journal = Journal(run.journal, Term(1), Generation(0), _life(NodeId("node1")), replay(run.journal))
        for at, event in scene.history:
            journal.append(event, at)
        await journal.sync()
        journal.close()

    asyncio.run(write())
    assert replay(run.journal).world.verdict == scene.world.verdict
    durable.replace(run.status, orjson.dumps(status.snapshot(scene.world, RULES, scene.now)))
    return run


def command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcft", *arguments],
        cwd=directory,
        env={name: value for name, value in os.environ.items() if not name.startswith("HPCFT_")}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_the_command_on_a_finished_run(finished: RunDirectory) -> None:
    root = finished.path.parent.parent
    found = json.loads(command(root, "status", "--json").stdout)
    conforms(found)
    assert (found["name"], found["directory"]) == ("demo", str(finished.path))
    assert (found["state"], found["step"], len(found["incidents"])) == ("finished", 300, 1)
    text = command(root, "status", "demo").stdout
    assert "demo: finished" in text
    assert "#1 worker failed: rank 1 on node1: SIGKILL" in text


def test_status_imports_no_torch(finished: RunDirectory) -> None:
    program = "import sys; from hpcft.cli import main; code = main(['status', '--json']); "
    program += "print(code, sorted({'torch', 'numpy', 'pydantic', 'rich'} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=finished.path.parent.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "0 []\n"


def test_status_answers_at_once(finished: RunDirectory) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        command(finished.path.parent.parent, "status")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 1.0, "a generous bound: half of 0.3 s where nothing else runs"
